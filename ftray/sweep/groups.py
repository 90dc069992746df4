"""Worker groups that each train many trials together, from the driver's side: placed, given trials, restarted.

What Tune's controller is to trials of their own processes, this is to trials that share one: it asks the drive what is
next, hands reports to Tune's schedulers, and tells the drive how trials end.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ftray.errors import ClusterError
from ftray.sweep.engine import silence
from ftray.sweep.task import Task

if TYPE_CHECKING:
    from ftray.sweep.engine import Drive

ASK_S = 2.0  # between looks at whether the sweep is still this driver's
STOP = "STOP"  # Tune's word


@dataclass
class _Told:
    """A live trial: Tune's name for it, and the step of the last report that was passed on."""

    trial_id: str
    step: int = 0
    losses: int = 0  # processes that it has lost


@dataclass
class _Group:
    """One worker group. `live`: its trials by number; `asked`: what its processes are working on."""

    members: list[Any]
    placed: Any
    live: dict[int, _Told] = field(default_factory=dict)
    enter: list[Task] = field(default_factory=list)
    leave: list[int] = field(default_factory=list)
    asked: list[Any] = field(default_factory=list)
    judging: Task | None = None


def run(drive: Drive) -> None:
    """Everything that is left to do."""
    silence()
    Groups(drive).run()


class Groups:
    def __init__(self, drive: Drive):
        assert drive.planner.fusing is not None
        self.drive, self.fusing = drive, drive.planner.fusing
        self.judge = _Judge(drive)
        self.names = (f"trial-{number}" for number in itertools.count())
        self.groups: list[_Group] = []

    def run(self) -> None:
        import ray

        try:
            while True:
                self._fill()
                asked = [ref for group in self.groups for ref in group.asked]
                if not asked:
                    return
                ready, _ = ray.wait(asked, timeout=ASK_S)  # one is enough: the others answer too, or one has died
                self.drive.lease.check()
                for group in self.groups:
                    if any(ref in ready for ref in group.asked):
                        self._take(group)
        finally:
            for group in self.groups:
                _remove(group)

    # giving

    def _fill(self) -> None:
        """Trials to free seats, and work to idle groups. A group is placed when there is a trial for it."""
        for number in range(self.fusing.groups):
            if number < len(self.groups) and self.groups[number].asked:
                continue
            live = len(self.groups[number].live) if number < len(self.groups) else 0
            for trial_id, task in self._next(self.fusing.seats - live):
                if number == len(self.groups):
                    self.groups.append(self._place())
                self._give(self.groups[number], task, trial_id)
            if number == len(self.groups):
                return
            self._send(self.groups[number])

    def _next(self, seats: int) -> Iterator[tuple[str, Task]]:
        """What is next, under Tune's names, for so many seats."""
        for _ in range(seats):
            trial_id = next(self.names)
            task = self.drive.next(trial_id)
            if not task:
                return
            yield trial_id, task

    def _give(self, group: _Group, task: Task, trial_id: str) -> None:
        group.live[task.number] = _Told(trial_id)
        if task.judge:
            group.judging = task
        else:
            self.judge.began(trial_id)
            group.enter.append(task)

    def _send(self, group: _Group) -> None:
        if group.judging is not None:
            group.asked = [member.judge.remote(group.judging) for member in group.members]
        elif group.live:
            group.asked = [member.work.remote(group.leave, group.enter) for member in group.members]
            group.enter, group.leave = [], []

    # taking

    def _take(self, group: _Group) -> None:
        """What a group has told; or it has lost a process, and begins anew."""
        import ray
        from ray.exceptions import RayError

        try:
            news, *_ = ray.get(group.asked)
        except RayError as error:
            self._begin_anew(group, error)
            return
        group.asked, group.judging = [], None
        for result in news.results:
            self._tell(group, result)
        if news.pace is not None:
            self.drive.board.say(_paced(news.pace))

    def _tell(self, group: _Group, result: dict[str, Any]) -> None:
        told = group.live.get(result["number"])
        if told is None:
            return  # it was stopped by an earlier one of these results
        if "scores" in result:
            if result["step"] <= told.step and "ended" not in result:
                return  # a group that begins anew tells again
            told.step = result["step"]
            self.drive.told(result)
        if "ended" not in result and not self.judge.stops(told.trial_id, result):
            return
        if "ended" not in result:
            group.leave.append(result["number"])
        del group.live[result["number"]]
        self.drive.ended(told.trial_id, error=False)

    def _begin_anew(self, group: _Group, error: BaseException) -> None:
        """Another group for the trials that were in this one; those that have lost too many processes end."""
        number = self.groups.index(group)
        _remove(group)
        retries = self.drive.sweep.run.scale.retries
        for one, told in list(group.live.items()):
            told.losses += 1
            if told.losses > retries:
                del group.live[one]
                self.drive.ended(told.trial_id, error=True)
        self.drive.board.say(f"a worker group ended ({_reason(error)}); its trials go on from their checkpoints")
        self.groups[number] = anew = self._place()
        for one, told in group.live.items():
            anew.live[one] = told
            task = self.drive.task(one, judge=group.judging.judge if group.judging else None)
            if task.judge:
                anew.judging = task
            else:
                anew.enter.append(task)

    def _place(self) -> _Group:
        """Processes for one group, in a placement group of their own. ClusterError when they do not come up."""
        import ray
        from ray.exceptions import RayError
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        from ftray.sweep.member import Member

        planner = self.drive.planner
        bundle = {"CPU": planner.cpus} | ({"GPU": planner.gpus} if planner.gpus else {})
        placed = placement_group([bundle] * planner.workers, strategy="PACK")
        there = PlacementGroupSchedulingStrategy(placed)
        options = {"num_cpus": planner.cpus, "num_gpus": planner.gpus, "scheduling_strategy": there}
        given = {"tokens": self.fusing.tokens, "takes_bitsandbytes": planner.takes_bitsandbytes}
        actor: Any = ray.remote(Member)
        members = [actor.options(**options).remote(rank, **given) for rank in range(planner.workers)]
        group = _Group(members, placed)
        if len(members) > 1:
            try:
                address = ray.get(members[0].address.remote())
                device = "cuda" if planner.gpus else "cpu"
                ray.get([member.meet.remote(address, world=len(members), device=device) for member in members])
            except RayError as error:
                _remove(group)
                raise ClusterError(f"the workers of a group do not meet: {_reason(error)}") from error
        return group


class _Judge:
    """Tune's scheduler, which says who stops."""

    def __init__(self, drive: Drive):
        self.rungs: Any = None
        if drive.sweep.stopping.kind != "none":
            from ftray.sweep.stopping import Rungs

            self.rungs = Rungs(drive.sweep, drive.earlier, sign=drive.sign)
        self.trials: dict[str, Any] = {}

    def began(self, trial_id: str) -> None:
        if self.rungs is not None:
            from ftray.sweep.stopping import Known

            self.trials[trial_id] = Known(trial_id)
            self.rungs.on_trial_add(None, self.trials[trial_id])

    def stops(self, trial_id: str, result: dict[str, Any]) -> bool:
        return self.rungs is not None and self.rungs.on_trial_result(None, self.trials[trial_id], result) == STOP


def _remove(group: _Group) -> None:
    import ray
    from ray.util.placement_group import remove_placement_group

    for member in group.members:
        ray.kill(member)
    remove_placement_group(group.placed)


def _paced(pace: dict[int, float]) -> str:
    """What was measured of passes over some trials or all, and what is taken from here on."""
    tried = ", ".join(f"{width}: {rate:,.0f}" for width, rate in sorted(pace.items()))
    return f"measured, tokens a second by trials in one pass: {tried}"


def _reason(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1].strip()
