"""Whether a sweep's trials can share passes over one base, and how many at a time: by memory, before anything starts.

Trials can that are plain LoRA over the same base, data and batch: they may differ in rank, alpha, dropout, layers,
seed, length and everything about the rate. What differs otherwise would change what they compute together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftray.config.schema import Lora, Pretrain, Run, Sft
from ftray.config.sweeping import Pbt, Sweep, Tpe
from ftray.train import memory, plan
from ftray.train.layout import Layout, Node

if TYPE_CHECKING:
    from ftray.models.load import Shape
    from ftray.sweep.planning import Planned

MOST = 16
"""Trials in one group: more share nothing more, and what stops bad trials would learn of them later."""
FEWEST = 4
"""Trials that a further group is worth its own copy of the base for."""
GROUP_CPUS = 16
CPU_TOKENS = 2048
"""Of one pass on CPUs, if no trial's own micro-batch has more: its products are as fast as larger ones, and what they
leave for the backward pass is what fills memory."""


@dataclass(frozen=True)
class Fusing:
    """Worker groups, trials in each at a time, and tokens in one pass at most. Bytes of one worker: `total` predicted,
    `room` what it has, 0 where that is not known."""

    groups: int
    seats: int
    tokens: int
    total: int
    room: int

    def line(self, *, workers: int, cpus: float, gpus: float) -> str:
        """For the terminal."""
        group = "one worker group" if self.groups == 1 else f"each of {self.groups} worker groups"
        size = f"{workers} worker{'s' if workers > 1 else ''} with {plan.human_worker(cpus=cpus, gpus=gpus)}"
        of = f" of {plan.human_bytes(self.room)}" if self.room else ""
        return (
            f"fused: {self.seats} trials at a time over one base in {group} ({size}), at most {self.tokens:,} tokens a "
            f"pass, {plan.human_bytes(self.total)}{of} predicted"
        )


def why_not(sweep: Sweep, planned: Sequence[Planned], config: Any) -> str | None:
    """What keeps the trials from sharing passes, with the key; None: nothing. `config`: the base's configuration."""
    return next(_reasons(sweep, planned, config), None)


def _reasons(sweep: Sweep, planned: Sequence[Planned], config: Any) -> Iterator[str]:
    if isinstance(sweep.stopping, Pbt):
        yield "stopping: pbt copies weights between trials"
    if sweep.count < 2 or sweep.parallel == 1:
        yield "one trial runs at a time"
    runs = [one.run for one in planned]
    for run in runs:
        yield from _of_run(run)
    for key, values in _shared(planned).items():
        if any(value != values[0] for value in values):
            yield f"{key} differs between trials"
    if any(one.checked.layout.gradient_checkpointing for one in planned) and _drops(runs):
        yield "method.dropout is drawn twice under scale.gradient_checkpointing"
    yield from _of_base(config)
    yield from _of_targets([run.method for run in runs], config)


def _of_targets(methods: Sequence[Any], config: Any) -> Iterator[str]:
    if all(method.targets == "auto" for method in methods):
        return
    from ftray.models.adapt import lora_targets
    from ftray.models.load import linear_modules, meta_model

    base = meta_model(config)
    linear = linear_modules(base)
    for method in methods:
        if others := sorted(lora_targets(base, method).keys() - linear.keys()):
            yield f"method.targets: {others[0]} does not see the rows of a pass as a block's layers do"


def _of_run(run: Run) -> Iterator[str]:
    method = run.method
    if not isinstance(run.objective, Sft | Pretrain):
        yield f"objective.kind: {run.objective.kind} is no language modelling"
    if not isinstance(method, Lora):
        yield f"method.kind: {method.kind} is no LoRA"
        return
    if method.dora:
        yield "method.dora reads the base's weights anew"
    if method.init == "pissa":
        yield "method.init: pissa changes the base"
    if method.modules_to_save:
        yield "method.modules_to_save learns weights of the base"
    if method.bits == 8:
        yield "method.bits: 8 rounds by what else is in a batch"
    if run.scale.zero not in ("auto", 0) or run.scale.offload != "none":
        yield "scale.zero and scale.offload share out what is small here"


def _shared(planned: Sequence[Planned]) -> dict[str, list[Any]]:
    """What must be equal, by key."""
    runs, layouts = [one.run for one in planned], [one.checked.layout for one in planned]
    found: dict[str, list[Any]] = {
        "model": [run.model for run in runs],
        "method.bits": [getattr(run.method, "bits", None) for run in runs],
        "optim.batch_size": [run.optim.batch_size for run in runs],
        "scale.workers": [run.scale.workers for run in runs],
    }
    for section in ("data", "objective"):
        found[section] = [getattr(run, section) for run in runs]
    for name in ("packing", "attention", "gradient_checkpointing"):
        found[name] = [getattr(layout, name) for layout in layouts]
    return found


def _drops(runs: Iterable[Run]) -> bool:
    return any(getattr(run.method, "dropout", 0.0) for run in runs)


def _of_base(config: Any) -> Iterator[str]:
    text = config.get_text_config()
    for name, value in text.to_dict().items():
        if isinstance(value, float) and value and ("dropout" in name or name.endswith("pdrop")):
            yield f"the base has dropout of its own ({name}), whose draws trials would share"
        if name in ("num_experts", "num_local_experts", "n_routed_experts") and value and value > 1:
            yield "the base is a mixture of experts, which sorts the tokens of several trials together"


def fit(sweep: Sweep, planned: Sequence[Planned], nodes: Sequence[Node], *, room: int) -> Fusing | str:
    """How many trials share passes, where the cluster has room for so many groups; or why none do. The largest trial
    counts."""
    largest = max(planned, key=lambda one: one.parameters)
    run, layout, shape = largest.run, largest.checked.layout, largest.known.shape
    each = largest.parameters * (4 + 4 + int(memory.ADAM[run.optim.optimizer]))
    given: dict[str, Any] = {"method": run.method, "optimizer": run.optim.optimizer, "max_length": run.data.max_length}
    one = memory.predict(shape, layout=layout, **given).total
    have = plan.device_bytes(layout, nodes)
    groups = max(1, min(room, sweep.count // FEWEST))
    most = min(MOST, -(-(sweep.parallel or sweep.count) // groups), -(-sweep.count // groups))
    if isinstance(sweep.search, Tpe):
        most = min(most, max(2, sweep.search.startup))  # what it learns from are trials that have ended
    if have:
        most = min(most, 1 + max(0, int((plan.USABLE * have - one) // each)))
    if most < 2:
        return "one trial runs at a time" if not have or one <= plan.USABLE * have else "memory is full with one trial"
    micro = layout.micro_batch_size
    if layout.device == "cuda" and have:
        micro = max(micro, _wider(shape, layout, given, have - (most - 1) * each, most * micro))
    tokens = micro * run.longest
    if layout.device == "cpu":
        tokens = min(tokens, CPU_TOKENS)
    return Fusing(groups, most, tokens, one + (most - 1) * each, have)


def _wider(shape: Shape, layout: Layout, given: dict[str, Any], have: float, examples: int) -> int:
    """Examples of a pass on a GPU: as many of all trials' as fit."""
    found = plan.largest_micro_batch(
        shape, layout=layout, **given, device_bytes=int(have), per_worker_examples=examples
    )
    return found or 1
