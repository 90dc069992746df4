"""What the generating thread does: decides what each step computes, computes it, and tells who waits for it.

A step computes the newest token of each sequence that is being answered, and a piece of the prompts that wait to be
read; sequences join and leave between steps.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ftray.errors import AdapterError, DeadlineExceeded, ReplicaGone, ServeError
from ftray.models.load import cache_shape
from ftray.serve.attention import Chunk, Step
from ftray.serve.bank import Bank, Mix
from ftray.serve.cache import Cache, Row
from ftray.serve.engine import EngineStats, Finish, Generation, Piece, Scored
from ftray.serve.lanes import VIRTUAL, Lane
from ftray.serve.sampling import Chooser, choose
from ftray.serve.text import TextStream

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What a bank engine may hold and do at once."""

    max_batch: int
    prefill_chunk: int
    prefix_cache: bool = True


class Stream:
    """Pieces on their way from the generating thread to an event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop = loop
        self._pieces: list[Piece] = []
        self._error: Exception | None = None
        self._there = asyncio.Event()

    async def next(self) -> list[Piece]:
        """What came since the last call, at least one piece; or the error that ended the sequence."""
        await self._there.wait()
        self._there.clear()
        if not self._pieces and self._error is not None:
            raise self._error
        pieces, self._pieces = self._pieces, []
        if self._error is not None:
            self._there.set()
        return pieces

    def put(self, what: Piece | Exception) -> None:
        """Called on the event loop."""
        if isinstance(what, Exception):
            self._error = what
        else:
            self._pieces.append(what)
        self._there.set()


@dataclass(eq=False)
class InWork:
    """A request in work. `tokens`: virtual, prompt and answer; those that `row.tokens` lacks are still to compute."""

    request: Generation
    lane: Lane
    slot: int | None
    chooser: Chooser
    text: TextStream
    stream: Stream
    tokens: list[int]
    ends: frozenset[int]
    longest: int
    row: Row | None = None
    cached: int = 0
    said_cached: bool = False
    cancelled: bool = False

    @property
    def to_compute(self) -> int:
        assert self.row is not None
        return len(self.tokens) - len(self.row.tokens)


Told = tuple[Stream, Piece | Exception]


class Stepper:
    """Decides what each step computes, and computes it. Everything here runs on the generating thread, but `do`."""

    def __init__(self, *, cache: Cache, bank: Bank, settings: Settings):
        self.cache, self._bank, self._settings = cache, bank, settings
        self.waiting: deque[InWork] = deque()
        self.running: list[InWork] = []
        self._inbox: queue.SimpleQueue[InWork | Callable[[], None]] = queue.SimpleQueue()
        self._stopping = False
        self.over = False
        """Set once nothing is generated any more."""
        self._counts: dict[str, Any] = dict.fromkeys(
            ("prompt_tokens", "cached_prompt_tokens", "generated_tokens", "steps"), 0
        )
        self._step_s = 0.0

    def ask(self, sequence: InWork) -> None:
        """From any thread; the answer, or what ends it, comes through the sequence's stream."""
        self._inbox.put(sequence)

    async def let_go(self, version: str) -> None:
        """Returns once no step uses a version and nothing of it is kept. Its requests have been cancelled before.

        A slot must not be given to another version while a step computes with it: what the step stores would be kept
        as this version's.
        """
        loop = asyncio.get_running_loop()
        done = loop.create_future()

        def drop() -> None:
            for sequence in [one for one in self.running if one.request.version == version]:
                self._leave(sequence)
            self.waiting = deque(one for one in self.waiting if one.request.version != version)
            self.cache.forget(version)
            loop.call_soon_threadsafe(_settle, done)

        self._inbox.put(drop)
        while not done.done() and not self.over:
            await asyncio.wait({done}, timeout=1.0)

    def stop(self) -> None:
        def stopping() -> None:
            self._stopping = True

        self._inbox.put(stopping)

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self.running),
            waiting=len(self.waiting) + self._inbox.qsize(),
            cache_tokens=self.cache.tokens,
            cache_capacity=len(self.cache.rows) * self.cache.length,
            step_s=self._step_s,
            **self._counts,
        )

    def check(self, lane: Lane) -> None:
        """AdapterError when a model of its own does not fit this cache."""
        config = lane.model.config.get_text_config()
        if cache_shape(config) != (
            len(self.cache.keys),
            self.cache.heads,
            self.cache.keys[0].shape[-1],
        ):
            raise AdapterError("it is a model of another shape than the served base; serve it as a base of its own")

    @torch.inference_mode()
    def run(self) -> None:
        try:
            while not self._stopping:
                self._take_in(wait=not (self.running or self.waiting))
                self._drop_cancelled()
                self._admit()
                if self.running:
                    began = time.perf_counter()
                    self._tell(self._step())
                    self._step_s += 0.1 * (time.perf_counter() - began - self._step_s)
        finally:
            self.over = True
            self._take_in(wait=False)
            gone = ReplicaGone("the engine stopped; send the request again")
            self._tell([(one.stream, gone) for one in [*self.running, *self.waiting]])

    def _take_in(self, *, wait: bool) -> None:
        try:
            asked = self._inbox.get(block=wait)
            while True:
                if isinstance(asked, InWork):
                    self.waiting.append(asked)
                else:
                    asked()
                asked = self._inbox.get(block=False)
        except queue.Empty:
            return

    def _drop_cancelled(self) -> None:
        now = time.time()
        late: list[Told] = []
        for sequence in [*self.running, *self.waiting]:
            deadline = sequence.request.deadline
            if not sequence.cancelled and deadline is not None and now > deadline:
                sequence.cancelled = True
                late.append((sequence.stream, DeadlineExceeded("the request took longer than it may")))
        if any(one.cancelled for one in self.waiting):
            self.waiting = deque(one for one in self.waiting if not one.cancelled)
        for sequence in [one for one in self.running if one.cancelled]:
            self._leave(sequence)
        self._tell(late)

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self._settings.max_batch and self.cache.free:
            sequence = self.waiting.popleft()
            reuse, virtual = self._settings.prefix_cache, sequence.lane.virtual
            row = self.cache.take(sequence.request.version, sequence.tokens, reuse=reuse)
            if len(row.tokens) < virtual:
                self.cache.write(row, sequence.lane.prefix, stand_for=[VIRTUAL] * virtual)
            sequence.row, sequence.cached = row, max(0, len(row.tokens) - virtual)
            self.running.append(sequence)
            self._counts["prompt_tokens"] += len(sequence.request.prompt_ids)
            self._counts["cached_prompt_tokens"] += sequence.cached

    def _leave(self, sequence: InWork) -> None:
        if sequence in self.running:
            self.running.remove(sequence)
            assert sequence.row is not None
            self.cache.give_back(sequence.row)

    def _step(self) -> list[Told]:
        told: list[Told] = []
        budget = self._settings.prefill_chunk
        for lane in dict.fromkeys(one.lane for one in self.running):
            mine = [one for one in self.running if one.lane is lane]
            work = Work(mine, budget)
            budget -= work.read
            if not work.sequences:
                continue
            try:
                logits = self._compute(lane, work)
                chosen = choose(logits, [one.chooser for one in work.asking]) if work.asking else ([], [])
            except Exception as error:  # whatever a model or a device may raise ends these requests, not the server
                log.exception("a step failed; its %d requests are answered with an error", len(work.sequences))
                told += [self._fail(sequence, error) for sequence in work.sequences]
                continue
            sound = torch.isfinite(logits.amax(-1)).tolist() if work.asking else []
            for sequence, token, score, fine in zip(work.asking, *chosen, sound, strict=True):
                told.append(self._said(sequence, token, score) if fine else self._not_a_number(sequence))
        self._counts["steps"] += 1
        return told

    def _compute(self, lane: Lane, work: Work) -> torch.Tensor:
        """The logits of the sequences that are to go on, [N, V]."""
        device = self.cache.device
        step = Step(self.cache, [one.row for one in work.answering], work.positions, work.chunks)  # type: ignore[misc]
        mix = work.mix(lane.bank) if lane.bank is not None else None
        ids, positions = (torch.tensor(row, device=device) for row in (work.ids, work.all_positions))
        keep = torch.tensor(work.keep, dtype=torch.long, device=device)
        logits = lane.logits(ids, positions, step, keep_N=keep, mix=mix)
        for sequence, end in work.computed:
            sequence.row.tokens = sequence.tokens[:end]  # type: ignore[union-attr]
        return logits

    def _fail(self, sequence: InWork, error: Exception) -> Told:
        if sequence.row is not None:
            sequence.row.tokens = []
        self._leave(sequence)
        return sequence.stream, ServeError(f"the engine failed: {type(error).__name__}")

    def _not_a_number(self, sequence: InWork) -> Told:
        """What is not a number must not stay where another sequence's padding would read it."""
        row = sequence.row
        assert row is not None
        for slab in (*self.cache.keys, *self.cache.values):
            slab[row.index].zero_()
        row.tokens = []
        self._leave(sequence)
        return sequence.stream, ServeError("the version computed NaN; its weights are not usable")

    def _said(self, sequence: InWork, token: int, score: Scored | None) -> Told:
        try:
            return sequence.stream, self._say(sequence, token, score)
        except Exception as error:  # a tokenizer may refuse what its model wrote: that is this answer's end, only
            log.exception("a token could not be said")
            return self._fail(sequence, error)

    def _say(self, sequence: InWork, token: int, score: Scored | None) -> Piece:
        """The piece for a new token."""
        self._counts["generated_tokens"] += 1
        chooser = sequence.chooser
        chooser.answer.append(token)
        sequence.tokens.append(token)
        finish: Finish | None = None
        text = ""
        if token in sequence.ends and len(chooser.answer) > chooser.sampling.min_new_tokens:
            finish, text = "stop", sequence.text.rest()
        else:
            text = sequence.text.push(token)
            if sequence.text.stopped:
                finish = "stop"
            elif len(chooser.answer) >= sequence.longest:
                finish, text = "length", text + sequence.text.rest()
        if finish is not None:
            self._leave(sequence)
        cached = 0 if sequence.said_cached else sequence.cached
        sequence.said_cached = True
        return Piece(text, (token,), (score,) if score else (), finish, cached)

    def _tell(self, told: Sequence[Told]) -> None:
        """One call into each event loop, however many streams it has."""
        by_loop: dict[asyncio.AbstractEventLoop, list[Told]] = {}
        for stream, what in told:
            by_loop.setdefault(stream.loop, []).append((stream, what))
        for loop, mine in by_loop.items():
            try:
                loop.call_soon_threadsafe(_deliver, mine)
            except RuntimeError:  # the loop was closed, and with it everyone who waited there
                log.debug("nobody waits any more for %d pieces", len(mine))


def _settle(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)


def _deliver(told: Sequence[Told]) -> None:
    for stream, what in told:
        stream.put(what)


class Work:
    """What one step computes of one lane: the next token of each answer, sorted by slot, then pieces of prompts."""

    def __init__(self, sequences: Sequence[InWork], budget: int):
        self.answering = sorted((one for one in sequences if one.to_compute == 1), key=_by_slot)
        self.positions = [len(one.row.tokens) for one in self.answering]  # type: ignore[union-attr]
        self.ids = [one.tokens[-1] for one in self.answering]
        self.all_positions = list(self.positions)
        self.computed = [(one, len(one.tokens)) for one in self.answering]
        self.asking = list(self.answering)
        self.keep = list(range(len(self.answering)))
        self.chunks: list[Chunk] = []
        self.read = 0
        self._pieces: list[tuple[int, int, int]] = []
        for sequence in sequences:
            count = min(sequence.to_compute, budget - self.read)
            if sequence.to_compute > 1 and count > 0:
                self._add_piece(sequence, count)

    @property
    def sequences(self) -> list[InWork]:
        return [sequence for sequence, _ in self.computed]

    def _add_piece(self, sequence: InWork, count: int) -> None:
        assert sequence.row is not None
        begin, done = len(self.ids), len(sequence.row.tokens)
        self.chunks.append(Chunk(sequence.row, begin, begin + count, done))
        self.ids += sequence.tokens[done : done + count]
        self.all_positions += range(done, done + count)
        self.computed.append((sequence, done + count))
        self.read += count
        if sequence.slot is not None:
            self._pieces.append((sequence.slot, begin, begin + count))
        if done + count == len(sequence.tokens):
            self.asking.append(sequence)
            self.keep.append(begin + count - 1)

    def mix(self, bank: Bank) -> Mix | None:
        """None where every token is the base's."""
        counts: dict[int, int] = {}
        for sequence in self.answering:
            if sequence.slot is not None:
                counts[sequence.slot] = counts.get(sequence.slot, 0) + 1
        if not counts and not self._pieces:
            return None
        return bank.mixed(counts, self._pieces, size=len(self.ids))


def _by_slot(sequence: InWork) -> tuple[int, int]:
    """Versions in the order of their slots, then the base; within one in the order of their rows."""
    assert sequence.row is not None
    return (1 << 30 if sequence.slot is None else sequence.slot, sequence.row.index)
