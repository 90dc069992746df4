"""What a process and all below it hold, and how long they computed: columns of the benchmarks."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import psutil


def held(pid: int) -> int:
    """Bytes that a process and all below it hold together, each with its share of what it shares (PSS)."""
    total = 0
    with suppress(psutil.Error):
        parent = psutil.Process(pid)
        for one in [parent, *parent.children(recursive=True)]:
            with suppress(OSError, StopIteration):
                lines = Path(f"/proc/{one.pid}/smaps_rollup").read_text().splitlines()
                total += 1024 * int(next(line.split()[1] for line in lines if line.startswith("Pss:")))
    return total


def computed(pid: int) -> dict[int, float]:
    """Processor seconds so far of a process and all below it that live now, by process."""
    found = {}
    with suppress(psutil.Error):
        parent = psutil.Process(pid)
        for one in [parent, *parent.children(recursive=True)]:
            with suppress(psutil.Error):
                times = one.cpu_times()
                found[one.pid] = times.user + times.system
    return found
