"""`ftray train`, `ftray check` and `ftray evaluate`, from the driver's side: everything that can be known is known
before workers start; then Ray Train places them, and what they leave in storage becomes a version and a report."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from ftray.config import load
from ftray.config.methods import Feature, MultitaskPrompt
from ftray.config.objectives import TokenClassification
from ftray.config.schema import Run
from ftray.data.order import epoch_rows
from ftray.data.report import DataReport
from ftray.errors import ConfigError, FtrayError, ModelError, Stopped
from ftray.evaluate.compare import check_gate
from ftray.evaluate.tasks import check_benchmarks
from ftray.models import chain, reward
from ftray.models.adapt import default_lr
from ftray.models.load import fingerprint
from ftray.ray_cluster import connect
from ftray.store.lease import Lease
from ftray.store.paths import Storage
from ftray.store.registry import Registry
from ftray.store.runs import RunFolder
from ftray.train import cluster, plan, resolve, room, scaling
from ftray.train.group import fit
from ftray.train.known import Known
from ftray.train.layout import Layout, Node
from ftray.train.publish import conclude, write_comparison
from ftray.train.schedule import Schedule, course

# What may differ when a run is resumed: where it runs and what is logged, not what is learnt.
MAY_CHANGE = {"scale", "track", "storage"}


@dataclass(frozen=True)
class Outcome:
    """What a run left. `version` is its id in the registry, `comparison` as of evaluate/compare.py.

    `tasks`: the version of each task, where several learnt together.
    """

    run: str
    version: str | None
    report: str | None
    comparison: dict[str, Any]
    seconds: float
    resumed: bool
    tasks: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckResult:
    """What `ftray check` found out. `ok`: the run fits what there is."""

    run: dict[str, Any]
    data: DataReport
    plan: plan.Plan
    layout: Layout
    schedule: Schedule
    settings: dict[str, Any]

    @property
    def ok(self) -> bool:
        return self.plan.fits

    def lines(self) -> list[str]:
        width = max(len(name) for name in self.settings)
        chosen = [f"  {name:<{width}}  {_shown(value)}" for name, value in self.settings.items()]
        return [*self.data.lines(), "", "Settings, auto ones resolved", *chosen, "", *self.plan.lines()]

    def to_json(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "data": self.data.to_json(),
            "plan": self.plan.to_json(),
            "settings": self.settings,
            "ok": self.ok,
        }


def train(run: Run, *, fresh: bool = False, as_json: bool = False) -> Outcome:
    """Run to the end, or resume it by name. Raises FtrayError for what the user can fix."""
    with cluster.quiet():
        return _train(run, fresh=fresh, say=_silent if as_json else _say, silent=as_json)


def check(run: Run) -> CheckResult:
    """Data, base, method and fit, on the cluster that `scale.address` or RAY_ADDRESS names, else on this machine."""
    with cluster.quiet():
        storage = _storage(run)
        run = based(run, RunFolder(storage, run.name))
        known = Known.of(run, storage)
        return work_out(run, known, room.nodes_in_sight(run.scale, storage))


def evaluate(run: Run, *, ref: str | None = None) -> Outcome:
    """Score a version against its base on the run's held-out rows, now. `ref`: the run's name unless given."""
    with cluster.quiet():
        began = time.monotonic()
        storage = _storage(run)
        version = Registry(storage).resolve(ref or run.name)
        run = chain.here(based(run, RunFolder(storage, run.name)), storage)
        if version.card.get("base_fingerprint") not in (None, fingerprint(run.model)):
            raise ModelError(
                f"model.base: {version.id} was tuned on {version.card['base']}, which is not what {run.model.base} is "
                "now; name the base, or the revision, that it was tuned on"
            )
        run = load.run_from({**run.model_dump(mode="json"), "method": version.card["method"]}, source=version.id)
        ray_ready = connecting(run.scale.address)
        known = Known.of(run, storage, ray_ready=ray_ready)
        ray_ready()
        checked = work_out(run, known, room.nodes_for(run.scale, silent=False))
        cluster.check_storage(storage)
        folder = RunFolder(storage, f"{run.name}.evaluation")  # no run's name has a dot
        with folder.lease() as lease:
            folder.begin({"run": checked.run, "settings": checked.settings, "base": known.base}, fresh=True)
            folder.set_state(status="evaluating")
            with _failure_noted(folder, lease):
                fit(run, storage, folder, known, checked, silent=False, version_key=version.key)
                report, comparison = write_comparison(run, storage, folder, checked=checked, version=version)
            folder.set_state(status="done", version=version.id, report=report, comparison=comparison)
        tasks = _tasks(run, version.id, storage)
        return Outcome(run.name, version.id, report, comparison, time.monotonic() - began, False, tasks)


def _train(run: Run, *, fresh: bool, say, silent: bool) -> Outcome:
    began = time.monotonic()
    storage = _storage(run)
    folder = RunFolder(storage, run.name)
    with folder.lease() as lease:
        run = based(run, folder, fresh=fresh)
        if not fresh and (finished := _finished(run, folder, began)):
            say(f"Run {run.name} is finished; `--fresh` starts it over.")
            return finished
        ray_ready = connecting(run.scale.address)
        known = Known.of(run, storage, ray_ready=ray_ready)
        ray_ready()
        checked = work_out(run, known, room.nodes_for(run.scale, silent=silent))
        cluster.check_storage(storage)
        say("\n".join(checked.lines()))
        if not checked.ok:
            say("This is predicted not to fit; it is tried all the same.")
        resolved = {"run": run.model_dump(mode="json"), "settings": checked.settings, "base": known.base}
        resumed = not fresh and folder.resolved() is not None
        folder.begin(resolved, fresh=fresh)
        folder.set_state(status="training", total_steps=checked.schedule.steps)
        with _failure_noted(folder, lease):
            fit(run, storage, folder, known, checked, silent=silent)
            lease.check()
            folder.set_state(status="evaluating")
            version, report, comparison = conclude(run, storage, folder, known=known, checked=checked)
        folder.set_state(
            status="done",
            step=checked.schedule.steps,
            version=version,
            report=report,
            comparison=comparison,
            error=None,
        )
        tasks = _tasks(run, version, storage)
        return Outcome(run.name, version, report, comparison, time.monotonic() - began, resumed, tasks)


@contextmanager
def _failure_noted(folder: RunFolder, lease: Lease) -> Iterator[None]:
    try:
        yield
    except FtrayError as error:
        if not lease.lost:  # else the folder is another driver's by now
            stopped = isinstance(error, Stopped)
            folder.set_state(status="stopped" if stopped else "failed", error=None if stopped else str(error))
        raise


def work_out(run: Run, known: Known, nodes: list[Node]) -> CheckResult:
    """The run on these nodes, with every `auto` resolved."""
    layout = resolve.lay_out(run, nodes=nodes, shape=known.shape, packs=known.packs, beside=known.beside)
    if layout.zero == 3 and run.evaluate.lm_eval.tasks:
        told = (
            "under ZeRO 3 workers cannot ask the model apart from each other; use scale.zero: 2, or take the tasks out"
        )
        raise ConfigError(run.name, [("evaluate.lm_eval.tasks", told)])
    lr = run.optim.lr
    if lr == "auto":
        tags = isinstance(run.objective, TokenClassification)
        usual = default_lr(run.method, known.shape.parameters, head=known.head is not None, tags=tags)
        lr = run.objective.pace * usual
    store = known.data.train
    schedule = course(
        run.optim,
        lr=lr,
        rows=epoch_rows(store, [source.weight for source in run.data.sources]),
        seed=run.seed,
        checkpoint_every=run.scale.checkpoint_every,
        eval_every=run.evaluate.every,
        log_every=run.track.log_every,
    )
    tokens = round(run.objective.tokens(store.tokens / max(1, len(store))) * run.optim.batch_size)
    predicted = plan.make(
        known.shape,
        method=run.method,
        layout=layout,
        optimizer=run.optim.optimizer,
        max_length=run.data.max_length,
        nodes=nodes,
        steps=schedule.steps,
        tokens_per_step=tokens,
    )
    if run.scale.checkpoint_every == "auto" and predicted.seconds:
        every = scaling.checkpoint_every(
            known.shape,
            method=run.method,
            workers=layout.workers,
            steps=schedule.steps,
            step_s=predicted.seconds / schedule.steps,
        )
        schedule = replace(schedule, checkpoint_every=every)
    settings = {
        "device": layout.device,
        "workers": layout.workers,
        "cpus_per_worker": layout.cpus_per_worker,
        "gpus_per_worker": layout.gpus_per_worker,
        "dtype": layout.dtype,
        "zero": layout.zero,
        "packing": layout.packing,
        "attention": layout.attention,
        "micro_batch_size": layout.micro_batch_size,
        "gradient_checkpointing": layout.gradient_checkpointing,
        "lr": schedule.lr,
        "steps": schedule.steps,
        "checkpoint_every": schedule.checkpoint_every,
        "eval_every": schedule.eval_every,
    }
    if isinstance(run.method, Feature):
        settings["features"] = _features(run, known, layout)
    return CheckResult(run.model_dump(mode="json"), known.data.report, predicted, layout, schedule, settings)


def _features(run: Run, known: Known, layout: Layout) -> str:
    from ftray.train import features

    storage = Storage(run.storage)
    model = chain.found(run.model, storage)
    stores = [known.data.train, known.data.eval]
    return features.told(run, storage, stores=stores, model=model, base=known.base, dtype=layout.dtype)


def _finished(run: Run, folder: RunFolder, began: float) -> Outcome | None:
    """The outcome, if this run was finished before; raises ConfigError when another run of this name was begun."""
    before = folder.resolved()
    if before is None:
        return None
    mine = run.model_dump(mode="json")
    if changed := _differences(Run.kept(before["run"]), mine):
        problems = [(key, f"was {old!r}, now {new!r}") for key, old, new in changed]
        way_out = f"run {run.name} was begun with other settings; `--fresh` starts it over, another name keeps both"
        raise ConfigError(run.name, [*problems, ("", way_out)])
    state = folder.state()
    if state.get("status") != "done":
        return None
    version = state.get("version")
    return Outcome(
        run=run.name,
        version=version,
        report=state.get("report"),
        comparison=state["comparison"],
        seconds=time.monotonic() - began,
        resumed=True,
        tasks=_tasks(run, version, folder.storage),
    )


def _tasks(run: Run, version: str | None, storage: Storage) -> dict[str, str]:
    """The version of each task that learnt in the same run, by the task's name."""
    if version is None or not isinstance(run.method, MultitaskPrompt):
        return {}
    return dict(Registry(storage).resolve(version).card.get("tasks", {}))


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    found = []
    for section in sorted(before.keys() | now.keys()):
        old, new = before.get(section), now.get(section)
        if section in MAY_CHANGE or old == new:
            continue
        if not isinstance(old, dict) or not isinstance(new, dict):
            found.append((section, old, new))
            continue
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key) and (section, key) != ("optim", "micro_batch_size"):
                found.append((f"{section}.{key}", old.get(key), new.get(key)))
    return found


def based(run: Run, folder: RunFolder, *, fresh: bool = False) -> Run:
    """The run with every version that it names by number: that which it began with, where it did."""
    before = folder.resolved() if not fresh and names_versions(run) else None
    return by_number(run, folder.storage, began=before["run"] if before else None)


def names_versions(run: Run) -> bool:
    return run.model.version is not None or bool(reward.named(run)) or run.begins_as is not None


def by_number(run: Run, storage: Storage, *, began: Mapping[str, Any] | None) -> Run:
    """The run with every version that it names by number; `began`: the run as it began earlier, whose numbers stay."""
    run = chain.pinned(run, storage, began=began["model"]["base"] if began else None)
    run = chain.pinned_prompt(run, storage, began=began["method"].get("begin") if began else None)
    return reward.pinned(run, storage, began=began)


def _storage(run: Run) -> Storage:
    check_gate(run.evaluate.rules)
    check_benchmarks(run)
    storage = Storage(run.storage)
    storage.probe()
    return storage


def connecting(address: str | None) -> Callable[[], None]:
    """Connect to Ray in a thread, while data is prepared; the returned function waits for it and raises its error."""
    problems: list[FtrayError] = []
    connected = threading.Event()

    def work() -> None:
        try:
            connect(address)
        except FtrayError as error:
            problems.append(error)
        finally:  # whatever happens, the main thread must not wait for ever
            connected.set()
        # A local cluster's processes are told to end with the thread that started them, so it never does.
        threading.Event().wait()

    def ready() -> None:
        connected.wait()
        if problems:
            raise problems[0]

    threading.Thread(target=work, name="ftray-connect", daemon=True).start()
    return ready


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _silent(text: str) -> None:
    pass
