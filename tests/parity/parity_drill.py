"""One small training run per variant, as a worker makes it but without Ray: processes, gloo, real engines and files.

The processes come from a fork server that has imported the libraries once, so a group of them starts in a moment.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import multiprocessing
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from ftray.config.objectives import ObjectiveSection
from ftray.config.schema import AdaLora, Evaluate, Full, Method, Model, Optim, Sft
from ftray.train.layout import Layout

ROWS, EPOCHS, BATCH, SAVED_AFTER, LONGEST = 13, 2, 6, 2, 40  # 5 steps, of which the last has only 2 rows
VOCAB = 101
SEED = 7
LIBRARIES = [
    "bitsandbytes",
    "deepspeed",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "ftray.models.adapt",
    "ftray.models.save",
    "ftray.train.deepspeed",
    "ftray.train.keeper",
    "ftray.train.measure",
    "ftray.train.schedule",
    "numpy.ma",
    "peft.tuners.lora.bnb",
    "peft.utils.transformers_weight_conversion",
    "transformers.integrations.deepspeed",
    "transformers.models.llama.modeling_llama",
]


@dataclass(frozen=True)
class Variant:
    """How a run is cut, and which checkpoints it writes or starts from. None of the first block changes the curve."""

    name: str
    zero: int = 0
    offload: str = "none"
    packing: bool = False
    micro: int = 2
    checkpointing: bool = False

    method: Method = field(default_factory=Full)
    objective: ObjectiveSection = field(default_factory=Sft)
    rows: str = "rows"  # folder of what it learns from
    dtype: str = "fp32"
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    lr: float = 1e-2
    base: str = "base"

    saves: str | None = None  # run whose checkpoint is written after SAVED_AFTER steps
    spread: bool = False  # every worker writes a part of it, as for large models
    resumes: str | None = None  # run whose newest checkpoint it starts from
    version: bool = False  # write the tuned version to versions/<name>, and the logits of the first row beside it


@dataclass(frozen=True)
class Curve:
    """What a variant saw. `losses`: nats per trained token; of the steps it made, the first is `first`."""

    first: int
    losses: list[float]
    norms: list[float]
    seconds: float


def write_base(folder: Path, *, hidden: int = 65, intermediate: int = 71, vocab: int = VOCAB) -> None:
    """A Llama with sizes that two, three and four workers do not divide, so that shards are padded."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=14,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2").save_pretrained(folder)


def write_rows(folder: Path) -> None:
    """Ragged rows, 4 to 40 tokens; the first third of each is not trained."""
    from ftray.data.tokens import TokenWriter

    rng = np.random.default_rng(0)
    with TokenWriter(folder, VOCAB, ["rows"]) as writer:
        for line in range(ROWS):
            ids = rng.integers(0, VOCAB, rng.integers(4, LONGEST + 1))
            writer.add(ids, np.arange(len(ids)) >= len(ids) // 3, 0, line + 1, "rows.jsonl")


def run_group(folder: Path, workers: int, variants: Sequence[Variant]) -> dict[str, Curve]:
    """Run the variants one after the other in one group of processes; their curves by name.

    `folder` holds base/ and rows/; checkpoints go to store/, versions to versions/ below it.
    """
    out = folder / f"curves-{time.monotonic_ns()}.json"
    calm = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    with _environment(calm):
        multiprocessing.set_forkserver_preload(LIBRARIES)
        torch.multiprocessing.start_processes(
            _worker, (str(folder), workers, list(variants), str(out)), nprocs=workers, start_method="forkserver"
        )
    return {name: Curve(**curve) for name, curve in json.loads(out.read_text()).items()}


@contextlib.contextmanager
def _environment(values):
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _worker(rank: int, folder: str, workers: int, variants: list[Variant], out: str) -> None:
    import torch.distributed as dist

    from ftray.train.deepspeed import init_distributed

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(workers))
    torch.set_num_threads(1)
    gc.freeze()  # what the fork server imported is shared, and stays so if it is not collected
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    dist.init_process_group("gloo", init_method=f"file://{out}.meet", rank=rank, world_size=workers)
    init_distributed("cpu")
    curves = {}
    for variant in variants:
        try:
            curves[variant.name] = asdict(train(variant, Path(folder)))
        except Exception as error:
            error.add_note(f"in variant {variant} on {workers} workers, worker {rank}")
            raise
    if rank == 0:
        Path(out).write_text(json.dumps(curves))
    dist.barrier()
    dist.destroy_process_group()


def optim_of(variant: Variant) -> Optim:
    return Optim(
        batch_size=BATCH,
        optimizer=variant.optimizer,
        weight_decay=variant.weight_decay,
        epochs=EPOCHS,
        warmup=0.2,
    )


def schedule_of(variant: Variant):
    from ftray.train.schedule import course

    return course(
        optim_of(variant),
        lr=variant.lr,
        rows=ROWS,
        seed=SEED,
        checkpoint_every=SAVED_AFTER,
        eval_every=0,
        log_every=1,
    )


def layout_of(variant: Variant, workers: int) -> Layout:
    return Layout(
        workers=workers,
        device="cpu",
        gpus_per_worker=0,
        cpus_per_worker=1,
        zero=variant.zero,
        offload=variant.offload,
        nvme_path=None,
        dtype=variant.dtype,
        attention="ftray_varlen" if variant.packing else "sdpa",
        packing=variant.packing,
        micro_batch_size=variant.micro,
        gradient_checkpointing=variant.checkpointing,
    )


def train(variant: Variant, folder: Path) -> Curve:
    """One run, in a process group that stands. What worker.py does, less Ray, evaluation and the log."""
    import torch.distributed as dist
    from transformers.integrations import deepspeed as integration

    from ftray.data.tokens import TokenStore
    from ftray.models.adapt import adapt, trainable
    from ftray.models.load import Shape, load_base, load_config
    from ftray.objectives import OBJECTIVES
    from ftray.store.checkpoints import Checkpoints
    from ftray.store.paths import Storage
    from ftray.train import keeper as keeper_module
    from ftray.train import state
    from ftray.train.deepspeed import build_engine, deepspeed_config, update
    from ftray.train.measure import Meter
    from ftray.train.nvme import make_nvme_ready
    from ftray.train.ranks import RankBudget
    from ftray.train.schedule import Windows

    began = time.monotonic()
    rank, workers = dist.get_rank(), dist.get_world_size()
    layout = layout_of(variant, workers)
    if layout.offload == "nvme":
        largest = Shape.from_config(load_config(Model(base=str(folder / variant.base)))).embedding_params
        layout = replace(layout, nvme_path=str(folder / "nvme"), largest_weight=largest)
        make_nvme_ready(layout.nvme_path)
    optim = optim_of(variant)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[variant.dtype]
    store = TokenStore.open(folder / variant.rows)
    schedule = schedule_of(variant)
    objective = OBJECTIVES[variant.objective.kind](
        variant.objective, packed=layout.packing, data=SimpleNamespace(train=store, eval=store)
    )
    windows = Windows(store, [], schedule)

    torch.manual_seed(SEED)
    integration.unset_hf_deepspeed_config()
    sharding = None
    if layout.zero == 3:
        sharding = integration.HfDeepSpeedConfig(deepspeed_config(layout=layout, optim=optim, dtype=dtype))
    model = load_base(
        Model(base=str(folder / variant.base)),
        method=variant.method,
        dtype=dtype,
        attention=layout.attention,
        zero3=sharding is not None,
    )
    model = adapt(model, variant.method, seed=SEED, fp32=layout.zero == 0, steps=schedule.steps)
    if layout.gradient_checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    named = trainable(model)
    engine = build_engine(model, named=named, layout=layout, optim=optim, lr=schedule.lr, dtype=dtype)
    model.train()
    meter = Meter(
        model,
        None,
        objective=objective,
        held_out=store,
        questions=[],
        baselines={},
        evaluate=Evaluate(generate_rows=0),
        layout=layout,
        max_length=LONGEST,
        computing=contextlib.nullcontext,
    )
    objective.begin(model, method=variant.method, stores=[store], figures=meter.over)
    ranks = None
    if isinstance(variant.method, AdaLora):
        ranks = RankBudget(model, engine, named, max_grad_norm=optim.max_grad_norm)

    checkpoints = Checkpoints(Storage(str(folder / "store")), variant.saves or variant.resumes or variant.name)
    keeper_module.SPREAD_BYTES = 0 if variant.spread else 2**40
    keeper = keeper_module.Keeper(checkpoints, keep=2, meta={"workers": workers}, log=lambda row: None)
    first = 0
    if variant.resumes:
        checkpoint, tensors = keeper.newest()
        state.restore(engine, named, tensors, steps=checkpoint.step)
        first = checkpoint.step
        if ranks is not None:
            ranks.restore(tensors)

    autocast = torch.autocast("cpu", dtype) if layout.zero == 0 and dtype != torch.float32 else contextlib.nullcontext()

    def loss(engine, micro):
        with autocast:
            return objective.loss_sum(engine, micro)

    losses, norms = [], []
    for step in range(first, schedule.steps):
        rows = windows.rows(step)
        torch.manual_seed(1000 * step + rank)  # dropout
        count = objective.count(store, rows)
        micros = micros_of(store, rows, layout, objective)[rank]
        with autocast:
            objective.before_update(model, micros, count=count)
        done = update(engine, micros, loss, count=count, lr=schedule.lr_at(step), ranks=ranks)
        if ranks is not None:
            ranks.after_step(step + 1, grad_norm=done.grad_norm)
        total = torch.tensor(sum(done.sums), dtype=torch.float64)
        dist.all_reduce(total)
        losses.append(total.item() / count)
        norms.append(done.grad_norm)
        if keeper.waiting:
            keeper.finish()
        if variant.saves and step + 1 == SAVED_AFTER:
            keeper.take(engine, named, step=step + 1, more=ranks.tensors() if ranks is not None else None)
    if variant.version:
        _write_version(variant, folder, model, dict(state.gather(engine, named, moments=False)))
    engine.destroy()
    del engine, model, named
    gc.collect()
    return Curve(first, losses, norms, time.monotonic() - began)


def _write_version(variant: Variant, folder: Path, model, values: dict[str, torch.Tensor]) -> None:
    """As the worker hands over: written by one process, read back by all."""
    import torch.distributed as dist
    from safetensors.torch import save_file

    from ftray.data.tokens import TokenStore
    from ftray.models.load import load_tokenizer
    from ftray.models.save import load_state_into, save_version

    version = folder / "versions" / variant.name
    if dist.get_rank() == 0:
        tokenizer = load_tokenizer(Model(base=str(folder / variant.base)))
        save_version(model, version, method=variant.method, state=values, tokenizer=tokenizer)
        save_file({n: t.contiguous() for n, t in values.items()}, version / "gathered")
    dist.barrier()
    load_state_into(model, version, variant.method)
    model.eval()
    with torch.no_grad():
        ids = torch.from_numpy(TokenStore.open(folder / "rows").ids(0).astype(np.int64))[None]
        logits = model(input_ids=ids).logits.float()[:, -ids.shape[1] :]
    if dist.get_rank() == 0:
        torch.save(logits, version / "logits")


def micros_of(store, rows, layout: Layout, objective=None) -> list[list]:
    """[worker][micro-batch]"""
    from ftray.data.pack import deal
    from ftray.objectives import OBJECTIVES

    objective = objective or OBJECTIVES["sft"](Sft(), packed=layout.packing, data=SimpleNamespace(train=store))

    hands = deal(
        store.lengths[rows],
        workers=layout.workers,
        micro_batch_size=layout.micro_batch_size,
        max_length=LONGEST,
        packed=layout.packing,
    )
    return [[objective.batch(store, rows[hand], spare=int(rows[0])) for hand in mine] for mine in hands]
