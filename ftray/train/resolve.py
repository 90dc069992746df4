"""`auto` becomes a value: how a run is laid out on what the cluster has. Pure, so that it is printed and stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ftray.config.methods import PROMPTS, Feature, Method, Prefix, shards
from ftray.config.schema import Run, Scale
from ftray.errors import ClusterError, ConfigError, ModelError
from ftray.models.load import Shape
from ftray.train import plan
from ftray.train.layout import Layout, Node

CPU_TOKENS = 4096  # tokens of a micro-batch on CPUs: more gained nothing on two cores
CPU_PADDED = 8  # examples of one that is padded: neighbours in length, so that less of it is padding


def place(scale: Scale, nodes: Sequence[Node]) -> tuple[float, float]:
    """(gpus, cpus) per worker, with `auto` resolved to what lets the workers start at once: of a range as many as can.

    Raises ClusterError at once when they cannot: Ray would wait in silence for nodes that never come.
    """
    gpus = scale.gpus_per_worker
    if gpus == "auto":
        gpus = 1.0 if any(node.gpus for node in nodes) else 0.0
    cpus = scale.cpus_per_worker
    candidates = [cpus] if cpus != "auto" else [float(c) for c in range(16, 0, -1)]
    for wanted in range(scale.most, scale.least - 1, -1):
        for candidate in candidates:
            if seats(nodes, gpus, candidate) >= wanted:
                return gpus, candidate
    raise ClusterError(_too_many(scale, nodes, gpus=gpus, cpus=candidates[-1]))


def seats(nodes: Sequence[Node], gpus: float, cpus: float) -> int:
    return sum(int(min(n.cpus / cpus + 1e-9, (n.gpus / gpus + 1e-9) if gpus else n.cpus / cpus + 1e-9)) for n in nodes)


def _too_many(scale: Scale, nodes: Sequence[Node], *, gpus: float, cpus: float) -> str:
    room = seats(nodes, gpus, cpus)
    need = f"{cpus:g} CPU" + (f" and {gpus:g} GPU" if gpus else "")
    have = ", ".join(f"{n.name}: {n.cpus:g} CPU" + (f" {n.gpus:g} GPU" if n.gpus else "") for n in nodes) or "no nodes"
    way_out = f"set scale.workers: {room}" if room else "add nodes"
    smaller = ", or a smaller cpus_per_worker" if room < scale.least and not gpus else ", or add nodes"
    return (
        f"scale.workers: {scale.least} workers with {need} each, and the cluster has room for {room} ({have}); "
        f"{way_out}{smaller if room else ''}"
    )


def lay_out(run: Run, *, nodes: Sequence[Node], shape: Shape, packs: bool, beside: int = 0) -> Layout:
    """The layout of a run on these nodes. `packs`: the model keeps packed examples apart; `beside` as in Layout."""
    scale, method = run.scale, run.method
    gpus, cpus = place(scale, nodes)
    device = "cuda" if gpus else "cpu"
    dtype = run.model.dtype
    if dtype == "auto":
        dtype = "bf16" if device == "cuda" else "fp32"
    if dtype == "fp16" and device == "cpu":
        raise ClusterError("model.dtype: fp16 needs GPUs; use fp32 or bf16 here")
    if run.data.packing == "on" and not packs:
        raise ModelError(f"data.packing: {run.model.base} would let packed examples see each other; use auto or off")
    packing = packs and run.data.packing != "off" and not isinstance(method, PROMPTS)
    attention: str = run.model.attention
    if attention == "auto":
        attention = "ftray_varlen" if packing else "sdpa"
    elif packing and attention in ("eager", "sdpa"):
        packing = False  # those kernels know no packed rows
    layout = Layout(
        workers=scale.least,  # what fits must fit when only these are left
        device=device,
        gpus_per_worker=gpus,
        cpus_per_worker=cpus,
        zero=0,
        offload=scale.offload,
        nvme_path=f"{scale.nvme_path.rstrip('/')}/{run.name}" if scale.nvme_path else None,  # runs may share a disk
        dtype=dtype,
        attention=attention,
        packing=packing,
        micro_batch_size=1,
        gradient_checkpointing=scale.gradient_checkpointing is True,
        beside=beside,
        sequences=run.objective.sequences,
        largest_weight=max([shape.embedding_params, *(a * b for a, b in shape.linears.values())]),
    )
    memory = min((node.gpu_bytes for node in nodes if node.gpus), default=0) if device == "cuda" else 0
    layout = replace(layout, zero=_zero(run, layout, shape, memory))
    if dtype == "fp16" and layout.zero == 0:
        raise ConfigError(run.name, [("scale.zero", "fp16 keeps its fp32 copy in ZeRO; use zero: 1 or more, or bf16")])
    return replace(_sized(run, layout, shape, memory, method), workers=min(scale.most, seats(nodes, gpus, cpus)))


def _zero(run: Run, layout: Layout, shape: Shape, memory: int) -> int:
    """ZeRO 2 spreads what learns; 3 spreads the weights too and talks more, so only where 2 does not fit."""
    scale = run.scale
    if scale.zero != "auto":
        return scale.zero
    if run.optim.optimizer != "adamw":
        return 0
    if scale.offload != "none":
        return 3 if scale.offload == "nvme" else 2
    least = 1 if layout.dtype == "fp16" else 0
    if scale.most == 1 or isinstance(run.method, Feature):
        return least
    if memory and shards(run.method) and not getattr(run.method, "bits", None):
        used = plan.predict(
            shape,
            method=run.method,
            layout=replace(layout, zero=2, gradient_checkpointing=True),
            optimizer=run.optim.optimizer,
            max_length=run.data.max_length,
        )
        if used.total > plan.USABLE * memory:
            return 3
    return 2


def _sized(run: Run, layout: Layout, shape: Shape, memory: int, method: Method) -> Layout:
    """Micro-batch size and gradient checkpointing: the largest that is predicted to fit; on CPUs what caches like."""
    each = -(-run.optim.batch_size * run.objective.per_row // layout.workers)
    micro, checkpointing = run.optim.micro_batch_size, run.scale.gradient_checkpointing
    if isinstance(method, Feature):
        chosen = each if micro == "auto" else micro  # of vectors, which are small
        return replace(layout, micro_batch_size=chosen, gradient_checkpointing=False)
    if isinstance(method, Prefix):
        checkpointing = False  # its keys and values are a cache, which recomputing a block would fill again
    if not memory:
        most = CPU_TOKENS // run.longest if layout.packing else min(CPU_PADDED, CPU_TOKENS // run.longest)
        chosen = min(each, max(1, most)) if micro == "auto" else micro
        return replace(layout, micro_batch_size=chosen, gradient_checkpointing=checkpointing is True)
    for recompute in (False, True) if checkpointing == "auto" else (checkpointing,):
        tried = replace(layout, gradient_checkpointing=recompute)
        largest = plan.largest_micro_batch(
            shape,
            method=method,
            layout=tried,
            optimizer=run.optim.optimizer,
            max_length=run.data.max_length,
            device_bytes=memory,
            per_worker_examples=each,
        )
        if largest and (micro == "auto" or largest >= micro):
            return replace(tried, micro_batch_size=largest if micro == "auto" else micro)
    smallest = 1 if micro == "auto" else micro
    return replace(layout, micro_batch_size=smallest, gradient_checkpointing=checkpointing is not False)
