"""`auto` becomes a value: how a run is laid out on what the cluster has. Pure, so that it is printed and stored."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """How a run is placed and cut. None of it changes the gradient. Plain data: it travels to the workers."""

    workers: int
    device: str  # cpu or cuda
    gpus_per_worker: float
    cpus_per_worker: float
    zero: int
    offload: str  # none, cpu, nvme
    nvme_path: str | None
    dtype: str  # fp32, bf16, fp16
    attention: str
    packing: bool
    micro_batch_size: int
    gradient_checkpointing: bool
