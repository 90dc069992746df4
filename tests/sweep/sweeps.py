"""Sweeps without files: what the tests of this folder vary."""

from ftray.config.sweeping import Sweep
from ftray.sweep.records import DONE, End, Record

RUN = {"name": "demo", "data": {"sources": "builtin:orders"}, "optim": {"epochs": 2}}


def sweep(space=None, *, run=None, **keys):
    space = space or {"optim.lr": {"kind": "loguniform", "low": 1e-4, "high": 1e-2}, "method.rank": [4, 8, 16]}
    return Sweep.model_validate({"name": "demo-sweep", "run": run or RUN, "space": space, **keys})


def report(iteration, loss, *, at=0.0):
    scores = {"loss": loss}
    row = {"kind": "report", "step": iteration, "epoch": float(iteration), "iteration": iteration, "scores": scores}
    return {**row, "seconds": 2.0 * iteration, "lr": 1e-3, "at": at}


def record(number, *losses, status=DONE, values=None, at=0.0, of=None, parameters=100, reason=""):
    """A trial that reported these losses."""
    told = tuple(report(place, loss, at=at + place) for place, loss in enumerate(losses, start=1))
    end = End(status, reason, {"loss": losses[-1]} if losses and status == DONE else {}, at=at) if status else None
    values = {"optim.lr": 1e-3, "method.rank": 4} if values is None else values
    return Record(number, values, 42, of, parameters, 3.0, end, told)
