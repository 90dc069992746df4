"""Whole runs as workers make them but without Ray: processes, gloo, real engines and files.

The base is a random Llama, or a BERT, over 40 words; the tokenizer knows `w0` to `w39`, and everything else is `w0`.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import multiprocessing
import os
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

VOCAB = 40
LIBRARIES = [
    "deepspeed",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "ftray.models.save",
    "ftray.objectives",
    "ftray.train.known",
    "ftray.train.measure",
    "ftray.train.worker",
    "transformers.integrations.deepspeed",
    "transformers.models.llama.modeling_llama",
]
EOS = 1
ASKED = [[3, 9, 12, 30, 4], [8, 8, 21, 5, 17]]


def write_base(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        initializer_range=0.1,
        eos_token_id=EOS,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=_words(), eos_token=f"w{EOS}", pad_token="w2").save_pretrained(folder)


def write_encoder(folder: Path) -> None:
    """A random BERT over the same words, and its tokenizer."""
    from tokenizers import processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        initializer_range=0.3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    words = _words()
    words.post_processor = processors.TemplateProcessing(
        single="w1 $A w2", pair="w1 $A w2 $B:1 w2:1", special_tokens=[("w1", 1), ("w2", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=words, cls_token="w1", sep_token="w2", pad_token="w3", unk_token="w0"
    ).save_pretrained(folder)


def _words() -> Any:
    """A tokenizer of w0 to w39 between white space."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return words


def write_rows(path: Path, count: int = 24) -> None:
    """Prompts of one to five words, each with a word for a reference."""
    rows = [
        {"prompt": " ".join(f"w{3 + (n * 7 + k * 5) % 30}" for k in range(1 + n % 5)), "answer": f"w{3 + n % 30}"}
        for n in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")


def run_of(folder: Path, name: str, objective: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    """A run over the folder's base and rows; `sections` are added to its own."""
    values: dict[str, Any] = {
        "name": name,
        "storage": str(folder / "store"),
        "seed": 3,
        "model": {"base": str(folder / "base")},
        "data": {"sources": str(folder / "rows.jsonl"), "max_length": 64, "eval_fraction": 0.2},
        "method": {"kind": "lora", "rank": 4},
        "objective": {"max_new_tokens": 6, **objective},
        "optim": {"steps": 3, "batch_size": 4, "lr": 1e-2, "schedule": "constant", "warmup": 0.0},
        "scale": {"checkpoint_every": 100},
        "evaluate": {"every": 0, "forgetting": False},
        "track": {"to": []},
    }
    for key, section in sections.items():
        values[key] = {**values[key], **section} if key != "method" else section
    return values


def run_all(folder: Path, runs: Sequence[dict[str, Any]], *, workers: int = 1) -> dict[str, list[dict[str, Any]]]:
    """The log rows of each run by its name, all made in one group of processes, one after the other.

    A run with `until` stops after so many steps, with a checkpoint, from which a later one of its name goes on.
    """
    out = folder / f"rows-{time.monotonic_ns()}.json"
    given = [(run, _prepare(run, workers)) for run in runs]
    calm = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    before = dict(os.environ)
    os.environ.update(calm)
    try:
        multiprocessing.set_forkserver_preload(LIBRARIES)
        torch.multiprocessing.start_processes(
            _worker, (str(folder), workers, given, str(out)), nprocs=workers, start_method="forkserver"
        )
    finally:
        os.environ.clear()
        os.environ.update(before)
    return json.loads(out.read_text())


def _prepare(values: dict[str, Any], workers: int) -> dict[str, Any]:
    from ftray.config.schema import Run
    from ftray.store.paths import Storage
    from ftray.train.known import Known

    run = Run.model_validate(_on(values, workers))
    known = Known.of(run, Storage(run.storage))
    return {"data_key": known.data.key, "base": known.base, "packs": known.packs}


def _on(values: dict[str, Any], workers: int) -> dict[str, Any]:
    run = {key: value for key, value in values.items() if key != "until"}
    return {**run, "scale": {**run["scale"], "workers": workers}}


def _worker(rank: int, folder: str, workers: int, runs: list, out: str) -> None:
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(workers))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    dist.init_process_group("gloo", init_method=f"file://{out}.meet", rank=rank, world_size=workers)
    gc.freeze()  # what libraries made is not looked through after each run
    found: dict[str, list] = {}
    for values, known in runs:
        try:
            found.setdefault(values["name"], []).extend(_run(values, known, workers))
        except Exception as error:
            error.add_note(f"in {values}")
            raise
        gc.collect()
    if rank == 0:
        Path(out).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _logits(run: Any, model: Any) -> list:
    """What the model says of ASKED; a head alone, of the vectors that its base has for them."""
    from ftray.models.features import Text, load_reader, pooling_for

    was_training = model.training
    with torch.no_grad():
        if run.method.kind == "feature":
            pooling = pooling_for(run.model, run.method)
            read = load_reader(run.model, pooling=pooling, dtype=torch.float32, device="cpu")
            found = model.eval()(read([Text(ids) for ids in ASKED]))
        else:
            found = model.eval()(input_ids=torch.tensor(ASKED)).logits[:, -5:]
    model.train(was_training)
    return found.tolist()


def _run(values: dict[str, Any], known: dict[str, Any], workers: int) -> list[dict[str, Any]]:
    from transformers.integrations import deepspeed as integration

    from ftray.config.schema import Run
    from ftray.models.load import Shape, load_config
    from ftray.store.paths import Storage
    from ftray.store.runs import RunFolder
    from ftray.train import resolve
    from ftray.train.layout import Node
    from ftray.train.schedule import course
    from ftray.train.worker import Job, Worker

    integration.unset_hf_deepspeed_config()
    run, until = Run.model_validate(_on(values, workers)), values.get("until")
    shape = Shape.from_config(load_config(run.model))
    assert run.optim.steps
    assert isinstance(run.optim.lr, float)
    schedule = course(
        run.optim,
        lr=run.optim.lr,
        rows=24,
        seed=run.seed,
        checkpoint_every=run.scale.checkpoint_every,
        eval_every=run.evaluate.every,
        log_every=1,
    )
    job = Job(
        run=run.model_dump(mode="json"),
        layout=resolve.lay_out(run, nodes=[Node("here", cpus=workers)], shape=shape, packs=known["packs"]),
        schedule=schedule,
        born="",
        folder=run.name,
        data_key=known["data_key"],
        base=known["base"],
    )
    rows: list[dict[str, Any]] = []

    class Alone(Worker):
        """Without Ray, and with its log kept."""

        ASK_S = math.inf

        def _node(self):
            return ""

        def _report(self, metrics):
            pass

        def log(self, row):
            rows.append(row)

    worker = Alone(job, run, RunFolder(Storage(run.storage), run.name), time.monotonic())
    with worker.watched() as worker.watchdog:
        worker._build()
        first = worker._resume()
        worker._before(first)
        rows.append({"kind": "begun", "values": _logits(run, worker.model)})
        last = schedule.steps if until is None else until
        for step in range(first, last):
            worker._step(step)
        if until is not None:
            worker.keeper.take(worker.engine, worker.named, step=last, more=worker.objective.tensors())
        worker.keeper.finish()
        if until is None:
            worker._hand_over()
    for name in ("before", "after"):
        if (measured := worker._kept(f"{name}.json")) is not None:
            rows.append({"kind": name, **measured})
    rows.append({"kind": "logits", "values": _logits(run, worker.model)})
    worker.engine.destroy()
    return rows


def stand(folder: Path, values: dict[str, Any], *, seed: int = 5):
    """The objective of a run with its model, as a worker of this process alone has them once it is built; the adapter
    has learnt something, so that policy and base differ. A process group must be there."""
    from contextlib import nullcontext

    from ftray.config.schema import Run
    from ftray.data.pack import deal
    from ftray.data.prepare import open_prepared
    from ftray.models.adapt import adapt, trainable
    from ftray.models.load import load_base, load_tokenizer
    from ftray.objectives import OBJECTIVES
    from ftray.objectives.objective import Stage
    from ftray.store.paths import Storage

    run = Run.model_validate(_on(values, 1))
    data = open_prepared(Storage(run.storage), _prepare(values, 1)["data_key"])
    objective = OBJECTIVES[run.objective.kind](run.objective, packed=False, data=data)
    load = {"method": run.method, "dtype": torch.float32, "attention": "sdpa"}
    model = adapt(objective.load(run.model, **load), run.method, seed=run.seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.2 * torch.randn_like(parameter))
    whole, beside = objective.around(model)
    with torch.no_grad():
        for parameter in beside.values():
            parameter.add_(0.2 * torch.randn_like(parameter))

    def hands(lengths):
        return deal(lengths, workers=1, micro_batch_size=3, max_length=run.data.max_length, packed=False)[0]

    objective.stand(
        Stage(
            policy=model,
            whole=whole,
            tokenizer=load_tokenizer(run.model),
            seed=run.seed,
            synced=False,
            deal=hands,
            computing=nullcontext,
            another_base=lambda: load_base(run.model, **load).eval().requires_grad_(False),
        )
    )
    return objective, model, whole
