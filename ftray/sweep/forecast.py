"""What a sweep will take: `ftray sweep --check`, and the first lines of a sweep. Nothing has started yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ftray.train.plan import human_bytes, human_seconds, human_worker

if TYPE_CHECKING:
    from ftray.sweep.planning import Planner


@dataclass(frozen=True)
class Forecast:
    """`shortest` and `longest`: seconds of one trial's training; `total`: of all trials to their ends, so many beside
    each other; None for a GPU whose speed is not known. `memory`, `room`: predicted bytes of one worker with the
    largest trial, and what it has, 0 where that is not known. `notes`: how trials share the cluster."""

    sweep: str
    trials: int
    parallel: int
    workers: int
    cpus: float
    gpus: float
    shortest: float | None
    longest: float | None
    total: float | None
    stops: bool
    memory: int
    room: int
    ok: bool
    fused: bool
    notes: Sequence[str]

    @classmethod
    def of(cls, planner: Planner) -> Forecast:
        """By the trials at the corners of the space, which the planner has checked."""
        sweep, times = planner.sweep, planner.times()
        largest = max((one.checked.plan for one in planner.corners), key=lambda plan: plan.memory.total)
        memory, room = largest.memory.total, largest.device_bytes
        if planner.fusing is not None:
            memory, room = planner.fusing.total, planner.fusing.room
        return cls(
            sweep=sweep.name,
            trials=sweep.count,
            parallel=planner.parallel,
            workers=planner.workers,
            cpus=planner.cpus,
            gpus=planner.gpus,
            shortest=min(times, default=None),
            longest=max(times, default=None),
            total=max(max(times), sum(times) / len(times) * sweep.count / planner.beside) if times else None,
            stops=sweep.stopping.kind in ("asha", "median"),
            memory=memory,
            room=room,
            ok=largest.fits,
            fused=planner.fusing is not None,
            notes=planner.notes(),
        )

    def lines(self) -> list[str]:
        """For the terminal."""
        verdict = "" if self.ok else ", which does not fit; it is tried all the same"
        of = f" of {human_bytes(self.room)}{verdict}" if self.room else ""
        needs = f"one trial: {self._place()}, {self._each()}, {human_bytes(self.memory)}{of} predicted"
        return [
            f"sweep {self.sweep}: {self.trials} trials, {self.parallel} at a time",
            *self.notes,
            f"one trial alone: {self._each()}" if self.fused else needs,
            f"together: {self._all()}",
        ]

    def _place(self) -> str:
        each = human_worker(cpus=self.cpus, gpus=self.gpus)
        return each if self.workers == 1 else f"{self.workers} workers with {each} each"

    def _each(self) -> str:
        if self.shortest is None or self.longest is None:
            return "time not known for this GPU"
        ends = list(dict.fromkeys([human_seconds(self.shortest), human_seconds(self.longest)]))
        return f"about {' to '.join(ends)} of training"

    def _all(self) -> str:
        if self.total is None:
            return "time not known for this GPU"
        sooner = ", less what stops early" if self.stops else ""
        return f"about {human_seconds(self.total)} of training{sooner}, and scoring"

    def to_json(self) -> dict[str, Any]:
        """Plain data; bytes and seconds."""
        return asdict(self)
