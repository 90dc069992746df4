"""Offload to NVMe needs an operator of DeepSpeed that is compiled on each machine at first use; here it is made ready.

Left to itself, DeepSpeed builds it in the middle of loading the model, where a missing library ends one worker and
leaves the others waiting, and where the build's lock, a file that outlives a killed process, is waited for without end.
"""

from __future__ import annotations

import atexit
import fcntl
import logging
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ftray.errors import ClusterError

log = logging.getLogger(__name__)

OPERATORS = ("pin_memory", "async_io")
QUIET_S = 600  # a build that has written nothing for so long is dead
LIBAIO = (
    "scale.offload: nvme needs a C++ compiler and libaio with its headers; install libaio (apt: libaio-dev, "
    "dnf: libaio-devel), or use scale.offload: cpu"
)


def make_nvme_ready(path: str) -> None:
    """Builds the operator and tries the folder, before the model is loaded. All workers call it together.

    What this worker swaps there is removed when it ends, and what a killed one left, now. `path` belongs to one run.
    Raises the same ClusterError on every worker where a machine lacks what it needs.
    """
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem(path))
    hosts = sorted({host for host, text in filter(None, problems)})
    if hosts:
        text = next(text for _, text in filter(None, problems))
        raise ClusterError(f"{', '.join(hosts)}: {text}")
    clear(path, dist.get_rank())
    atexit.register(clear, path, dist.get_rank())


def problem(path: str) -> tuple[str, str] | None:
    """(host, what is missing on this machine), or None."""
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder import AsyncIOBuilder

    host = socket.gethostname()
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        probe = Path(path, f".ftray-{host}-{time.monotonic_ns()}")
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        return host, f"scale.nvme_path: cannot write to {path}: {error.strerror}; name a folder on a local NVMe disk"
    if installed_ops.get("async_io"):
        return None
    if not AsyncIOBuilder().is_compatible():
        return host, LIBAIO
    try:
        with alone():
            AsyncIOBuilder().load(verbose=False)
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        return (
            host,
            f"DeepSpeed's operator for scale.offload: nvme does not build here ({reason}); use scale.offload: cpu",
        )
    return None


def clear(path: str, rank: int) -> None:
    """Removes what a worker has swapped."""
    for folder in Path(path).glob(f"zero_stage_3/*/rank{rank}"):
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def alone() -> Iterator[None]:
    """Only one of our processes on this machine builds, and finds no lock that a dead one has left."""
    folders = [_build_folder(name) for name in OPERATORS]
    with (folders[0].parent / "ftray.lock").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # let go by the system when the process ends, however it ends
        file.seek(0)
        killed = bool(file.read())
        for folder in folders:
            _wait_for_others(folder, killed)
        file.truncate(0)
        file.write("building")
        file.flush()
        yield
        file.truncate(0)


def _wait_for_others(folder: Path, killed: bool) -> None:
    lock = folder / "lock"
    while lock.exists():
        if killed or time.time() - _last_write(folder) > QUIET_S:
            log.warning("%s was left by a build that was killed; building again", lock)
            lock.unlink(missing_ok=True)
            return
        time.sleep(0.2)


def _last_write(folder: Path) -> float:
    """Seconds since 1970 of the newest file."""
    times = [folder.stat().st_mtime]
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # the compiler's files come and go
            times.append(path.stat().st_mtime)
    return max(times)


def _build_folder(name: str) -> Path:
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(name, False))
