"""Trials of one sweep, each alone or all in one pass, in real processes without Ray: what the fused tests compare.

python fused_drill.py <folder> <workers> <rank> <variants.json>
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Variant:
    """Trials, and how they are trained. Steps are those of the whole group.

    `run`: dotted keys of the run; `enters`: the step at which a trial comes; `leaves`: the step of its own after which
    it goes; `stops`: the group ends after so many steps; `store`: the variant that this one resumes.
    """

    name: str
    trials: Sequence[Mapping[str, Any]]
    together: bool = False
    run: Mapping[str, Any] = field(default_factory=dict)
    enters: Mapping[int, int] = field(default_factory=dict)
    leaves: Mapping[int, int] = field(default_factory=dict)
    stops: int = 1000
    store: str | None = None
    checkpoint_every: int = 100
    tokens: int = 4096
    width: int | None = None  # trials in every pass; none: as it measures


@dataclass(frozen=True)
class Trained:
    """What came of a trial: its loss by step (0: held-out loss at the end), what went wrong, and what it learnt."""

    losses: dict[int, float]
    problem: str | None
    learnt: dict[str, Any]


def drill(folder, variants, *, workers=1):
    """{(variant, trial): Trained}; runs the variants one after the other in one group of processes."""
    from safetensors.torch import load_file

    place = Path(folder) / f"variants-{workers}-{variants[0].name}.json"
    place.write_text(json.dumps([asdict(one) for one in variants]))
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), str(workers), str(rank), str(place)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(workers)
    ]
    told = [process.communicate(timeout=3600)[0] for process in started]
    for process, text in zip(started, told, strict=True):
        assert process.returncode == 0, text[-4000:]
    found = {}
    for variant in variants:
        for number, one in json.loads((Path(folder) / f"{variant.name}.json").read_text()).items():
            losses = {int(step): loss for step, loss in one["losses"].items()}
            learnt = load_file(Path(folder) / f"{variant.name}-{number}.safetensors")
            found[variant.name, int(number)] = Trained(losses, one["problem"], learnt)
    return found


def apart(one, other):
    """The largest difference of two sets of tensors, by name."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def main():
    import torch
    import torch.distributed as dist

    from ftray.sweep.solo import Bench

    folder, workers, rank, place = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(workers))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}.meet", rank=rank, world_size=workers)
    bench = Bench()
    for values in json.loads(place.read_text()):
        values |= {key: {int(n): step for n, step in values[key].items()} for key in ("enters", "leaves")}
        variant = Variant(**values)
        told = {}
        train = together if variant.together else alone
        for number, worker in train(planned(folder, workers, rank, variant), variant, bench):
            losses = {row["step"]: row["loss"] for row in worker.rows if row["kind"] == "train"}
            problem = next((row["text"] for row in worker.rows if row["kind"] == "problem"), None)
            told[number] = {"losses": losses | ({} if problem else {0: worker.measure()["loss"]}), "problem": problem}
            save(folder / f"{variant.name}-{number}.safetensors", worker, rank)
            worker.close()
        if rank == 0:
            (folder / f"{variant.name}.json").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()


def planned(folder, workers, rank, variant):
    """The trials' tasks. Rank 0 makes their folders; the others read what it made."""
    import torch.distributed as dist

    from ftray.config.sweeping import Sweep
    from ftray.store.paths import Storage
    from ftray.sweep.planning import Planner
    from ftray.sweep.records import SweepFolder
    from ftray.train.layout import Node

    storage = Storage(str(folder / "store"))
    run = {
        "name": "demo",
        "storage": storage.root,
        "model": {"base": str(folder / "base")},
        "data": {"sources": "builtin:orders", "eval_sources": "builtin:orders-eval", "max_length": 192, "eval_rows": 4},
        "optim": {"batch_size": 6},
        "scale": {"workers": workers, "cpus_per_worker": 1},
        "evaluate": {"gate": []},
        "track": {"to": []},
    }
    for dotted, value in variant.run.items():
        section, key = dotted.split(".")
        run[section] = {**run[section], key: value}
    space = {key: [one[key] for one in variant.trials] for key in variant.trials[0]}
    sweep = Sweep.model_validate({"name": "demo-sweep", "run": run, "space": space, "every": 0.001})
    tasks = {}
    for turn in range(2):
        if (turn == 0) == (rank == 0):
            planner = Planner(sweep, storage, [Node("here", cpus=float(workers))])
            sweeping = SweepFolder(storage, variant.store or variant.name)
            if rank == 0:
                sweeping.begin({}, fresh=variant.store is None)
            for number, values in enumerate(variant.trials):
                task = planner.task(planner.record(number, values), sweeping)
                schedule = replace(task.job.schedule, checkpoint_every=variant.checkpoint_every)
                layout = replace(task.job.layout, zero=0) if variant.together else task.job.layout
                tasks[number] = replace(task, job=replace(task.job, schedule=schedule, layout=layout))
        dist.barrier()
    return tasks


def alone(tasks, variant, bench):
    """One trial after the other, as an ordinary sweep trains them."""
    from ftray.sweep.solo import open_trial

    for number, task in tasks.items():
        worker = open_trial(task.job, bench, metric="loss")
        worker.begin()
        try:
            worker.advance(min(variant.leaves.get(number, 1000), worker.schedule.steps))
        except Exception as error:
            worker.log({"kind": "problem", "text": str(error)})
        yield number, worker


def together(tasks, variant, bench):
    """All in one pass, each from the step at which it enters, to its end or to where it leaves."""
    from ftray.sweep.solo import Banked, open_trial
    from ftray.train.together import Pace, Together

    class Fixed(Pace):
        def __init__(self, trials):
            super().__init__()
            self.trials = trials

        def width(self, trials):
            return min(self.trials, trials)

    live, done, group = {}, {}, None
    for step in range(variant.stops):
        for number, task in tasks.items():
            if variant.enters.get(number, 0) <= step and number not in live and number not in done:
                worker = open_trial(task.job, bench, metric="loss", kind=Banked)
                worker.begin()
                if group is None:
                    pace = Pace() if variant.width is None else Fixed(variant.width)
                    group = Together(worker.base_for_all(), tokens=variant.tokens, device=worker.device, pace=pace)
                group.enter(worker)
                live[number] = worker
        workers = list(live.values())
        problems = group.step(workers, [worker.at for worker in workers]) if workers else []
        for number, worker, problem in zip(list(live), workers, problems, strict=True):
            worker.at += 1
            if problem is not None:
                worker.log({"kind": "problem", "text": str(problem)})
            if problem is not None or worker.at >= min(variant.leaves.get(number, 1000), worker.schedule.steps):
                group.leave(worker)
                done[number] = live.pop(number)
        if len(done) == len(tasks):
            break
    for number, worker in sorted([*done.items(), *live.items()]):
        if worker.keeper.waiting:
            worker.keeper.finish()
        yield number, worker


def save(place, worker, rank):
    from safetensors.torch import save_file

    from ftray.train import state

    values = dict(state.gather(worker.engine, worker.named))
    if rank == 0:
        save_file({name: tensor.clone().contiguous() for name, tensor in values.items()}, place)


if __name__ == "__main__":
    main()
