"""One request as the log and the metrics will tell it. Middleware begins it; routes fill in what they learn."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from starlette.types import Scope

from ftray.config.serving import Scope as KeyScope

BASE = "base"
UNKNOWN = "unknown"
_PLACE = "ftray.call"


@dataclass(slots=True)
class Call:
    """`version`: name@v3 or "base", once it is resolved. Times are time.perf_counter() seconds."""

    id: str
    method: str
    began: float = field(default_factory=time.perf_counter)
    key: str | None = None
    scopes: tuple[KeyScope, ...] = ()
    model: str | None = None
    version: str = UNKNOWN
    status: int = 0
    error: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    first: float | None = None
    stream: bool = False
    prompts: list[object] | None = None
    answers: list[str] | None = None

    @classmethod
    def of(cls, scope: Scope) -> Call:
        call = scope[_PLACE]
        assert isinstance(call, cls)
        return call

    def put_into(self, scope: Scope) -> None:
        scope[_PLACE] = self

    def first_token(self) -> None:
        if self.first is None:
            self.first = time.perf_counter()

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self.began

    @property
    def ttft_s(self) -> float | None:
        return None if self.first is None else self.first - self.began
