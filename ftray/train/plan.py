"""Does it fit, what would make it fit, and how long will it take: what `ftray check` says before any GPU is held."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ftray.config.methods import AdaLora, Feature, Lora, Method, Prefix, is_adapter, shards
from ftray.train.layout import Layout, Node
from ftray.train.memory import GIB, Memory, learning, predict

if TYPE_CHECKING:  # it would bring in torch
    from ftray.models.load import Shape

USABLE = 0.9  # of a device's memory; the rest is lost to fragments and to what else runs there

MFU = 0.35  # of the peak, as torchtitan reports for Llama-3.1-8B on H100 (33-39 %)
FP32_SLOWDOWN = 15  # against bf16: fp32 does without tensor cores (H100: 67 TFLOP/s, A100: 19.5)
QUANTISED_SLOWDOWN = 1.3  # torchtune: 3083 tokens/s with LoRA, 2413 with QLoRA
HEAD_STEP_S = 0.003  # a step of a head alone, which is the loop around it
CPU_FLOPS = 30e9  # a core in fp32, from start to end of a step; forward and backward alone reach 66
PEAK_FLOPS = {  # dense bf16 (T4 and V100: fp16), from the vendors' data sheets
    "B300": 2250e12, "B200": 2250e12, "GB200": 2500e12, "GH200": 989e12, "H200": 989e12, "H100": 989e12, "H800": 989e12,
    "H20": 148e12, "A100": 312e12, "A800": 312e12, "A10G": 70e12, "A10": 125e12, "A30": 165e12, "A40": 150e12,
    "A6000": 155e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "5090": 210e12, "4090": 165e12, "3090": 71e12,
    "V100": 125e12, "T4": 65e12, "MI300X": 1307e12, "MI250X": 383e12,
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What a run will need. `memory` in bytes a worker; `device_bytes` what it has, 0 where that is not known.

    `trained` of `parameters` weights learn, those an adapter adds among them. `fits` is True where `device_bytes` is
    not known. `seconds` is the training alone, None for an unknown GPU.
    """

    memory: Memory
    device_bytes: int
    fits: bool
    advice: list[str]
    steps: int
    tokens_per_step: int
    seconds: float | None
    trained: int = 0
    parameters: int = 0

    def lines(self) -> list[str]:
        """For the terminal: a line for each kind of memory, the verdict, what would help, and the time."""
        kinds = {name: size for name, size in asdict(self.memory).items() if name != "total" and size}
        places = {"host": "in RAM", "disk": "on NVMe"}
        rows = [f"  {name:<12}{human_bytes(size):>10}  {places.get(name, '')}".rstrip() for name, size in kinds.items()]
        total = f"  {'total':<12}{human_bytes(self.memory.total):>10}"
        if not self.device_bytes:
            verdict = f"{total}  what a worker has is not known"
        else:
            verdict = f"{total}  of {human_bytes(self.device_bytes)}: {'fits' if self.fits else 'does not fit'}"
        ways = [f"  {'would fit' if not i else '':<12}{way}" for i, way in enumerate(self.advice)]
        time = "time not known for this GPU" if self.seconds is None else f"about {human_seconds(self.seconds)}"
        course = f"Course  {self.steps:,} steps of {self.tokens_per_step:,} tokens, {time} of training"
        share = 100 * self.trained / max(1, self.parameters)
        learns = f"Learns  {self.trained:,} parameters, {share:.3g} % of the base's {self.parameters:,}"
        return [learns, "Memory of one worker, predicted peak", *rows, verdict, *ways, course]

    def to_json(self) -> dict[str, Any]:
        """Plain data; bytes and seconds."""
        return asdict(self)


def make(
    shape: Shape,
    *,
    method: Method,
    layout: Layout,
    optimizer: str,
    max_length: int,
    nodes: Sequence[Node],
    steps: int,
    tokens_per_step: int,
) -> Plan:
    """The plan of a run on these nodes; the smallest device and the slowest GPU count."""
    memory = predict(shape, method=method, layout=layout, optimizer=optimizer, max_length=max_length)
    room = device_bytes(layout, nodes)
    ways = advice(
        shape,
        method=method,
        layout=layout,
        optimizer=optimizer,
        max_length=max_length,
        device_bytes=room or memory.total * 2,
    )
    flops = [device_flops(layout, node.gpu_kind) for node in nodes if node.gpus or layout.device == "cpu"]
    slowest = min((rate for rate in flops if rate), default=None)
    seconds = None
    if slowest:
        each = step_seconds(shape, method=method, layout=layout, tokens=tokens_per_step, device_flops=slowest)
        seconds = steps * each
    return Plan(
        memory=memory,
        device_bytes=room,
        fits=not room or memory.total <= USABLE * room,
        advice=ways,
        steps=steps,
        tokens_per_step=tokens_per_step,
        seconds=seconds,
        trained=learning(shape, method).params,
        parameters=shape.parameters,
    )


def device_bytes(layout: Layout, nodes: Sequence[Node]) -> int:
    """Memory of one worker: its GPU, or its share of the RAM of the smallest node with workers; 0 where not known."""
    if layout.device == "cuda":
        each = [node.gpu_bytes * min(1.0, layout.gpus_per_worker) for node in nodes if node.gpus]
    else:
        seats = [min(layout.workers, int(node.cpus / layout.cpus_per_worker + 1e-9)) for node in nodes]
        each = [node.ram_bytes / count for node, count in zip(nodes, seats, strict=True) if count]
    return int(min(each, default=0))


def device_flops(layout: Layout, gpu_kind: str = "") -> float | None:
    """FLOP/s that a worker sustains in training: MFU x peak, by a GPU's name; None for a GPU we do not know."""
    if layout.device == "cpu":
        return CPU_FLOPS * layout.cpus_per_worker
    words = re.split(r"[^A-Z0-9]+", gpu_kind.upper())
    peak = next((PEAK_FLOPS[word] for word in words if word in PEAK_FLOPS), None)
    return peak and MFU * peak * min(1.0, layout.gpus_per_worker) / (1 if layout.dtype != "fp32" else FP32_SLOWDOWN)


def step_seconds(shape: Shape, *, method: Method, layout: Layout, tokens: int, device_flops: float) -> float:
    """Seconds of one step over `tokens`, shared by all workers. `device_flops`: what one sustains.

    FLOPs a token for N weights that multiply: forward 2N, gradients of what flows 2N, gradients of weights 2 for each
    that learns: 6N in full training (Kaplan et al. 2020, arXiv 2001.08361), about 4N with LoRA, whose base has none;
    2N more where checkpointing computes blocks again. Attention scores are left out: small at usual lengths.
    """
    if isinstance(method, Feature):
        return HEAD_STEP_S
    learns = learning(shape, method)
    head = shape.head_params or shape.embedding_params  # as large as the table, where the model writes
    flowing = head + shape.linear_params * learns.depth / shape.layers
    flops = 2 * (shape.linear_params + head) + 2 * flowing + 2 * learns.matrices
    if is_adapter(method):
        flops += 4 * learns.matrices
    if layout.gradient_checkpointing:
        flops += 2 * shape.linear_params
    slowdown = QUANTISED_SLOWDOWN if getattr(method, "bits", None) else 1.0
    return flops * tokens * slowdown / (layout.workers * device_flops)


def human_bytes(size: float) -> str:
    """31.2 GiB, or 480 MiB below one."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"


def human_worker(*, cpus: float, gpus: float) -> str:
    """What one worker holds: 1 CPU, 2 CPUs; with GPUs, 0.5 GPU."""
    return f"{gpus:g} GPU" if gpus else f"{cpus:g} CPU{'s' if cpus != 1 else ''}"


def human_seconds(seconds: float) -> str:
    """45 s, 12 min, 3 h 20 min, 2 d 4 h."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


def largest_micro_batch(
    shape: Shape,
    *,
    method: Method,
    layout: Layout,
    optimizer: str,
    max_length: int,
    device_bytes: int,
    per_worker_examples: int,
) -> int | None:
    """The largest micro-batch that fits, a power of two or a divisor of a worker's examples a step; None: not 1."""
    sizes = range(per_worker_examples, 0, -1)
    for size in (s for s in sizes if per_worker_examples % s == 0 or s & (s - 1) == 0):
        tried = replace(layout, micro_batch_size=size)
        used = predict(shape, method=method, layout=tried, optimizer=optimizer, max_length=max_length)
        if used.total <= USABLE * device_bytes:
            return size
    return None


@dataclass(frozen=True)
class _Choice:
    method: Method
    layout: Layout
    optimizer: str
    max_length: int

    def memory(self, shape: Shape) -> Memory:
        return predict(
            shape, method=self.method, layout=self.layout, optimizer=self.optimizer, max_length=self.max_length
        )


_Change = tuple[dict[str, Any], _Choice]


def advice(
    shape: Shape, *, method: Method, layout: Layout, optimizer: str, max_length: int, device_bytes: int
) -> list[str]:
    """What would make a run fit, cheapest first, each with the predicted total; empty where it fits.

    Changes that help alone; where none does, the first few together; where all do not, that is said.
    """

    room = USABLE * device_bytes
    choice = _Choice(method, layout, optimizer, max_length)
    if choice.memory(shape).total <= room:
        return []
    singles = []
    for change in _CHANGES:
        fitting = next(((keys, to) for keys, to in change(choice) if to.memory(shape).total <= room), None)
        if fitting:
            singles.append(_say(fitting[0], fitting[1].memory(shape)))
    if singles:
        return singles
    together: dict[str, Any] = {}
    for change in _CHANGES:
        added: dict[str, Any] = {}
        for keys, to in change(choice):
            if to.memory(shape).total < choice.memory(shape).total:
                choice, added = to, keys
            if choice.memory(shape).total <= room:
                break
        together |= added
        if choice.memory(shape).total <= room:
            return [_say(together, choice.memory(shape))]
    return [f"no change is enough: {_say(together, choice.memory(shape))}; take a smaller base, or larger devices"]


def _say(keys: dict[str, Any], memory: Memory) -> str:
    values = (f"{key}: {str(value).lower() if isinstance(value, bool) else value}" for key, value in keys.items())
    beside = f", and {human_bytes(memory.host)} of RAM a worker" if memory.host else ""
    return f"{', '.join(values) or 'as it is'} -> {human_bytes(memory.total)}{beside}"


def _smaller_micro_batch(now: _Choice) -> Iterator[_Change]:
    if now.layout.micro_batch_size > 1:
        yield {"optim.micro_batch_size": 1}, replace(now, layout=replace(now.layout, micro_batch_size=1))


def _checkpointing(now: _Choice) -> Iterator[_Change]:
    if isinstance(now.method, Prefix):
        return
    yield {"scale.gradient_checkpointing": True}, replace(now, layout=replace(now.layout, gradient_checkpointing=True))


def _zero3(now: _Choice) -> Iterator[_Change]:
    if shards(now.method) and not getattr(now.method, "bits", None):
        yield _sharded(now, {"scale.zero": 3}, zero=3)


def _bits(now: _Choice) -> Iterator[_Change]:
    if isinstance(now.method, Lora) and not now.method.bits and now.method.init != "pissa":
        layout = replace(now.layout, zero=min(2, now.layout.zero))
        keys = {"method.bits": 4} | ({"scale.zero": 2} if layout != now.layout else {})
        yield keys, replace(now, method=now.method.model_copy(update={"bits": 4}), layout=layout)


def _more_workers(now: _Choice) -> Iterator[_Change]:
    stages = sorted({max(2, now.layout.zero), 2 if getattr(now.method, "bits", None) or not shards(now.method) else 3})
    for workers in (now.layout.workers * 2**n for n in range(1, 7)):
        for zero in stages:
            keys = {"scale.workers": workers} | ({"scale.zero": zero} if zero != now.layout.zero else {})
            yield _sharded(now, keys, workers=workers, zero=zero)


def _shorter(now: _Choice) -> Iterator[_Change]:
    length = now.max_length // 2
    while length >= 128:
        yield {"data.max_length": length}, replace(now, max_length=length)
        length //= 2


def _offload(now: _Choice) -> Iterator[_Change]:
    if now.layout.offload == "none" and not isinstance(now.method, AdaLora):
        zero = max(2, now.layout.zero)
        keys = {"scale.offload": "cpu"} | ({"scale.zero": zero} if zero != now.layout.zero else {})
        yield _sharded(now, keys, offload="cpu", zero=zero)
        if zero != 3 and shards(now.method) and not getattr(now.method, "bits", None):
            yield _sharded(now, {"scale.offload": "cpu", "scale.zero": 3}, offload="cpu", zero=3)


def _sharded(now: _Choice, keys: dict[str, Any], **layout: Any) -> _Change:
    """A change under which only torch's AdamW is sharded and offloaded."""
    changed = replace(now, layout=replace(now.layout, **layout))
    if changed.layout.zero and now.optimizer != "adamw":
        return {**keys, "optim.optimizer": "adamw"}, replace(changed, optimizer="adamw")
    return keys, changed


_CHANGES = (_smaller_micro_batch, _checkpointing, _zero3, _bits, _more_workers, _shorter, _offload)
