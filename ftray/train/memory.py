"""How much memory a worker will need: arithmetic on a model's shape, before any GPU is held.

Sources: ZeRO's model states (Rajbhandari et al. 2020, arXiv 1910.02054); activations tensor by tensor (Korthikanti et
al. 2022, arXiv 2205.05198, section 4), counted anew for Llama-like blocks as transformers writes them; NF4's constants
(Dettmers et al. 2023, arXiv 2305.14314, section 3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ftray.config.methods import (
    PROMPTS,
    AdaLora,
    Bottleneck,
    Feature,
    Freeze,
    Full,
    Ia3,
    LoHa,
    LoKr,
    Lora,
    Method,
    MultitaskPrompt,
    Norms,
    Oft,
    Prefix,
    Prompt,
    PTuning,
    Tokens,
    Vera,
    is_adapter,
)
from ftray.train.layout import READ_TOKENS, Layout

if TYPE_CHECKING:  # it would bring in torch
    from ftray.models.load import Shape

GIB = 2**30
RUNTIME_BYTES = GIB  # CUDA's context, NCCL and library workspaces; on CPUs the interpreter with its libraries
BUCKET = 500_000_000  # elements: DeepSpeed's reduce_bucket_size
LIVE = 1_000_000_000  # elements: DeepSpeed's stage3_max_live_parameters, and max_in_cpu under NVMe
WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}
QUANTISED = {4: 0.5 + 1 / 64 + 4 / (64 * 256), 8: 1.0}  # bytes a weight, quantised constants of NF4 included
ADAM = {"adamw": 8.0, "paged_adamw": 8.0, "adamw_8bit": 2 + 8 / 256, "paged_adamw_8bit": 2 + 8 / 256}  # two moments


@dataclass(frozen=True)
class Memory:
    """Bytes one worker needs at its peak. All but `host` (RAM) and `disk` (NVMe) are on the device and make `total`.

    `overhead`: runtime, communication buffers, gathered weights, and what the optimiser's step needs beyond the room
    that activations and logits have left by then. On CPU workers `host` is the device's memory, so `total` has it too.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    overhead: int
    host: int
    disk: int
    total: int


@dataclass(frozen=True)
class Learning:
    """What a method trains. Sums run over the linear layers that learn or carry an adapter."""

    params: int
    added: int  # of params, what comes on top of the base
    matrices: int  # of params, what multiplies tokens
    adapted: int
    inputs: int
    outputs: int
    weights: int
    depth: int  # blocks whose activations are kept: those from the first that learns


def learning(shape: Shape, method: Method) -> Learning:
    """What a method trains of a base of this shape. Exact but for freeze, which spreads norms over the blocks, and
    multitask_prompt, without the few of each task.

    A head that reads learns with every method; adapters put a copy of it beside the base.
    """
    if isinstance(method, Feature):  # the head alone; the base reads a block at a time and keeps nothing
        return _over({}, shape.head_params, shape.head_params, shape.head_params, 1)
    learns = _learning(shape, method)
    if not shape.head_params or isinstance(method, Full):
        return learns
    return replace(
        learns,
        params=learns.params + shape.head_params,
        added=learns.added + shape.head_params * is_adapter(method),
        matrices=learns.matrices + shape.head_params,
    )


def _learning(shape: Shape, method: Method) -> Learning:
    head = 0 if shape.tied or shape.head_params else shape.embedding_params
    others = max(0, shape.parameters - shape.embedding_params - head - shape.linear_params - shape.head_params)
    if isinstance(method, Full):
        matrices = shape.linear_params + shape.embedding_params
        return _over(shape.linears, shape.parameters, 0, matrices, shape.layers)
    if isinstance(method, Lora):
        every = {**shape.linears, "embed_tokens": (shape.vocab_size, shape.hidden_size)}
        named = method.targets if method.targets != "auto" else list(shape.linears)
        chosen = {name: sides for name, sides in every.items() if _is_named(name, named)}
        pairs = sum(method.rank * (i + o) + (o if method.dora else 0) for i, o in chosen.values())
        whole = {**every, "lm_head": (shape.hidden_size, shape.vocab_size)}
        saved = sum(i * o for name, (i, o) in whole.items() if _is_named(name, method.modules_to_save))
        linears = {name: sides for name, sides in chosen.items() if name in shape.linears}
        return _over(linears, pairs + saved, pairs + saved, pairs + saved, shape.layers)
    if isinstance(method, Freeze):
        return _freezing(shape, method, head=head, others=others)
    return _adapting(shape, method)


def _adapting(shape: Shape, method: Method) -> Learning:
    """PEFT's other methods, and bottlenecks: parameters layer by layer, as each lays them out."""
    from ftray.models.layers import is_attention_out, is_keys_or_values, is_mlp_out

    hidden, layers = shape.hidden_size, dict(shape.linears)
    named: Any = getattr(method, "targets", "auto")
    if named != "auto":
        layers = {name: both for name, both in layers.items() if _is_named(name, named)}
    if isinstance(method, Ia3):
        if named == "auto":
            layers = {name: both for name, both in layers.items() if is_keys_or_values(name) or is_mlp_out(name)}
        params = sum(i if is_mlp_out(name) else o for name, (i, o) in layers.items())
    elif isinstance(method, Bottleneck):
        if named == "auto":
            houlsby = method.placement == "houlsby"
            layers = {
                name: both for name, both in layers.items() if is_mlp_out(name) or (houlsby and is_attention_out(name))
            }
        places = len(layers) or len(named) * shape.layers
        params = places * (2 * hidden * method.size + method.size + hidden)
    elif isinstance(method, AdaLora):
        params = sum(method.first_rank * (i + o + 1) for i, o in layers.values())
    elif isinstance(method, LoHa):
        params = sum(2 * method.rank * (i + o) for i, o in layers.values())
    elif isinstance(method, LoKr):
        params = sum(_kronecker(method, inputs=i, outputs=o) for i, o in layers.values())
    elif isinstance(method, Oft):
        params = sum(i // method.block * (method.block * (method.block - 1) // 2) for i, _ in layers.values())
    elif isinstance(method, Vera):
        params = sum(method.rank + o for _, o in layers.values())
    else:
        params, layers = _apart_from_layers(shape, method), {}
    return _over(layers, params, params, params, shape.layers)


def _apart_from_layers(shape: Shape, method: Method) -> int:
    hidden = shape.hidden_size
    if isinstance(method, Norms):
        return shape.norm_params
    if isinstance(method, Tokens):
        return len(set(method.tokens)) * hidden
    if isinstance(method, Prompt | MultitaskPrompt):
        return method.tokens * hidden
    if isinstance(method, PTuning):
        width = method.width
        return method.tokens * hidden + (hidden + 1) * width + (width + 1) * width + (width + 1) * hidden
    assert isinstance(method, Prefix)
    own = shape.kv_heads * shape.head_dim
    if method.projection is None:
        return method.tokens * 2 * shape.layers * own
    return method.tokens * own + (own + 1) * method.projection + (method.projection + 1) * 2 * shape.layers * own


def _kronecker(method: LoKr, *, inputs: int, outputs: int) -> int:
    """LoKr's factors of one layer: a small whole one, and a large one of low rank where that is smaller."""
    factor = method.factor if method.factor is not None else -1
    (in_small, in_large), (out_small, out_large) = _factors(inputs, factor), _factors(outputs, factor)
    small = out_small * in_small
    if method.rank < max(out_large, in_large) / 2:
        return small + method.rank * (out_large + in_large)
    return small + out_large * in_large


def _factors(size: int, factor: int) -> tuple[int, int]:
    """Two factors, the smaller first: `factor` if it divides, else the nearest pair whose smaller is at most it."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = size if factor == -1 else factor
    small = max(one for one in range(1, math.isqrt(size) + 1) if size % one == 0 and one <= max(1, most))
    return small, size // small


def _freezing(shape: Shape, method: Freeze, *, head: int, others: int) -> Learning:
    from ftray.models.adapt import matches

    first = shape.layers - method.last_layers
    patterns = method.train
    chosen = {
        name: sides
        for name, sides in shape.linears.items()
        if _block(name, shape) >= first or any(matches(f"{name}.weight", p) for p in patterns)
    }
    embeddings = method.embeddings or any(matches("model.embed_tokens.weight", p) for p in patterns)
    top = method.head or any(matches("lm_head.weight", p) for p in patterns)
    tables = shape.embedding_params * (embeddings or (top and shape.tied)) + head * top
    norms = others if method.norms else (others - shape.hidden_size) * method.last_layers // shape.layers
    start = 0 if embeddings or method.norms else min([shape.layers, *(max(0, _block(name, shape)) for name in chosen)])
    weights = sum(i * o for i, o in chosen.values())
    return _over(chosen, weights + tables + norms, 0, weights + tables, shape.layers - start)


def _over(linears: dict[str, tuple[int, int]], params: int, added: int, matrices: int, depth: int) -> Learning:
    sides = linears.values()
    inputs, outputs, weights = (
        sum(f) for f in ((i for i, _ in sides), (o for _, o in sides), (i * o for i, o in sides))
    )
    return Learning(params, added, matrices, len(linears), inputs, outputs, weights, depth)


def _is_named(name: str, targets: list[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _block(name: str, shape: Shape) -> int:
    """The block a layer is in; -1 outside of blocks."""
    return next((int(part) for part in name.split(".") if part.isdigit() and int(part) < shape.layers), -1)


def predict(shape: Shape, *, method: Method, layout: Layout, optimizer: str, max_length: int) -> Memory:
    """The peak of one worker that holds micro_batch_size examples of max_length tokens, all of them trained: the worst
    case. An example may be several such texts (`layout.sequences`).

    Model states in bytes a learnt weight, for N workers (ZeRO, arXiv 1910.02054, section 3, bf16):
      zero 0   4 weight, 2 its autocast copy, 4 gradient, 8 moments; nothing is shared out
      zero 1   2 weight, 2 gradient, 12/N master copy and moments; the step turns gradients to fp32: 4/N
      zero 2   as 1, gradients 2/N          zero 3   as 2, weights 2/N, frozen ones too
    Offload puts the master copy, moments and fp32 gradients into `host` or `disk`, and under zero 3 the weights.
    """
    learns, width = learning(shape, method), WIDTH[layout.dtype]
    virtual = method.tokens if isinstance(method, PROMPTS) else 0
    tokens = layout.micro_batch_size * layout.sequences * (max_length + virtual)
    if isinstance(method, Feature):
        tokens = max(max_length, READ_TOKENS[layout.device])
    share = layout.workers if layout.zero else 1
    bits = getattr(method, "bits", None)
    autocast = _autocasts(layout)

    frozen = shape.parameters - (learns.params - learns.added)
    quantised = min(shape.linear_params, frozen) if bits else 0
    weights = (frozen - quantised) * width + quantised * (QUANTISED[bits] if bits else width)
    weights += learns.params * (width if layout.zero else 4) + autocast * width * learns.matrices
    gradients = learns.params * (width if layout.zero else 4) / (share if layout.zero >= 2 else 1)
    moments = learns.params * (ADAM[optimizer] + 4 * (layout.zero > 0)) / share
    fp32_gradients = 4 * learns.params / share if layout.zero else 0
    sharded = layout.zero == 3 and not bits
    overhead = RUNTIME_BYTES + _buffers(shape, learns, layout, bits)
    if sharded:
        weights /= share

    host = disk = 0.0
    if layout.offload != "none":
        away = moments + (weights if sharded else 0)
        host, disk = (away, 0.0) if layout.offload == "cpu" else (LIVE * width, away)
        host += fp32_gradients
        moments = gradients = fp32_gradients = 0
        weights = 0 if sharded else weights
    elif "paged" in optimizer and layout.device == "cuda":
        host, moments = moments, 0

    activations = tokens * _activations(shape, learns, method, layout, max_length)
    if isinstance(method, Lora) and method.dora:
        activations += width * learns.weights / (shape.layers if layout.gradient_checkpointing else 1)
    # fp32: log-probabilities, and the gradients into and out of them; a head that reads has a few a text
    logits = 0 if shape.head_params else 12 * tokens * shape.vocab_size
    step = fp32_gradients if layout.zero else 4 * min(BUCKET, learns.params) * (layout.workers > 1)
    overhead += max(0, step - activations - logits)
    weights += width * layout.beside
    total = weights + gradients + moments + activations + logits + overhead + (host if layout.device == "cpu" else 0)
    return Memory(*map(int, (weights, gradients, moments, activations, logits, overhead, host, disk, total)))


def _autocasts(layout: Layout) -> bool:
    return layout.zero == 0 and layout.dtype != "fp32"


def _buffers(shape: Shape, learns: Learning, layout: Layout, bits: int | None) -> float:
    """Bytes of DeepSpeed's buffers and of weights that are made whole to compute with.

    On CUDA stages 1 and 2 hold two whole buckets, however little learns; on CPUs a page counts when it is written.
    """
    width, cuda = WIDTH[layout.dtype], layout.device == "cuda"
    bucket = width * (BUCKET if cuda else min(BUCKET, learns.params))
    whole = {0: 0, 1: bucket * (1 + cuda), 2: bucket * (1 + cuda), 3: bucket}[layout.zero]
    if layout.zero == 3 and (layout.workers > 1 or layout.offload != "none"):
        whole += width * min(LIVE, shape.parameters)
    if bits:
        whole += width * max((i * o for i, o in shape.linears.values()), default=0)
    return whole


def _activations(shape: Shape, learns: Learning, method: Method, layout: Layout, max_length: int) -> float:
    """Bytes a token that are kept for the backward pass, logits apart: blocks, or their inputs and one block."""
    width, hidden = WIDTH[layout.dtype], shape.hidden_size
    stream = 4 if _autocasts(layout) and isinstance(method, Full) else width  # fp32 embeddings and norms widen it
    block = _block_activations(shape, learns, method, layout, max_length, stream)
    last_norm = hidden * (4 + (stream + width if isinstance(method, Full) else 0))
    if layout.gradient_checkpointing:
        return shape.layers * hidden * stream + block + last_norm
    return learns.depth * block + last_norm


def _block_activations(
    shape: Shape, learns: Learning, method: Method, layout: Layout, max_length: int, stream: int
) -> float:
    """Bytes a token of one block, tensor by tensor as transformers' Llama saves them (h hidden, q and k widths, I MLP).

    Norms: their input in fp32, and what the weight multiplies where it learns. Attention without scores (flash, sdpa):
    q, k, v and its output; padded rows repeat k and v for every head and keep a mask of max_length. MLP: gate, its
    activation, up. Inputs of linear layers: only where something learns (LoRA's share), once for all that read them,
    but once for each under autocast and dropout, which make copies.
    """
    width, cuda, hidden = WIDTH[layout.dtype], layout.device == "cuda", shape.hidden_size
    q, k, mlp = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.intermediate_size
    depth, lora = max(1, learns.depth), method if isinstance(method, Lora) else None

    norms = 2 * hidden * (4 + (0 if is_adapter(method) and not isinstance(method, Norms) else stream))
    if layout.packing:
        attention = (2 * q + 2 * k) * (width if cuda else 4) + (0 if cuda else q * width)
    else:
        attention = 4 * q * width + max_length * width
    if layout.attention == "eager":
        attention += shape.heads * max_length * (4 if width == 4 else 4 + width)
    wide = sum(o for i, o in shape.linears.values() if i == hidden and o in (mlp, 2 * mlp)) / (shape.layers * mlp)
    inner = (1 if wide == 1 else 3) * mlp * width

    each = learns.inputs / depth
    dropped = bool(getattr(method, "dropout", 0.0))
    copies = dropped or _autocasts(layout)
    inputs = (each if copies else min(each, 2 * hidden + mlp)) * width
    rank = getattr(method, "first_rank", getattr(method, "rank", getattr(method, "size", 0)))
    inputs += rank * learns.adapted / depth * width if is_adapter(method) and not lora else 0
    inputs += dropped * each * (1 if cuda else width if layout.zero else 4)  # the mask
    if lora:
        inputs += lora.rank * learns.adapted / depth * width
        inputs += lora.dora * 2 * learns.outputs / depth * width
    return norms + attention + inner + inputs
