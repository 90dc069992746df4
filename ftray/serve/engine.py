"""The seam between the server and what generates: one base, many versions, requests in and pieces out.

Who is who: the *app* speaks HTTP, the *replica* keeps versions resident, the *engine* generates. An engine knows no
aliases and no registry: it loads a folder under an immutable key and generates with it, so that nothing it caches can
ever answer for another version.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from ftray.store.versions import Version

Finish = Literal["stop", "length"]
Room = Literal["bank", "own"]
"""Where a version lies: a slot of the bank, shared batches; or beside it, a model or wrapper of its own."""


@dataclass(frozen=True)
class VersionRef:
    """One registered version, without its card; what the app hands to a replica."""

    name: str
    number: int
    digest: str

    @classmethod
    def of(cls, version: Version) -> VersionRef:
        return cls(version.name, version.number, version.digest)

    @property
    def id(self) -> str:
        return f"{self.name}@v{self.number}"

    @property
    def key(self) -> str:
        """What the engine calls it. The digest tells it from a version of the same number in a registry made anew."""
        return f"{self.id}+{self.digest[:16]}"


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0 is greedy; top_k 0, top_p 1, min_p 0 cut nothing.

    Penalties as OpenAI defines them (presence, frequency: over what was generated) and as CTRL does (repetition,
    arXiv 1909.05858: over prompt and answer). `logprobs`: None, or so many alternatives beside the chosen token (0 to
    20), of the distribution before temperature and cuts. `seed` makes one request repeatable whatever is beside it.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_new_tokens: int = 0
    logprobs: int | None = None


@dataclass(frozen=True)
class Generation:
    """One sequence to generate. `version` is a VersionRef.key that is loaded, or None for the base.

    `deadline` is in time.time() seconds; an engine may give up on a request past it. Where nobody reads along
    (`streamed` is False), pieces may come as one.
    """

    id: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    version: str | None = None
    deadline: float | None = None
    streamed: bool = True


@dataclass(frozen=True, slots=True)
class Scored:
    """A generated token's log-probability (nats), and those of the most likely ones at its place, best first."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """What came since the last piece. Text is whole characters, and never part of a stop string.

    The last piece of a sequence has `finish`; stop tokens are among `ids` and not in `text`. `cached_tokens` on the
    first piece: how much of the prompt was not computed again.
    """

    text: str
    ids: tuple[int, ...] = ()
    scores: tuple[Scored, ...] = ()
    finish: Finish | None = None
    cached_tokens: int = 0

    def then(self, later: Piece) -> Piece:
        """This piece and the next as one."""
        return Piece(
            self.text + later.text,
            self.ids + later.ids,
            self.scores + later.scores,
            later.finish,
            self.cached_tokens + later.cached_tokens,
        )


@dataclass(frozen=True)
class EngineFacts:
    """What an engine is; `room` says how many versions fit at once, by where they lie."""

    kind: str
    base: str
    dtype: str
    device: str
    max_length: int
    vocab_size: int
    room: Mapping[Room, int]
    tasks: tuple[str, ...] = ("generate",)


@dataclass(frozen=True)
class EngineStats:
    """Now: running and waiting requests, tokens in the cache and how many fit. Since the start: the counters."""

    running: int = 0
    waiting: int = 0
    cache_tokens: int = 0
    cache_capacity: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    step_s: float = 0.0
    """Seconds of the last step, smoothed."""
    alive: bool = True
    """False once it can never generate again; then its process is replaced."""


class Engine(Protocol):
    """Generates text with one base. Methods are called on one event loop; the work is done elsewhere."""

    @property
    def facts(self) -> EngineFacts: ...

    def room_for(self, folder: Path) -> Room:
        """Where a version would lie, by its files' headers. AdapterError when this engine cannot serve it."""
        ...

    async def load(self, key: str, folder: Path) -> Room:
        """Makes a version ready. The caller has made room. AdapterError with the reason, and then nothing changed."""
        ...

    async def unload(self, key: str) -> None:
        """Frees it; fine if it is not there. The caller sees to it that no request uses it."""
        ...

    def generate(self, request: Generation) -> AsyncIterator[Piece]:
        """The answer as it comes. Closing the iterator cancels. RequestError, Overloaded, EngineError."""
        ...

    def stats(self) -> EngineStats: ...

    async def close(self) -> None: ...


class Reader(Protocol):
    """An engine that reads instead of writing: embeddings and labels, from an encoder."""

    @property
    def facts(self) -> EngineFacts: ...

    def room_for(self, folder: Path) -> Room: ...

    async def load(self, key: str, folder: Path) -> Room: ...

    async def unload(self, key: str) -> None: ...

    async def embed(self, ids: list[tuple[int, ...]], version: str | None) -> list[list[float]]:
        """One vector a text, mean over its tokens, of length 1."""
        ...

    async def classify(self, ids: list[tuple[int, ...]], version: str) -> list[Labelled]:
        """The label of each text, or of each of its tokens."""
        ...

    def stats(self) -> EngineStats: ...

    async def close(self) -> None: ...


@dataclass(frozen=True)
class Labelled:
    """Scores by label (they add up to 1, or each is between 0 and 1 for multi-label); `tokens`: the same by token."""

    scores: Mapping[str, float] = field(default_factory=dict)
    tokens: tuple[tuple[int, Mapping[str, float]], ...] = ()
