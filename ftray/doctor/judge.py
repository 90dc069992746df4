"""What the facts mean: one finding a line, each with the way out. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from ftray.doctor.probe import Facts

GIB = 2**30
DISK_FREE = 5 * GIB
DISK_SHARE = 0.05  # Ray stops writing to a disk that is 95 % full
SHM = GIB  # NCCL and the object store; containers have 64 MiB unless said
SKEW_S = 2.0
OPEN_FILES = 4096
SLOW_BYTES_PER_S = 0.1e9


@dataclass(frozen=True)
class Finding:
    """`what` names the fault and where, `way_out` what to do about it."""

    level: Literal["ok", "warning", "fault"]
    about: str
    what: str
    way_out: str = ""

    def line(self) -> str:
        mark = {"ok": "ok      ", "warning": "warning ", "fault": "FAULT   "}[self.level]
        return f"{mark}{self.about:<14}{self.what}{f'; {self.way_out}' if self.way_out else ''}"


@dataclass(frozen=True)
class Reduced:
    """The small all-reduce between nodes: bytes a second, or what went wrong."""

    nodes: int
    bytes_per_s: float = 0.0
    problem: str | None = None


def judge(driver: Facts, nodes: Sequence[Facts], *, reduced: Reduced | None = None) -> list[Finding]:
    """Everything at once; what is in order is a line too."""
    everywhere = [driver, *nodes]
    checks = {
        "versions": _versions(driver, nodes),
        "disk": (found for one in everywhere for found in _disk(one)),
        "shared memory": (found for one in nodes or [driver] for found in _shm(one)),
        "open files": (found for one in everywhere for found in _files(one)),
        "clock": (found for one in nodes for found in _clock(one)),
        "GPUs": (found for one in nodes for found in _gpus(one)),
        "model": _model(everywhere),
        "network": _network(reduced),
    }
    findings = []
    for about, found in checks.items():
        wrong = list(found)
        findings += wrong or [Finding("ok", about, _fine(about, driver, nodes, reduced))]
    return findings


def _versions(driver: Facts, nodes: Sequence[Facts]) -> Iterator[Finding]:
    for node in nodes:
        other = [
            f"{name} {node.versions.get(name, 'missing')} (here {version})"
            for name, version in driver.versions.items()
            if _matters(name, node.versions.get(name, "missing")) != _matters(name, version)
        ]
        if other:
            yield Finding("fault", "versions", f"{node.where} has {', '.join(other)}", "use one image on every node")


def _matters(name: str, version: str) -> str:
    """Of Python the minor version: pickles of one do not load in another. A build's tag, +cpu or +cu128, does not."""
    return ".".join(version.split(".")[:2]) if name == "python" else version.partition("+")[0]


def _disk(one: Facts) -> Iterator[Finding]:
    free, total = one.disk
    if total and (free < DISK_FREE or free / total < DISK_SHARE):
        what = f"{one.where} has {free / GIB:.1f} of {total / GIB:.0f} GiB free"
        yield Finding("fault", "disk", what, "make room under /tmp/ray, or start Ray with --temp-dir on another disk")


def _shm(one: Facts) -> Iterator[Finding]:
    free, total = one.shm
    way_out = "docker run --shm-size or --ipc=host; on Kubernetes an emptyDir of medium Memory at /dev/shm"
    if total < SHM:
        what = f"{one.where} has {total / 2**20:.0f} MiB of /dev/shm: NCCL and objects need more"
        yield Finding("fault", "shared memory", what, way_out)
    elif free < total * DISK_SHARE:
        yield Finding(
            "warning", "shared memory", f"/dev/shm of {one.where} is full", "end what fills it: ls -l /dev/shm"
        )


def _files(one: Facts) -> Iterator[Finding]:
    if 0 < one.open_files < OPEN_FILES:
        what = f"{one.where} may open {one.open_files} files"
        yield Finding("warning", "open files", what, "ulimit -n 65536 before `ray start`")


def _clock(one: Facts) -> Iterator[Finding]:
    """The node's clock must lie between question and answer, so slow answers raise no alarm."""
    off = max(one.asked_s - one.clock_s, one.clock_s - one.answered_s)
    if one.answered_s and off > SKEW_S:
        what = f"the clock of {one.where} is {off:.0f} s off"
        yield Finding("fault", "clock", what, "run an NTP client there: leases and tokens compare times")


def _gpus(one: Facts) -> Iterator[Finding]:
    if one.gpus_told and one.gpus_seen < one.gpus_told:
        what = f"Ray was told of {one.gpus_told:g} GPUs at {one.where}, nvidia-smi sees {one.gpus_seen}"
        yield Finding("fault", "GPUs", what, "look at the driver and at --num-gpus, or the pod's nvidia.com/gpu")
    elif one.gpus_told and one.torch_cuda is None:
        yield Finding(
            "fault", "GPUs", f"torch at {one.where} was built without CUDA", "use the image of Dockerfile.cuda"
        )
    elif one.gpus_seen and not one.gpus_told:
        what = f"{one.where} has {one.gpus_seen} GPUs that Ray does not know"
        yield Finding("warning", "GPUs", what, "start Ray there without --num-gpus=0")


def _model(everywhere: Sequence[Facts]) -> Iterator[Finding]:
    for one in everywhere:
        if one.model_problem:
            way_out = "name a Hub id or a folder that every node mounts, and check HF_TOKEN and HF_HUB_OFFLINE there"
            yield Finding("fault", "model", f"{one.where} cannot read it: {one.model_problem}", way_out)
    kinds = {one.model: one.where for one in everywhere if one.model}
    if len(kinds) > 1:
        yield Finding("fault", "model", f"it differs between {' and '.join(kinds.values())}", "pin model.revision")


def _network(reduced: Reduced | None) -> Iterator[Finding]:
    if reduced is None:
        return
    if reduced.problem:
        what = f"{reduced.nodes} nodes cannot add a tensor up together: {reduced.problem}"
        yield Finding(
            "fault", "network", what, "open all ports between nodes, and set GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME"
        )
    elif reduced.bytes_per_s < SLOW_BYTES_PER_S:
        what = f"an all-reduce moves {reduced.bytes_per_s / 1e9:.2f} GB/s"
        yield Finding("warning", "network", what, "name the fast interface in NCCL_SOCKET_IFNAME")


def _fine(about: str, driver: Facts, nodes: Sequence[Facts], reduced: Reduced | None) -> str:
    if about == "versions":
        return ", ".join(
            f"{name} {driver.versions[name]}" for name in ("python", "ray", "torch") if name in driver.versions
        )
    if about == "GPUs":
        return f"{sum(one.gpus_told for one in nodes):g}"
    if about == "model":
        return "the same everywhere" if driver.model else "not asked: name a run file"
    if about == "network":
        return f"{reduced.bytes_per_s / 1e9:.1f} GB/s all-reduce over {reduced.nodes} nodes" if reduced else "one node"
    return f"on {len(nodes) or 1} nodes"
