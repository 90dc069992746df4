"""What a run costs as it grows: communication, checkpoints, failures and money, beside `memory.py` and `plan.py`. Pure.

Volumes are bytes that one worker sends (it receives as many) over rings, in which (N-1)/N of a tensor passes each
worker once for a reduce-scatter and once for an all-gather (Rajbhandari et al. 2020, arXiv 1910.02054, section 7).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftray.config.schema import Method
from ftray.train.failures import best_interval_s, expected_s, mtbf_s
from ftray.train.layout import Layout
from ftray.train.memory import WIDTH, learning, predict
from ftray.train.plan import step_seconds

if TYPE_CHECKING:  # it would bring in torch
    from ftray.models.load import Shape

SAVE_S = 1.0  # of a checkpoint at least: workers meet, tensors are copied
STATE_BYTES = 12  # of a weight that learns, in a checkpoint: fp32 master copy and two moments


@dataclass(frozen=True)
class Machines:
    """Bytes and FLOPs a second. `link` is between machines, a GPU's share; `local` within one."""

    gpus_per_node: int = 8
    link: float = 50e9  # 400 Gb/s InfiniBand a GPU, as in a DGX H100
    local: float = 450e9  # NVLink 4, one direction
    storage: float = 10e9  # what all workers together write
    gpu_flops: float = 0.35 * 989e12  # plan.MFU of an H100
    gpu_hour: float = 2.5  # dollars
    restart_s: float = 180.0  # noticing, starting processes, NCCL, reading weights

    def bandwidth(self, workers: int) -> float:
        return self.local if workers <= self.gpus_per_node else self.link


@dataclass(frozen=True)
class Cost:
    """A step and a run on so many GPUs. `exposed_s`: communication that computation does not cover."""

    memory_bytes: int
    compute_s: float
    communication_s: float
    exposed_s: float
    checkpoint_s: float  # training stands still
    written_s: float  # until it is complete, in the background
    interval_s: float  # the best, for the failures to be expected
    efficiency: float  # of the GPU time, what is computation that counts
    tokens_per_s: float
    dollars_per_billion: float  # tokens

    @property
    def step_s(self) -> float:
        return self.compute_s + self.exposed_s


def traffic_bytes(shape: Shape, *, method: Method, layout: Layout, windows: int) -> float:
    """What one worker sends in a step of `windows` micro-batches.

    ZeRO 0: gradients of the whole window once, reduced and gathered. ZeRO 1 and 2: gradients scattered after each
    micro-batch, weights gathered after the step. ZeRO 3: all weights, frozen ones too, gathered for forward and for
    backward of each micro-batch, and gradients scattered.
    """
    width, learns = WIDTH[layout.dtype], learning(shape, method).params
    whole = shape.parameters + learning(shape, method).added
    share = (layout.workers - 1) / layout.workers
    elements = {
        0: 2 * learns,
        1: learns * windows + learns,
        2: learns * windows + learns,
        3: windows * (2 * whole + learns),
    }[layout.zero]
    return elements * width * share


def checkpoint_bytes(shape: Shape, *, method: Method) -> float:
    return STATE_BYTES * learning(shape, method).params


def cost(
    shape: Shape, *, method: Method, layout: Layout, max_length: int, windows: int, machines: Machines | None = None
) -> Cost:
    """Of training in steps of `windows` micro-batches a worker, packed to `max_length`.

    Communication hides behind the backward pass, two thirds of the computation; saving gathers the state through the
    links, then training goes on while it is written.
    """
    machines = machines or Machines()
    tokens = layout.workers * layout.micro_batch_size * max_length * windows
    compute = step_seconds(shape, method=method, layout=layout, tokens=tokens, device_flops=machines.gpu_flops)
    bandwidth = machines.bandwidth(layout.workers)
    communication = traffic_bytes(shape, method=method, layout=layout, windows=windows) / bandwidth
    exposed = max(0.0, communication - 2 / 3 * compute)
    state = checkpoint_bytes(shape, method=method)
    save, written = state / bandwidth, state / machines.storage
    between = mtbf_s(layout.workers)
    restart = machines.restart_s + state / machines.storage
    interval = best_interval_s(save_s=save, restart_s=restart, mtbf_s=between)
    slowed = expected_s(1.0, interval_s=interval, save_s=save, restart_s=restart, mtbf_s=between)
    per_s = tokens / (compute + exposed) / slowed
    return Cost(
        memory_bytes=predict(shape, method=method, layout=layout, optimizer="adamw", max_length=max_length).total,
        compute_s=compute,
        communication_s=communication,
        exposed_s=exposed,
        checkpoint_s=save,
        written_s=written,
        interval_s=interval,
        efficiency=compute / (compute + exposed) / slowed,
        tokens_per_s=per_s,
        dollars_per_billion=1e9 / per_s * layout.workers * machines.gpu_hour / 3600,
    )


def checkpoint_every(shape: Shape, *, method: Method, workers: int, steps: int, step_s: float) -> int:
    """Steps between checkpoints: a twentieth of the run, or fewer where the failures to be expected make that too many.

    So a short run keeps its twenty, and a long or a large one does not bet a day on no machine failing.
    """
    machines = Machines()
    state = checkpoint_bytes(shape, method=method)
    save = max(SAVE_S, state / machines.bandwidth(workers))
    restart = machines.restart_s + state / machines.storage
    interval = best_interval_s(save_s=save, restart_s=restart, mtbf_s=mtbf_s(workers))
    return max(1, min(-(-steps // 20), round(interval / step_s)))
