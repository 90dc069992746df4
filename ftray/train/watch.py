"""A worker's watchdog: a step that takes too long is a hang. Its stacks are kept and the process ends, so that Ray
restarts the group from the last checkpoint instead of waiting half an hour for a collective's timeout."""

from __future__ import annotations

import faulthandler
import os
import tempfile
import threading
import time
from collections.abc import Callable

ASK_S = 20.0


class Watchdog:
    """Ends the process when `beat` was not called for `limit_s`; `on_hang(text)` gets all threads' stacks first.

    It also ends it when `beat` was late and `stopped()` is true: another worker has given up alone, and waiting for it
    in a collective would be in vain.
    """

    def __init__(self, limit_s: float, on_hang: Callable[[str], None], stopped: Callable[[], bool] = lambda: False):
        self.limit_s = limit_s
        self.on_hang = on_hang
        self.stopped = stopped
        self._last = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ftray-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()

    def beat(self) -> None:
        self._last = time.monotonic()

    def _watch(self) -> None:
        asked = 0.0
        while not self._stop.wait(min(1.0, self.limit_s / 4)):
            late = time.monotonic() - self._last
            if late > ASK_S and time.monotonic() - asked > ASK_S / 2:
                asked = time.monotonic()
                if self.stopped():
                    os._exit(71)
            if late > self.limit_s:
                try:
                    self.on_hang(stacks())
                finally:
                    os._exit(70)


def stacks() -> str:
    """The stacks of every thread of this process."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file=file, all_threads=True)
        file.seek(0)
        return file.read()
