"""What the peers of benchmarks/serve.py are asked, and how they are timed; the same code in every process.

Standard library only: the interpreter of vLLM's environment runs it too.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KINDS = ("base", "one", "mixed")
COMPARED = 4  # tokens of each answer that are compared between peers
_FIRST_ID = 16  # below it are the special tokens
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Spec:
    """What a peer serves, as plain data. `adapters`: folders as PEFT saves them, `ranks` theirs; `storage`: of a
    registry of its own, where it needs one."""

    peer: str
    base: str
    adapters: list[str]
    ranks: list[int]
    dtype: str
    threads: int
    max_length: int
    max_batch: int
    storage: str


@dataclass(frozen=True)
class Row:
    """One request. `adapter`: a place in Spec.adapters; None is the base."""

    number: int
    ids: tuple[int, ...]
    adapter: int | None


@dataclass(frozen=True)
class Cell:
    """So many requests of one kind, `concurrency` of them at a time: each client sends its next one when the last is
    answered. `vocabulary`: ids below it."""

    kind: str
    prompt: int
    concurrency: int
    requests: int
    new: int
    adapters: int
    vocabulary: int

    def rows(self) -> list[Row]:
        """The same for every peer."""
        draw = random.Random(self.prompt)
        return [
            Row(
                number,
                tuple(draw.randrange(_FIRST_ID, self.vocabulary) for _ in range(self.prompt)),
                {"base": None, "one": 0, "mixed": number % self.adapters}[self.kind],
            )
            for number in range(self.requests)
        ]


@dataclass
class Trace:
    """When one request was sent and when its tokens came, by time.perf_counter()."""

    number: int
    sent: float
    arrivals: list[float] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    tokens: int = 0

    def arrived(self, ids: Sequence[int]) -> None:
        self.arrivals.append(time.perf_counter())
        self.ids += ids
        self.tokens += len(ids)


def figures(cell: Cell, traces: Sequence[Trace], *, wall_s: float, processor_s: float) -> dict[str, Any]:
    """One answered cell, as plain data. A gap is between two arrivals of one request, however many tokens came."""
    assert len(traces) == cell.requests
    for trace in traces:
        assert trace.tokens == cell.new, f"request {trace.number}: {trace.tokens} tokens instead of {cell.new}"
    return {
        "tokens": sum(trace.tokens for trace in traces),
        "wall_s": wall_s,
        "processor_s": processor_s,
        "first_s": [trace.arrivals[0] - trace.sent for trace in traces],
        "gaps_s": [b - a for trace in traces for a, b in zip(trace.arrivals, trace.arrivals[1:], strict=False)],
        "answers": [trace.ids[:COMPARED] for trace in sorted(traces, key=lambda trace: trace.number)],
    }


async def drive(cell: Cell, ask: Callable[[Row], AsyncIterator[Sequence[int]]]) -> dict[str, Any]:
    """Asks an engine that takes requests as they come, and gives tokens as they come."""
    rows = iter(cell.rows())
    traces: list[Trace] = []

    async def client() -> None:
        for row in rows:
            trace = Trace(row.number, time.perf_counter())
            async with aclosing(ask(row)) as pieces:
                async for ids in pieces:
                    trace.arrived(ids)
            traces.append(trace)

    processor, began = processor_s(), time.perf_counter()
    await asyncio.gather(*(client() for _ in range(cell.concurrency)))
    wall = time.perf_counter() - began
    return figures(cell, traces, wall_s=wall, processor_s=processor_s() - processor)


def processor_s() -> float:
    """What this process and all below it have used; of the latter to 10 ms."""
    return time.process_time() + sum(_used_s(pid) for pid in _below(os.getpid()))


def _below(pid: int) -> Iterator[int]:
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = path.read_text().split()
        except OSError:  # the thread ended
            continue
        for child in map(int, children):
            yield child
            yield from _below(child)


def _used_s(pid: int) -> float:
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it ended
        return 0.0
    return (int(after_name[11]) + int(after_name[12])) / _TICKS_PER_S


class Lines:
    """A child's side of the talk: a line of JSON in, a line of JSON out. Made first of all: from then on, what
    libraries print goes to stderr."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def say(self, what: Any) -> None:
        print(json.dumps(what), file=self._out, flush=True)

    def serve(self, answer: Callable[[dict[str, Any]], Any]) -> None:
        """Until nobody asks any more."""
        for line in sys.stdin:
            self.say(answer(json.loads(line)))
