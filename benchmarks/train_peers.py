"""The peers of benchmarks/train.py, each in a process of its own: `train_peers.py SPEC OUT` writes its figures to OUT.

`rows` tokenises once and saves the examples of every step; `trl` is a plain SFTTrainer script on those, `trainer` the
same with transformers' Trainer; `padded` and `default` are ftray by its public entry, `ftray.train.launch.train`, which
finds the same rows prepared.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

STARTED = float(os.environ.get("BENCHMARK_STARTED", time.time()))
NEVER = 500  # steps between checkpoints: TRL's default, more than a benchmark has


def main() -> None:
    spec, out = json.loads(sys.argv[1]), Path(sys.argv[2])
    figures = {"rows": rows, "trl": hugging_face, "trainer": hugging_face, "padded": ftray, "default": ftray}[
        spec["peer"]
    ](spec)
    out.write_text(json.dumps(figures))


def usage() -> dict[str, float]:
    """Now, and what this process has used: processor time of all its threads, and its largest resident memory.

    VmHWM is ru_maxrss of this program alone; ru_maxrss begins with that of the process it was forked from.
    """
    used = resource.getrusage(resource.RUSAGE_SELF)
    peak = next((line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")), None)
    return {
        "at": time.time(),
        "processor": used.ru_utime + used.ru_stime,
        "peak": int(peak.split()[1]) * 1024 if peak else used.ru_maxrss * 1024,
    }


# -------------------------------------------------------------------------------------------------------- hugging face


def hugging_face(spec: dict[str, Any]) -> dict[str, Any]:
    """TRL (or the plain Trainer) at its defaults, but for what must be equal: precision, rate, order, batch."""
    import numpy as np
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    if spec["peer"] == "trl":
        from trl import SFTConfig as Arguments
        from trl import SFTTrainer as Trainer

        own = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    else:
        from transformers import DataCollatorForSeq2Seq, Trainer
        from transformers import TrainingArguments as Arguments

        own = {}
    imported = time.time()
    torch.set_num_threads(spec["threads"])
    data = np.load(spec["rows"])
    cuts = np.cumsum(data["lengths"])[:-1]
    ids = np.split(data["ids"], cuts)
    labels = np.split(np.where(data["trained"], data["ids"], -100), cuts)
    dataset = Dataset.from_dict({"input_ids": ids, "labels": labels})
    per_device = Arguments.per_device_train_batch_size
    config = Arguments(
        output_dir=str(Path(spec["storage"]).with_name("trl")),
        gradient_accumulation_steps=spec["batch_size"] // per_device,
        max_steps=spec["steps"],
        learning_rate=spec["lr"],
        lr_scheduler_type="constant",
        seed=spec["seed"],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,  # ftray has it off on CPUs; on, it would cost TRL about a fifth
        train_sampling_strategy="sequential",
        logging_steps=1,
        disable_tqdm=True,
        report_to="none",
        **own,
    )
    tokenizer = AutoTokenizer.from_pretrained(spec["base"])
    model = AutoModelForCausalLM.from_pretrained(spec["base"], dtype=torch.float32)
    if spec["method"]["kind"] == "lora":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(spec["seed"])  # A is drawn as ftray draws it
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.0, target_modules=targets)
        model = get_peft_model(model, lora)
    stamps, losses = [], []

    class Stamp(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            stamps.append(usage())

        def on_step_end(self, *args, **kwargs):
            stamps.append(usage())

        def on_log(self, args, state, control, logs, **kwargs):
            if "loss" in logs:
                losses.append(logs["loss"])

    trainer = Trainer(
        model=model,
        args=config,
        train_dataset=dataset,
        processing_class=tokenizer,
        data_collator=None if spec["peer"] == "trl" else DataCollatorForSeq2Seq(tokenizer),
        callbacks=[Stamp()],
    )
    trainer.train()
    return {
        "losses": losses,
        "tokens": data["lengths"].reshape(spec["steps"], -1).sum(1).tolist(),
        **steps(stamps),
        "start": {
            "imports": imported - STARTED,
            "build": stamps[0]["at"] - imported,
            "first step": stamps[1]["at"] - stamps[0]["at"],
        },
        "settings": {
            "per_device": config.per_device_train_batch_size,
            "accumulation": config.gradient_accumulation_steps,
            "attention": model.config._attn_implementation,
            "optim": getattr(config.optim, "value", config.optim),
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
        },
    }


def steps(stamps: list[dict[str, float]]) -> dict[str, Any]:
    """Differences of the stamps at the beginning and after each step."""
    pairs = list(pairwise(stamps))
    return {
        "wall_s": [after["at"] - before["at"] for before, after in pairs],
        "processor_s": [after["processor"] - before["processor"] for before, after in pairs],
        "peak_bytes": int(stamps[-1]["peak"]),
    }


# -------------------------------------------------------------------------------------------------------------- ftray


class Stamped:
    """Stands in for the worker's event actor and adds this process's use to each row: measured where training runs."""

    def __init__(self, events):
        self.events, self.put = events, self

    def remote(self, row: dict[str, Any]) -> None:
        import torch

        self.events.put.remote(row | {"usage": usage(), "threads": torch.get_num_threads()})


def stamped_entry(values: dict[str, Any]) -> None:
    from ftray.train.worker import train_loop

    began = usage()
    job = values["job"]
    events = Stamped(job.events)
    job.events.put.remote({"kind": "entered", "step": 0, "usage": began})
    train_loop(replace(job, events=events))


def ftray(spec: dict[str, Any]) -> dict[str, Any]:
    import ray.cloudpickle

    from ftray.store.paths import Storage
    from ftray.store.runs import RunFolder
    from ftray.train import cluster, group, launch

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    group.entry = stamped_entry
    imported = time.time()
    ready = []
    connect = cluster.connect

    def timed_connect(address):
        connect(address)
        ready.append(time.time())

    cluster.connect = timed_connect
    fit = launch.fit
    fitted = []

    def timed_fit(*args, **kwargs):
        fitted.append(time.time())
        return fit(*args, **kwargs)

    launch.fit = timed_fit
    run = run_of(spec)
    launch.train(run, fresh=True, as_json=True)
    metrics = RunFolder(Storage(run.storage), run.name).metrics()
    entered, started = (next(row for row in metrics if row["kind"] == kind) for kind in ("entered", "started"))
    trained = [row for row in metrics if row["kind"] == "train"]
    scored = next((row for row in metrics if row["kind"] == "phase"), started)
    resolved = RunFolder(Storage(run.storage), run.name).resolved()["settings"]
    first = trained[0]["usage"]["at"] - trained[0]["seconds"]
    return {
        "losses": [row["loss"] for row in trained],
        "tokens": [row["tokens"] for row in trained],
        **steps([{"at": first, "processor": scored["usage"]["processor"], "peak": 0}, *(r["usage"] for r in trained)]),
        "start": {
            "imports": imported - STARTED,
            "ray": ready[0] - imported,
            "checks": max(0.0, fitted[0] - ready[0]),
            "workers": entered["usage"]["at"] - fitted[0],
            "build": started["usage"]["at"] - entered["usage"]["at"],
            "scores": first - started["usage"]["at"],
            "first step": trained[0]["usage"]["at"] - first,
        },
        "settings": {name: resolved[name] for name in ("micro_batch_size", "packing", "attention", "zero", "dtype")}
        | {"threads": trained[0]["threads"]},
    }


def run_of(spec: dict[str, Any]):
    """The run file of a benchmark: what is compared, and nothing that TRL does not do meanwhile (scores, answers)."""
    from ftray.config.schema import Run

    return Run.model_validate(
        {
            "name": "benchmark",
            "storage": spec["storage"],
            "seed": spec["seed"],
            "model": {"base": spec["base"], "dtype": "fp32"},
            "data": {
                "sources": [spec["source"]],
                "eval_fraction": 0,
                "max_length": spec["max_length"],
                "packing": "off" if spec["peer"] == "padded" else "auto",
            },
            "method": spec["method"],
            "optim": {
                "lr": spec["lr"],
                "steps": spec["steps"],
                "schedule": "constant",
                "warmup": 0,
                "batch_size": spec["batch_size"],
            },
            "scale": {"cpus_per_worker": spec["threads"], "address": "local", "checkpoint_every": NEVER},
            "evaluate": {"every": 0, "generate_rows": 0, "forgetting": False, "gate": []},
        }
    )


# --------------------------------------------------------------------------------------------------------------- rows


def rows(spec: dict[str, Any]) -> dict[str, Any]:
    """The examples of every step, in ftray's order, saved for the script that has none of ftray."""
    import numpy as np

    from ftray.store.paths import Storage
    from ftray.train.known import Known
    from ftray.train.schedule import Windows, course

    run = run_of(spec)
    store = Known.of(run, Storage(run.storage)).data.train
    schedule = course(
        run.optim, lr=spec["lr"], rows=len(store), seed=run.seed, checkpoint_every=NEVER, eval_every=0, log_every=1
    )
    windows = Windows(store, [1.0], schedule)
    wanted = [int(row) for step in range(spec["steps"]) for row in windows.rows(step)]
    np.savez(
        spec["rows"],
        ids=np.concatenate([store.ids(row) for row in wanted]).astype(np.int64),
        trained=np.concatenate([store.trained(row) for row in wanted]),
        lengths=np.array([len(store.ids(row)) for row in wanted]),
    )
    return {"rows": len(wanted)}


if __name__ == "__main__":
    main()
