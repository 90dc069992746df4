"""Who answers in the terminal chat: a server over HTTP (client.py), or an engine in this process (inprocess.py)."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, Protocol

BASE = "base"
"""What the base is called, whatever it is."""
_ONE_GO_S = 0.05
Message = dict[str, str]
"""role (system, user, assistant) and content."""


@dataclass(frozen=True)
class Question:
    """One turn: the conversation so far, whom to ask, and how. None: what the answering side takes by default."""

    model: str
    messages: tuple[Message, ...]
    temperature: float | None = None
    max_new_tokens: int | None = None
    seed: int | None = None

    def body(self) -> dict[str, Any]:
        """As POST /v1/chat/completions takes it."""
        settings = {"temperature": self.temperature, "max_tokens": self.max_new_tokens, "seed": self.seed}
        return {
            "model": self.model,
            "messages": list(self.messages),
            "stream": True,
            "stream_options": {"include_usage": True},
            **{key: value for key, value in settings.items() if value is not None},
        }


@dataclass(frozen=True, slots=True)
class Said:
    """What came since the last one. `tokens` counts the answer's tokens so far, where that is known."""

    text: str = ""
    tokens: int | None = None
    version: str | None = None
    finish: str | None = None


class Speaker(Protocol):
    """Answers as pieces. ServeError or RegistryError when it cannot; closing the iterator cancels."""

    @property
    def where(self) -> str:
        """For the first line of a chat, e.g. `builtin:tiny in this process`."""
        ...

    async def version_of(self, model: str) -> str:
        """Who would answer now: `orders@v2` for `orders`; the name of the base for the base."""
        ...

    async def models(self) -> list[str]:
        """What may be asked."""
        ...

    def answer(self, question: Question) -> AsyncGenerator[Said, None]: ...

    async def close(self) -> None: ...


@dataclass
class Answer:
    """One answer, filled while it comes, so that what was said before a stop or an error is there."""

    model: str
    version: str | None = None
    text: str = ""
    tokens: int | None = None
    finish: str | None = None
    first_s: float | None = None
    seconds: float = 0.0
    error: Exception | None = field(default=None, compare=False)
    _tokens_of_first: int | None = field(default=None, repr=False)

    def add(self, said: Said, *, seconds: float) -> None:
        """One more piece, `seconds` after the question."""
        if said.text and self.first_s is None:
            self.first_s, self._tokens_of_first = seconds, said.tokens
        self.text += said.text
        self.tokens = said.tokens if said.tokens is not None else self.tokens
        self.version = said.version or self.version
        self.finish = said.finish or self.finish
        self.seconds = seconds

    @property
    def tokens_per_s(self) -> float | None:
        """After the first piece; of an answer that came in one go, over the whole time. None where it is not known."""
        if self.tokens is None or self.first_s is None or not self.seconds:
            return None
        after_s = self.seconds - self.first_s
        if after_s > _ONE_GO_S:
            return (self.tokens - (self._tokens_of_first or 1)) / after_s
        return self.tokens / self.seconds

    def to_json(self) -> dict[str, object]:
        speed = self.tokens_per_s
        return {
            "model": self.model,
            "version": self.version,
            "answer": self.text,
            "tokens": self.tokens,
            "tokens_per_s": None if speed is None else round(speed, 1),
            "finish": self.finish,
        }
