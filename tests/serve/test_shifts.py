"""Two kinds that must not meet: they never do, and nobody waits for ever."""

from __future__ import annotations

import asyncio

from ftray.serve.shifts import Shifts


class Room:
    """Counts who is inside; `log` are the kinds in the order in which they came in."""

    def __init__(self):
        self.shifts = Shifts()
        self.inside: dict[str, int] = {"base": 0, "adapters": 0}
        self.log: list[str] = []
        self.most = 0

    async def visit(self, kind: str, steps: int) -> None:
        async with self.shifts.shift(kind):
            self.log.append(kind)
            self.inside[kind] += 1
            self.most = max(self.most, self.inside[kind])
            for _ in range(steps):
                assert not (self.inside["base"] and self.inside["adapters"])
                await asyncio.sleep(0)
            self.inside[kind] -= 1


def test_the_kinds_never_meet_and_each_kind_goes_in_together():
    async def check():
        room = Room()
        await asyncio.gather(*(room.visit("base" if n % 3 else "adapters", n % 7) for n in range(60)))
        assert len(room.log) == 60
        assert room.most > 10
        assert room.shifts.waiting == 0

    asyncio.run(check())


def test_one_kind_alone_never_waits():
    async def check():
        room = Room()
        async with room.shifts.shift("base"):
            await asyncio.wait_for(room.visit("base", 1), 1)

    asyncio.run(check())


def test_a_stream_of_one_kind_does_not_starve_the_other():
    async def check():
        room = Room()

        async def stream(kind: str) -> None:
            for _ in range(50):
                await asyncio.gather(room.visit(kind, 2), room.visit(kind, 3))

        streams = [asyncio.create_task(stream("base")) for _ in range(3)]
        await asyncio.sleep(0)
        await room.visit("adapters", 1)
        assert room.log.index("adapters") < 10
        await asyncio.gather(*streams)

    asyncio.run(check())


def test_who_gives_up_waiting_holds_nobody_back():
    async def check():
        room = Room()
        async with room.shifts.shift("base"):
            waiting = asyncio.create_task(room.visit("adapters", 1))
            await asyncio.sleep(0)
            joining = asyncio.create_task(room.visit("base", 1))  # behind it
            await asyncio.sleep(0)
            assert not room.log
            waiting.cancel()
            await asyncio.wait_for(joining, 1)
        await asyncio.wait_for(room.visit("adapters", 1), 1)

    asyncio.run(check())


def test_one_who_is_cancelled_at_the_door_does_not_count_as_inside():
    async def check():
        room = Room()
        async with room.shifts.shift("base"):
            waiting = asyncio.create_task(room.visit("adapters", 1))
            await asyncio.sleep(0)
        waiting.cancel()  # it is admitted, and does not know yet
        await asyncio.gather(waiting, return_exceptions=True)
        await asyncio.wait_for(room.visit("base", 1), 1)

    asyncio.run(check())
