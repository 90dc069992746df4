"""Which process holds something, and whether it is still alive."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any


def this_process() -> dict[str, Any]:
    """What tells this process from every other one, on any machine, after any restart."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "boot_id": _boot_id(),
        "pid_namespace": _pid_namespace(),
        "started": _start_ticks(os.getpid()),
    }


def is_gone(process: dict[str, Any]) -> bool | None:
    """True: surely dead. False: surely alive. None: it lives elsewhere, so only its own signs of life can tell.

    Host names repeat between machines, and pids between boots and containers; only where all of them agree does a
    pid say anything. A pid that was given to a new process is told by its start time.
    """
    here = (socket.gethostname(), _boot_id(), _pid_namespace())
    if (process.get("host"), process.get("boot_id"), process.get("pid_namespace")) != here:
        return None
    pid = process.get("pid")
    if not isinstance(pid, int) or pid <= 0:
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # another user's process is alive too
    state, ticks = _stat(pid)
    if state in ("Z", "X"):
        return True
    return ticks is not None and process.get("started") is not None and ticks != process["started"]


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _start_ticks(pid: int) -> int | None:
    return _stat(pid)[1]


def _stat(pid: int) -> tuple[str | None, int | None]:
    """State letter and start time in clock ticks since boot (proc_pid_stat(5)); None where the system has no /proc."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None, None
    fields = text.rpartition(")")[2].split()  # the command before it may hold spaces
    return fields[0], int(fields[19])
