"""Trials of one sweep, each alone or all in one pass, in real processes without Ray: what the fused tests compare.

    python fused_drill.py <folder> <workers> <rank> <orders.json>

`orders`: {"name", "run", "trials": [{"method", "optim", "seed"}], "together": bool, "enters": {trial: step of the first},
"leaves": {trial: step}, "stop_after": steps, "tokens"}. Writes <name>-<rank>.json with the losses of each step, and the
learnt tensors to <name>-<trial>.safetensors.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROWS = 26


def write_base(folder):
    """A Llama of two layers over the built-in tokenizer, with sizes that NF4 takes."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    import ftray

    tokenizer = AutoTokenizer.from_pretrained(Path(ftray.__file__).parent / "models" / "tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def drill(folder, *, workers=1, **orders):
    """The losses of every trial, {number: {step: loss}}; runs the processes and waits for them."""
    place = Path(folder) / f"{orders['name']}.orders.json"
    place.write_text(json.dumps(orders))
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), str(workers), str(rank), str(place)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(workers)
    ]
    told = [process.communicate(timeout=900)[0] for process in started]
    for process, text in zip(started, told, strict=True):
        assert process.returncode == 0, text[-4000:]
    found = json.loads((Path(folder) / f"{orders['name']}-0.json").read_text())
    return {int(number): {int(step): loss for step, loss in one.items()} for number, one in found.items()}


def weights(folder, name, number):
    from safetensors.torch import load_file

    return load_file(Path(folder) / f"{name}-{number}.safetensors")


def apart(one, other):
    """The largest difference of two sets of tensors, by name."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def main():
    import os

    folder, workers, rank, orders = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), json.loads(Path(sys.argv[4]).read_text())
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(workers))
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/{orders['name']}.meet", rank=rank, world_size=workers)
    tasks = planned(folder, workers, rank, orders)
    train = together if orders.get("together") else alone
    losses = {}
    for number, worker in train(tasks, orders):
        losses[number] = {row["step"]: row["loss"] for row in worker.rows if row["kind"] == "train"}
        losses[number] |= {0: worker.measure()["loss"]}
        save(folder, orders["name"], number, worker, rank)
        worker.close()
    (folder / f"{orders['name']}-{rank}.json").write_text(json.dumps(losses))
    dist.barrier()
    dist.destroy_process_group()


def planned(folder, workers, rank, orders):
    """The trials' tasks. Rank 0 makes their folders; the others read what it made."""
    from dataclasses import replace

    import torch.distributed as dist

    from ftray.config.sweeping import Sweep
    from ftray.store.paths import Storage
    from ftray.sweep.planning import Planner
    from ftray.sweep.records import SweepFolder
    from ftray.train.layout import Node

    root = folder / "store" / orders.get("store", orders["name"])
    run = {
        "name": "demo",
        "storage": str(root),
        "model": {"base": str(folder / "base")},
        "data": {"sources": "builtin:orders", "eval_sources": "builtin:orders-eval", "max_length": 192, "eval_rows": 4},
        "optim": {"steps": 4, "batch_size": 6},
        "scale": {"workers": workers, "cpus_per_worker": 1},
        "evaluate": {"gate": []},
        "track": {"to": []},
    }
    for dotted, value in orders.get("run", {}).items():
        section, key = dotted.split(".")
        run[section] = {**run.get(section, {}), key: value}
    trials = orders["trials"]
    space = {key: [one[key] for one in trials] for key in trials[0]}
    sweep = Sweep.model_validate({"name": "demo-sweep", "run": run, "space": space, "every": 0.001})
    tasks = {}
    for turn in range(2):  # rank 0 first
        if (turn == 0) == (rank == 0):
            planner = Planner(sweep, Storage(str(root)), [Node("here", cpus=float(workers))])
            sweeping = SweepFolder(Storage(str(root)), "demo-sweep")
            if rank == 0:
                sweeping.begin({}, fresh=not orders.get("resumes"))
            for number, values in enumerate(trials):
                record = planner.record(number, values)
                task = planner.task(record, sweeping)
                every = orders.get("checkpoint_every", 100)
                job = replace(task.job, schedule=replace(task.job.schedule, checkpoint_every=every))
                if orders.get("together"):
                    job = replace(job, layout=replace(job.layout, zero=0))
                tasks[number] = replace(task, job=job)
        dist.barrier()
    return tasks


def alone(tasks, orders):
    """One trial after the other, as an ordinary sweep trains them."""
    from ftray.sweep.solo import Bench, open_trial

    bench = Bench()
    for number, task in tasks.items():
        worker = open_trial(task.job, bench, metric="loss")
        worker.begin()
        worker.advance(orders.get("leaves", {}).get(str(number), worker.schedule.steps))
        yield number, worker


def together(tasks, orders):
    """All in one pass, each from the step at which it enters, to its end or to where it leaves."""
    from ftray.sweep.solo import Banked, Bench, open_trial
    from ftray.train.together import Together

    bench, live, done, bank = Bench(), {}, {}, None
    enters, leaves = orders.get("enters", {}), orders.get("leaves", {})
    for step in range(orders.get("stop_after", 1000)):
        for number, task in tasks.items():
            if enters.get(str(number), 0) <= step and number not in live and number not in done:
                worker = open_trial(task.job, bench, metric="loss", kind=Banked)
                worker.begin()
                if bank is None:
                    bank = Together(worker.base_for_all(), tokens=orders.get("tokens", 4096), device=worker.device)
                bank.enter(worker)
                live[number] = worker
        if not live and len(done) == len(tasks):
            break
        workers = list(live.values())
        problems = bank.step(workers, [worker.at for worker in workers])
        for number, worker, problem in zip(list(live), workers, problems, strict=True):
            worker.at += 1
            if problem is not None:
                worker.log({"kind": "problem", "text": str(problem)})
            if problem is not None or worker.at >= leaves.get(str(number), worker.schedule.steps):
                if worker.keeper.waiting:
                    worker.keeper.finish()
                bank.leave(worker)
                done[number] = live.pop(number)
    for worker in live.values():
        if worker.keeper.waiting:
            worker.keeper.finish()
    yield from sorted([*done.items(), *live.items()])


def save(folder, name, number, worker, rank):
    from safetensors.torch import save_file

    from ftray.train import state

    values = dict(state.gather(worker.engine, worker.named))
    if rank == 0:
        save_file({n: t.clone().contiguous() for n, t in values.items()}, folder / f"{name}-{number}.safetensors")


if __name__ == "__main__":
    main()
