"""Machines, and how a run is placed on them and cut: plain data that travels to the workers."""

from __future__ import annotations

from dataclasses import dataclass

READ_TOKENS = {"cpu": 1024, "cuda": 32768}
"""Padded tokens that a frozen base reads at once, by device; a CPU is no faster with more."""


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
    beside: int = 0  # weights of another model that stands whole and frozen in every worker
    sequences: int = 1  # texts of data.max_length in an example
    largest_weight: int = 100_000_000  # numbers in the model's largest weight, which NVMe buffers must hold


@dataclass(frozen=True)
class Node:
    """What one machine offers. `gpu_bytes`: memory of one GPU."""

    name: str
    cpus: float
    gpus: float = 0.0
    gpu_bytes: int = 0
    gpu_kind: str = ""
    ram_bytes: int = 0
