"""Asking an engine, and what it answered."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from engine_world import World

from ftray.serve.engine import Engine, Generation, Piece, Sampling, Scored

GREEDY = Sampling(max_new_tokens=10, temperature=0.0, ignore_eos=True)
_numbers = itertools.count()


@dataclass(frozen=True)
class Answer:
    pieces: tuple[Piece, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(id for piece in self.pieces for id in piece.ids)

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def scores(self) -> tuple[Scored, ...]:
        return tuple(score for piece in self.pieces for score in piece.scores)

    @property
    def finish(self) -> str | None:
        assert all(piece.finish is None for piece in self.pieces[:-1]), "a piece came after the last one"
        return self.pieces[-1].finish


async def ask(engine: Engine, version: str | None, prompt: Sequence[int], sampling: Sampling = GREEDY) -> Answer:
    return Answer(tuple([piece async for piece in engine.generate(request(version, prompt, sampling))]))


def request(version: str | None, prompt: Sequence[int], sampling: Sampling = GREEDY) -> Generation:
    return Generation(f"request-{next(_numbers)}", tuple(prompt), sampling, version)


@asynccontextmanager
async def loaded(engine: Engine, world: World, *names: str) -> AsyncIterator[dict[str | None, str | None]]:
    """Adapter name -> key; None, the base, is there as well."""
    keys: dict[str | None, str | None] = {None: None}
    try:
        for name in names:
            keys[name] = world.key(name)
            assert await engine.load(world.key(name), world.folders[name]) == "bank"
        yield keys
    finally:
        for name in names:
            await engine.unload(world.key(name))
