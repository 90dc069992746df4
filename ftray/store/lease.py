"""At most one driver trains a run: a lease with a heartbeat, taken over from the dead.

`<run>/lease/<n>.json` is the n-th holder; the highest number holds. Taking over is creating n + 1, which only one of
two takers can do. A holder that was stopped long enough to be taken over finds the higher number at its next beat.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

from ftray.errors import StorageError
from ftray.store.numbered import Numbered
from ftray.store.paths import Storage
from ftray.store.process import is_gone, this_process

log = logging.getLogger(__name__)

BEATS_UNTIL_STALE = 6
BEATS_WATCHED = 2.5


class Lease:
    """A lease that this process holds."""

    def __init__(self, series: Numbered, number: int, document: dict[str, Any], what: str):
        self.number = number
        self.lost = False
        self._series = series
        self._document = document
        self._what = what
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lease of {what}", daemon=True)

    def check(self) -> None:
        """Raises StorageError once another driver has taken over, e.g. after this machine was suspended."""
        if not self.lost and max(self._series.numbers(), default=self.number) > self.number:
            self.lost = True
        if self.lost:
            raise StorageError(f"{self._what} was taken over by another driver while this one gave no sign of life")

    def _beat(self) -> None:
        while not self._stop.wait(self._document["beat_s"]):
            try:
                if max(self._series.numbers(), default=self.number) > self.number:
                    self.lost = True
                    log.error("%s was taken over by another driver", self._what)
                    return
                self._write()
            except StorageError as error:
                log.warning("cannot renew the lease of %s: %s", self._what, error)
            except Exception:  # cloud clients have their own errors; a lease must outlive a bad minute
                log.warning("cannot renew the lease of %s", self._what, exc_info=True)

    def _write(self, **fields: Any) -> None:
        self._document |= {"beat": time.time(), **fields}
        self._series.storage.write_json(self._series.key(self.number), self._document)


@contextlib.contextmanager
def holding(storage: Storage, folder: str, *, what: str, owner: dict[str, Any], beat_s: float = 5.0) -> Iterator[Lease]:
    """Holds the lease in the block; StorageError if a live driver has it.

    A holder on this machine is dead when its process is. One elsewhere is dead when its last beat is older than 6
    beats (30 s), and no new one is seen for 2.5: clocks of machines differ.
    """
    series = Numbered(storage, folder)
    document = {**this_process(), **owner, "beat": time.time(), "beat_s": beat_s, "released": False}
    lease = Lease(series, _take(series, document, what), document, what)
    for number in series.numbers():
        if number < lease.number:
            storage.remove(series.key(number))
    lease._thread.start()
    try:
        yield lease
    finally:
        lease._stop.set()
        lease._thread.join()
        if not lease.lost:
            try:
                lease._write(released=True)
            except StorageError as error:  # not worth the run: the next driver sees that this process is gone
                log.warning("cannot release the lease of %s: %s", what, error)


def holder(storage: Storage, folder: str) -> dict[str, Any] | None:
    """Who seems to hold the lease, at a glance (no watching of clocks that differ); None: nobody."""
    series = Numbered(storage, folder)
    document = series.read(max(series.numbers(), default=0))
    if document is None or document.get("released"):
        return None
    gone = is_gone(document)
    if gone is None:
        gone = not _beat_is_fresh(document)
    return None if gone else document


def _take(series: Numbered, document: dict[str, Any], what: str) -> int:
    unreadable = 0
    while True:
        last = max(series.numbers(), default=0)
        current = series.read(last) if last else None
        if last and current is None and unreadable < 10:
            # Trimmed since the listing, or half-written on a backend without atomic creation: look again.
            unreadable += 1
            time.sleep(0.1)
            continue
        if current is not None and _is_live(series, last, current):
            raise StorageError(
                f"{what} is being trained by pid {current.get('pid')} on host {current.get('host')}; "
                "wait for it, stop it, or give this run another name"
            )
        document["beat"] = time.time()
        if not series.create(last + 1, document):
            continue
        # A number that was free because its holder is long past (trimmed) does not hold.
        if max(series.numbers()) == last + 1:
            return last + 1
        series.storage.remove(series.key(last + 1))


def _is_live(series: Numbered, number: int, current: dict[str, Any]) -> bool:
    if current.get("released"):
        return False
    gone = is_gone(current)
    if gone is not None:
        return not gone
    if _beat_is_fresh(current):
        return True
    deadline = time.monotonic() + BEATS_WATCHED * _beat_s(current)
    while time.monotonic() < deadline:
        time.sleep(_beat_s(current) / 5)
        now = series.read(number)
        if now is not None and now.get("beat") != current.get("beat"):
            return not now.get("released")
    return False


def _beat_s(document: dict[str, Any]) -> float:
    return float(document.get("beat_s", 5.0))


def _beat_is_fresh(document: dict[str, Any]) -> bool:
    return abs(time.time() - float(document.get("beat", 0.0))) < BEATS_UNTIL_STALE * _beat_s(document)
