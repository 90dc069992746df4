"""What runs in each training process: build the model, resume, step, checkpoint, evaluate, hand over the result.

`train_loop` is what Ray Train calls. It gets plain data (`Job`) and builds its own objects from it.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ftray.config.schema import AdaLora, Feature, Lora, Run
from ftray.errors import FtrayError, ModelError, TrainError
from ftray.models import leave_out_bitsandbytes
from ftray.train import notice
from ftray.train.layout import Layout
from ftray.train.schedule import Schedule, Windows


@dataclass(frozen=True)
class Job:
    """Everything a worker needs to know, as plain data. `events`: a Ray actor that takes rows for the log, or None."""

    run: dict[str, Any]
    layout: Layout
    schedule: Schedule
    data_key: str
    base: str  # fingerprint of the base, which every node must agree on
    born: str
    folder: str  # name of the run's folder in the storage; an evaluation has its own
    version_key: str | None = None  # set: train nothing, score this version's files against the base
    events: Any = None


@dataclass(frozen=True)
class Seen:
    """What a step saw on this worker: its micro-batches and their summed losses in nats; `loss`: this worker's share of
    the loss, `grad_norm`: of all workers, before clipping; `tokens` of the whole window."""

    micros: list[Any]
    sums: list[float]
    loss: float
    grad_norm: float
    tokens: int


def train_loop(job: Job) -> None:
    """Ray Train's entry. Errors that the user can fix become a verdict in the run's folder instead of restarts."""
    started = time.monotonic()
    from ftray.store.paths import Storage
    from ftray.store.runs import RunFolder

    run = Run.model_validate(job.run)
    storage = Storage(run.storage)
    folder = RunFolder(storage, job.folder)
    if not run.takes_bitsandbytes:
        leave_out_bitsandbytes()
    if folder.verdict():
        return  # a worker met it alone, and the group was restarted to end together
    try:
        worker = Worker(job, run, folder, started)
        if job.version_key is None:
            worker.train()
        else:
            worker.evaluate(job.version_key)
    except FtrayError as error:
        # A restart would only meet it again. Workers that did not meet it are ended by their watchdogs.
        folder.set_verdict(type(error).__name__, str(error))


class Worker:
    """One process of a run. `sweep` makes another of it, which keeps the base and the data between trials."""

    ASK_S = notice.ASK_S

    def __init__(self, job: Job, run: Run, folder, started: float):
        import torch
        import torch.distributed as dist

        from ftray.models import chain
        from ftray.objectives import objective_for
        from ftray.store.checkpoints import Checkpoints
        from ftray.train.deepspeed import init_distributed
        from ftray.train.keeper import Keeper

        self.storage = storage = folder.storage
        self.job, self.run, self.folder, self.started = job, chain.here(run, storage), folder, started
        self.layout, self.schedule = job.layout, job.schedule
        if self.layout.device == "cpu":
            torch.set_num_threads(max(1, int(self.layout.cpus_per_worker)))
        init_distributed(self.layout.device)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.layout = replace(self.layout, workers=self.world)  # a range of workers is not always at its full number
        self.notices = notice.Notices(self.rank, self.ASK_S, events=job.events)
        self.device = self._device() if self.layout.device == "cuda" else torch.device("cpu")
        self.data = self._data()
        self.windows = Windows(self.data.train, [source.weight for source in run.data.sources], self.schedule)
        if (halved := self._kept("micro.json")) is not None:
            self.layout = replace(self.layout, micro_batch_size=min(halved, self.layout.micro_batch_size))
        objective = objective_for(run.objective.kind, run.method)
        self.objective: Any = objective(run.objective, packed=self.layout.packing, data=self.data)
        self.keeper = Keeper(
            Checkpoints(storage, folder.name, job.born),
            keep=run.scale.keep_checkpoints,
            meta={"workers": self.world, "zero": self.layout.zero},
            log=self.log,
        )

    def train(self) -> None:
        with self.watched() as self.watchdog:
            self._build()
            first = self._resume()
            self._before(first)
            for step in range(first, self.schedule.steps):
                if self._step(step):
                    self.keeper.finish()
                    self.log({"kind": "stopped", "step": step + 1})
                    return
            self.keeper.finish()
            self._hand_over()

    def evaluate(self, version_key: str | None) -> None:
        """Score the base, and then a version's files read into it, but for what the run's folder has already."""
        from ftray.models import virtual

        with self.watched() as self.watchdog:
            self._build()
            if self._kept("before.json") is None:
                self.log({"kind": "phase", "text": "scoring the base"})
                with virtual.left_away(self.model):
                    self._keep("before.json", self.meter.base())
            if version_key and self._kept("after.json") is None:
                self.log({"kind": "phase", "text": "scoring the tuned version"})
                self._read_back(version_key)
                self._keep("after.json", self.meter.full())

    # what a process may share between the runs it trains

    def _device(self):
        import ray.train.torch

        return ray.train.torch.get_device()

    def _node(self) -> str:
        import ray

        return ray.get_runtime_context().get_node_id()

    def _data(self):
        from ftray.data.prepare import open_prepared

        return open_prepared(self.storage, self.job.data_key, Path(tempfile.gettempdir(), "ftray-data"))

    def _base(self):
        """The base's weights and tokenizer; ModelError where they are not those that the driver saw."""
        from ftray.models.load import fingerprint, load_tokenizer

        run, layout = self.run, self.layout
        if (found := fingerprint(run.model)) != self.job.base:
            raise ModelError(
                f"model.base: {run.model.base} is another model on {socket.gethostname()} ({found[:19]}) than where "
                f"the run was started ({self.job.base[:19]}); copy it there, or name a folder that every node mounts"
            )
        tokenizer = load_tokenizer(run.model)
        model = self.objective.load(
            run.model, method=run.method, dtype=self.dtype, attention=layout.attention, zero3=layout.zero == 3
        )
        return model, tokenizer

    def _another_base(self):
        from ftray.models.load import load_frozen

        return load_frozen(self.run.model, dtype=self.dtype, attention=self.layout.attention).to(self.device)

    # building

    def _build(self) -> None:
        import torch

        from ftray.models import chain
        from ftray.models.adapt import adapt, switches_off, trainable
        from ftray.plain_template import plain_template
        from ftray.train.deepspeed import deepspeed_config
        from ftray.train.measure import Meter
        from ftray.train.nvme import make_nvme_ready
        from ftray.train.ranks import RankBudget

        run, layout = self.run, self.layout
        torch.manual_seed(run.seed)
        if layout.offload == "nvme":
            assert layout.nvme_path  # the schema asks for it
            make_nvme_ready(layout.nvme_path)
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[layout.dtype]
        if isinstance(run.method, Feature):  # the base alone reads in 16 bits
            self.dtype = torch.float32
            self.objective.vectors = self._vectors(run.method)
        if layout.zero == 3:
            from transformers.integrations import HfDeepSpeedConfig

            self._zero3 = HfDeepSpeedConfig(deepspeed_config(layout=layout, optim=run.optim, dtype=self.dtype))
        model, self.tokenizer = self._base()
        if self.objective.writes and not self.tokenizer.chat_template:
            self.tokenizer.chat_template = plain_template(self.tokenizer)
        if layout.zero != 3 and not getattr(run.method, "bits", None):
            model.to(self.device)
        model = adapt(
            model,
            run.method,
            seed=run.seed,
            fp32=layout.zero == 0,
            steps=self.schedule.steps,
            tasks=run.tasks,
            prompt=chain.first_prompt(run.method, self.storage, width=model.config.get_text_config().hidden_size),
        )
        if isinstance(run.method, Lora) and layout.zero != 3:
            from ftray.models.fused import fuse

            fuse(model)
        if layout.gradient_checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.config.use_cache = False
        whole, beside = self.objective.around(model)
        self.model, self.learnt = model, trainable(model)
        self.judges: dict[str, Any] = {}
        self.named = self.learnt | beside
        self.engine: Any = self._engine(whole)
        self.model.train()
        self.ranks = None
        if isinstance(run.method, AdaLora):
            self.ranks = RankBudget(self.model, self.engine, self.learnt, max_grad_norm=run.optim.max_grad_norm)
        self.objective.stand(self._stage(whole))
        self.meter = Meter(
            self.model,
            self.tokenizer,
            objective=self.objective,
            held_out=self.data.eval,
            questions=self.data.questions,
            baselines=self.data.baselines,
            evaluate=run.evaluate,
            layout=layout,
            max_length=run.data.max_length,
            computing=self.computing,
            beat=lambda: self.watchdog.beat(),
            judge=self._worth(run.evaluate.judge) if run.evaluate.judge else None,
            switches_off=switches_off(run.method),
        )
        stores = [self.data.eval] if self.job.version_key else [self.data.train, self.data.eval]
        self.objective.begin(model, method=run.method, stores=stores, figures=self._figures)

    def _engine(self, whole):
        """What steps `named`."""
        from ftray.train.deepspeed import build_engine
        from ftray.train.plain_engine import PlainEngine

        built = {"named": self.named, "layout": self.layout, "optim": self.run.optim, "lr": self.schedule.lr}
        if self._steps_plainly:
            return PlainEngine(whole, **built)
        return build_engine(whole, **built, dtype=self.dtype)

    @property
    def _steps_plainly(self) -> bool:
        """DeepSpeed's engine would be most of the time."""
        return isinstance(self.run.method, Feature) and not self.layout.zero

    def _vectors(self, method: Feature):
        from ftray.train import features

        model, layout = self.run.model, self.layout
        return features.gather(
            features.vector_store(self.storage, model, method, base=self.job.base, dtype=layout.dtype),
            [self.data.train, self.data.eval],
            load=features.reading(model, method, layout=layout, device=self.device),
            device=layout.device,
            log=self.log,
            beat=lambda: self.watchdog.beat(),
        )

    def _figures(self, store, observe):
        """What is observed on every row of a store: from the run's folder, or now, and kept there."""
        from ftray.train.figures import kept

        where = f"{self.folder.key}/figures/{Path(self.job.data_key).name}-{store.folder.name}.npy"
        return kept(self.storage, where, compute=lambda: self.meter.over(store, observe), log=self.log)

    def _stage(self, whole):
        from ftray.objectives.objective import Stage

        return Stage(
            policy=self.model,
            whole=whole,
            tokenizer=self.tokenizer,
            seed=self.run.seed,
            synced=self.layout.zero == 3,
            deal=self._deal,
            computing=self.computing,
            another_base=self._another_base,
            beat=lambda: self.watchdog.beat(),
            worth=self._worth,
        )

    def _worth(self, version: str):
        """What a reward version gives texts. Its weights are loaded once, whole on every worker."""
        from ftray.models import reward
        from ftray.models.sharded import without_zero3
        from ftray.objectives.worth import Worth

        if version not in self.judges:
            with without_zero3():
                model = reward.load(version, self.storage, dtype=self.dtype, beside=self.model)
            if not getattr(model, "is_quantized", False):
                model.to(self.device)
            tokens = self.layout.micro_batch_size * self.run.data.max_length
            self.judges[version] = Worth(model, dtype=self.dtype, tokens=tokens, beat=lambda: self.watchdog.beat())
        return self.judges[version]

    def computing(self) -> contextlib.AbstractContextManager:
        """Without ZeRO, 16-bit computing is autocast over fp32 learnt weights; with it, the weights are 16-bit."""
        import torch

        if self.layout.zero == 0 and self.layout.dtype != "fp32":
            return torch.autocast(self.layout.device, dtype=self.dtype)
        return contextlib.nullcontext()

    def _resume(self) -> int:
        """Continue from the newest complete checkpoint; its step, or 0."""
        from ftray.train import state

        found = self.keeper.newest()
        first = 0
        if found is not None:
            checkpoint, tensors = found
            state.restore(self.engine, self.named, tensors, steps=checkpoint.step * self.objective.updates)
            self.objective.restore(tensors)
            if self.ranks is not None:
                self.ranks.restore(tensors)
            first = checkpoint.step
        self.log(
            {
                "kind": "started",
                "step": first,
                "seconds": time.monotonic() - self.started,
                "resumed": found is not None,
                "workers": self.world,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "node": self._node(),
                "at": time.time(),
            }
        )
        return first

    # before, during, after

    def _before(self, first: int) -> None:
        """Score the base, once: a resumed run finds the scores in its folder."""
        from ftray.models import virtual

        if self._kept("before.json") is None:
            if first:
                raise TrainError(
                    f"run {self.run.name}: the base's scores are gone from its folder; start over with --fresh"
                )
            self.log({"kind": "phase", "text": "scoring the base"})
            with virtual.left_away(self.model):
                self._keep("before.json", self.meter.base())

    def _step(self, step: int) -> bool:
        """One update; true when the run shall stop after it."""
        import torch

        from ftray.train.deepspeed import update

        began = time.monotonic()
        self.watchdog.beat()
        rate = self.schedule.lr_at(step)
        # dropout, whatever came before; torch.manual_seed notes a traceback where there is no GPU, 1 ms each time
        seed = torch.default_generator.manual_seed if self.layout.device == "cpu" else torch.manual_seed
        seed(self.seed_at(step))
        micros, sums, loss = [], [], 0.0
        try:
            store, parts = self.objective.lessons(step, self.windows.rows(step))
            for part in parts:
                mine = self.micros(store, part)
                count = max(1, self.objective.count(store, part))
                with self.computing():
                    self.objective.before_update(self.model, mine, count=count)
                done = update(self.engine, mine, partial(self._loss, store), count=count, lr=rate, ranks=self.ranks)
                micros += mine
                sums += done.sums
                loss += sum(done.sums) / count / len(parts)
        except torch.OutOfMemoryError as error:
            self._halve(error)
            raise
        tokens = sum(int(store.lengths[part].sum()) for part in parts)
        seen = Seen(micros, sums, loss=loss, grad_norm=done.grad_norm, tokens=tokens)
        return self.stepped(step, seen, began=began)

    def seed_at(self, step: int) -> int:
        """The seed of what a step draws on this worker."""
        return (self.run.seed * 1_000_003 + step) * 4093 + self.rank

    def stepped(self, step: int, seen: Seen, *, began: float) -> bool:
        """What follows an update: is it sound, what the log is told, checkpoints; true when the run shall stop."""
        import torch

        from ftray.train.measure import summed

        notes = [self.keeper.busy, self.notices.due, self.notices.stop]
        told = torch.tensor([seen.loss, *map(float, notes), *self.objective.noted()], dtype=torch.float64)
        loss, busy, ask, stop, *noted = summed(told, self.layout.device).tolist()
        self._refuse_nan(step, loss=loss, norm=seen.grad_norm, sums=seen.sums, micros=seen.micros)
        if self.ranks is not None:
            self.ranks.after_step(step + 1, grad_norm=seen.grad_norm)
        if self.keeper.waiting and not busy:
            self.keeper.finish()
        after = step + 1
        if after % self.schedule.log_every == 0 or after == self.schedule.steps:
            seconds = time.monotonic() - began
            self.log(
                {
                    "kind": "train",
                    "step": after,
                    "loss": loss,
                    "lr": self.schedule.lr_at(step),
                    "grad_norm": seen.grad_norm,
                    "epoch": self.windows.epoch(after),
                    "tokens": seen.tokens,
                    "tokens_per_s": seen.tokens / seconds,
                    "seconds": seconds,
                    **self.objective.told(noted),
                }
            )
        scheduled = self.schedule.checkpoints_after(after) or after == self.schedule.steps
        if scheduled or stop or (ask and self.notices.new()):
            more = self.ranks.tensors() if self.ranks is not None else {}
            self.keeper.take(self.engine, self.named, step=after, more=more | self.objective.tensors())
        if self.schedule.evaluates_after(after) and not stop:
            self._evaluate(after)
        return bool(stop)

    def _halve(self, error: BaseException) -> None:
        """The GPU ran full: restart with micro-batches half the size, which changes the layout and not the gradient."""
        size = self.layout.micro_batch_size
        if size > 1:
            self.storage.write_json(f"{self.folder.key}/micro.json", size // 2)
            return
        reason = next(iter(str(error).splitlines()), "out of memory")
        text = (
            f"one example of data.max_length: {self.run.data.max_length} tokens does not fit on a GPU ({reason}); "
            "lower it, or set scale.gradient_checkpointing: true, scale.zero: 3 or method.bits: 4"
        )
        self.folder.set_verdict(TrainError.__name__, text)

    def micros(self, store, rows):
        hands = self._deal(store.lengths[rows])
        return [self.objective.batch(store, rows[hand], spare=int(rows[0])) for hand in hands]

    def _deal(self, lengths):
        """This worker's micro-batches of examples of these lengths."""
        from ftray.data.pack import deal

        hands = deal(
            lengths,
            workers=self.world,
            micro_batch_size=self.layout.micro_batch_size,
            max_length=self.run.longest,
            packed=self.layout.packing,
        )
        return hands[self.rank]

    def _loss(self, store, engine, micro):
        from ftray.models import virtual

        with self.computing(), virtual.of_rows(self.model, store, micro.rows):
            return self.objective.loss_sum(engine, micro)

    def _evaluate(self, step: int) -> None:
        scores = self.meter.quick()
        self.log({"kind": "eval", "step": step, **scores})
        self._report({"step": step, "eval_loss": scores.get("loss")})

    def _hand_over(self) -> None:
        """Write the version's files, read them back into the model, score what was read, and leave both in storage."""
        self.log({"kind": "phase", "text": "writing and scoring the tuned version"})
        self._read_back(self._write_output())
        self._keep("after.json", self.meter.full())
        self._report({"step": self.schedule.steps, "done": True})

    def _write_output(self) -> str:
        """The version's files into storage; their key."""
        import torch.distributed as dist

        from ftray.models import adalora
        from ftray.models.save import save_version
        from ftray.train import state

        values = {}
        for name, tensor in state.gather(self.engine, self.learnt, moments=False):
            if self.rank == 0:
                values[name] = tensor
        output = f"{self.folder.key}/output"
        with tempfile.TemporaryDirectory(prefix="ftray-version-") as folder:
            if self.rank == 0:
                save_version(self.model, Path(folder), method=self.run.method, state=values, tokenizer=self.tokenizer)
                if self.ranks is not None:
                    self.storage.write_json(f"{self.folder.key}/ranks.json", adalora.ranks(values))
                self.storage.remove(output)
                self.storage.upload(Path(folder), output)
        self.watchdog.beat()
        dist.barrier()
        return output

    def _read_back(self, key: str) -> None:
        """The files of a version into the live model: what is scored is what was written."""
        from ftray.models.save import load_state_into

        with tempfile.TemporaryDirectory(prefix="ftray-version-") as folder:
            load_state_into(self.model, self.storage.download(key, Path(folder)), self.run.method)

    # telling

    def log(self, row: dict[str, Any]) -> None:
        """A row for the driver's log; sent by worker 0, never waited for."""
        if self.rank == 0 and self.job.events is not None:
            self.job.events.put.remote(row)

    def _report(self, metrics: dict[str, Any]) -> None:
        """The only place that reports to Ray Train; every worker comes here equally often."""
        import ray.train

        ray.train.report(metrics)

    def _kept(self, name: str) -> Any:
        from ftray.train.keeper import agreed

        key = f"{self.folder.key}/{name}"
        found = self.storage.read_json(key) if self.rank == 0 and self.storage.exists(key) else None
        return agreed(found)

    def _keep(self, name: str, measured) -> None:
        if self.rank == 0:
            answers = [asdict(answer) for answer in measured.answers]
            row = {"scores": measured.scores.to_json(), "answers": answers, "details": measured.details}
            if measured.baselines:
                row["baselines"] = {count: scores.to_json() for count, scores in measured.baselines.items()}
            self.storage.write_json(f"{self.folder.key}/{name}", row)

    def _refuse_nan(self, step: int, *, loss: float, norm: float, sums: list[float], micros) -> None:
        """Stop on the first loss or gradient that is not a number, naming its rows. Checkpoints stay clean."""
        import torch.distributed as dist

        if math.isfinite(loss) and math.isfinite(norm):
            return
        bad = [m for m, total in zip(micros, sums, strict=True) if not math.isfinite(total)] or micros
        names = [self.data.train.row_name(row) for micro in bad for row in micro.rows]
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, names)
        rows = sorted({name for names in gathered for name in names})
        shown = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
        what = "loss" if not math.isfinite(loss) else "gradient"
        raise TrainError(
            f"step {step + 1}: the {what} is not a number; rows of the batch: {shown}. Look at them, or lower optim.lr "
            f"(now {self.schedule.lr_at(step):.3g}); the run resumes from the checkpoint before"
        )

    def watched(self):
        from ftray.train.watch import Watchdog

        return Watchdog(self.run.scale.hang_timeout_s, self._hung, lambda: self.folder.verdict() is not None)

    def _hung(self, stacks: str) -> None:
        name = f"rank-{self.rank}-{int(time.time())}.txt"
        self.storage.write_bytes(f"{self.folder.key}/stacks/{name}", stacks.encode())


def entry(values: dict[str, Any]) -> None:
    """`train_loop_per_worker`: Ray Train hands over a dict."""
    from ftray.train.cluster import stand_still

    stand_still()
    train_loop(values["job"])
