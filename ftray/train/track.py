"""Trackers by name: each turns metric rows into its own calls. They run in the driver, so workers need none of them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ftray.config.schema import Run
from ftray.errors import ConfigError
from ftray.store.paths import Storage

Sink = Callable[[list[dict[str, Any]]], None]
KINDS = ("train", "eval")


def open_trackers(run: Run, storage: Storage, run_key: str, stack: ExitStack, *, first: int) -> list[Sink]:
    """One sink per tracker of the run; `stack` closes them. `first`: steps done before, so curves are not doubled."""
    return [TRACKERS[name](run, storage, run_key, stack, first) for name in run.track.to]


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """The row's numbers under slashed names, e.g. train/loss; empty for rows that are no metrics."""
    if row["kind"] not in KINDS:
        return {}
    return {
        f"{row['kind']}/{name}": float(value)
        for name, value in row.items()
        if name != "step" and isinstance(value, (int, float))
    }


def _tensorboard(run: Run, storage: Storage, run_key: str, stack: ExitStack, first: int) -> Sink:
    from tensorboardX import SummaryWriter

    local = storage.local_path(f"{run_key}/tensorboard")
    folder = local or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ftray-tensorboard-")))
    if local is None:
        stack.callback(lambda: storage.upload(folder, f"{run_key}/tensorboard"))
    writer = SummaryWriter(str(folder), purge_step=first + 1 if first else None)
    stack.callback(writer.close)

    def sink(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            for name, value in numbers(row).items():
                writer.add_scalar(name, value, row["step"])
        writer.flush()

    return sink


def _mlflow(run: Run, storage: Storage, run_key: str, stack: ExitStack, first: int) -> Sink:
    mlflow = _imported("mlflow")
    if run.track.mlflow_uri:
        mlflow.set_tracking_uri(run.track.mlflow_uri)
    mlflow.set_experiment(run.track.project)
    known = mlflow.search_runs(filter_string=f"tags.`mlflow.runName` = '{run.name}'", output_format="list")
    resumed = known[0].info.run_id if known and first else None
    stack.enter_context(mlflow.start_run(run_id=resumed, run_name=None if resumed else run.name))
    if not resumed:
        mlflow.log_params({f"{s}.{k}": v for s in ("optim", "method") for k, v in getattr(run, s).model_dump().items()})

    def sink(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            if values := numbers(row):
                mlflow.log_metrics(values, step=row["step"])

    return sink


def _wandb(run: Run, storage: Storage, run_key: str, stack: ExitStack, first: int) -> Sink:
    wandb = _imported("wandb")
    live = wandb.init(project=run.track.project, name=run.name, id=run.name, resume="allow", config=run.model_dump())
    stack.callback(live.finish)

    def sink(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            if values := numbers(row):
                live.log(values, step=row["step"])

    return sink


def _imported(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        problem = f"{name} is not installed; `pip install 'ftray[trackers]'`, or leave {name} out"
        raise ConfigError("track.to", [("track.to", problem)]) from error


TRACKERS: dict[str, Callable[..., Sink]] = {"tensorboard": _tensorboard, "mlflow": _mlflow, "wandb": _wandb}
