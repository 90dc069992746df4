"""What one machine says of itself: plain data, asked of the driver and, as a task, of every node."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

PACKAGES = ("ray", "torch", "transformers", "peft", "deepspeed", "trl", "ftray")


@dataclass(frozen=True)
class Facts:
    """Of one machine. Sizes in bytes; `asked_s`, `answered_s`: the driver's clock around `clock_s`, the machine's."""

    where: str
    versions: dict[str, str] = field(default_factory=dict)
    disk: tuple[int, int] = (0, 0)  # free, total, where Ray keeps its files
    shm: tuple[int, int] = (0, 0)
    open_files: int = 0
    gpus_seen: int = 0  # by the driver of the vendor
    gpus_told: float = 0.0  # by Ray
    torch_cuda: str | None = None  # the CUDA that torch was built for
    model: str | None = None  # its fingerprint
    model_problem: str | None = None
    clock_s: float = 0.0
    asked_s: float = 0.0
    answered_s: float = 0.0


def look(where: str, *, model: dict[str, Any] | None, gpus_told: float = 0.0) -> Facts:
    """On the machine itself; `model` is the run's section, with its storage; read where it is given."""
    from ftray.train.cluster import gpus_here, stand_still

    clock_s = time.time()
    stand_still()
    fingerprint, problem = _read(model)
    return Facts(
        where=where,
        versions={"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        disk=_space(tempfile.gettempdir()),
        shm=_space("/dev/shm") if os.path.isdir("/dev/shm") else (0, 0),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        gpus_seen=len(gpus_here()),
        gpus_told=gpus_told,
        torch_cuda=_torch_cuda() if gpus_told else None,
        model=fingerprint,
        model_problem=problem,
        clock_s=clock_s,
    )


def _read(model: dict[str, Any] | None) -> tuple[str | None, str | None]:
    if model is None:
        return None, None
    from ftray.config.schema import Model
    from ftray.errors import FtrayError
    from ftray.models import chain
    from ftray.models.load import fingerprint, load_config
    from ftray.store.paths import Storage

    try:
        section = Model.model_validate({key: value for key, value in model.items() if key != "storage"})
        if section.version:
            section = chain.found(section, Storage(model["storage"]))
        load_config(section)
        return fingerprint(section), None
    except (FtrayError, OSError) as error:
        return None, str(error)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        if package == "ftray" and "ftray" in sys.modules:  # uploaded with a job, not installed
            from ftray import __version__

            return __version__
        return "missing"


def _space(folder: str) -> tuple[int, int]:
    usage = shutil.disk_usage(folder)
    return usage.free, usage.total


def _torch_cuda() -> str | None:
    import torch

    return torch.version.cuda
