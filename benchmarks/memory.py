"""What a process and all below it hold: the memory column of the benchmarks."""

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
