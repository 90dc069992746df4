"""What unknown names may cost: hostile traffic must not hammer the storage."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from ftray.errors import StorageError

PER_S = 20
AGAIN_S = 1.0
PATIENCE_S = 10.0


class LookUps:
    """Bounds what unknown names cost: one question at a time for each, none again for a second, few in all.

    A name that is not asked about is answered from what is known, which is at most one look old.
    """

    def __init__(self) -> None:
        self._answers: dict[str, tuple[float, str]] = {}
        self._asking: dict[str, asyncio.Task[str]] = {}
        self._left = float(PER_S)
        self._filled = time.monotonic()

    async def ask(self, name: str, question: Callable[[], Coroutine[Any, Any, str]]) -> str:
        now = time.monotonic()
        self._answers = {name: answer for name, answer in self._answers.items() if answer[0] > now}
        if name in self._answers:
            return self._answers[name][1]
        task = self._asking.get(name)
        if task is None:
            self._left = min(PER_S, self._left + (now - self._filled) * PER_S)
            self._filled = now
            if self._left < 1 or len(self._asking) >= PER_S:
                return ""
            self._left -= 1
            task = self._asking[name] = asyncio.create_task(question())
            task.add_done_callback(partial(self._answered, name))
        done, _ = await asyncio.wait({task}, timeout=PATIENCE_S)
        if not done:
            raise StorageError("it gives no answer")
        return task.result()

    def _answered(self, name: str, task: asyncio.Task[str]) -> None:
        del self._asking[name]
        if not task.cancelled() and task.exception() is None:
            self._answers[name] = (time.monotonic() + AGAIN_S, task.result())
