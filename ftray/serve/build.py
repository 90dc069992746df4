"""From a serve file to an engine: which kind, how much it may hold, the base loaded and laid out."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from ftray.config.schema import Full, Model
from ftray.config.serving import BankEngine as BankSection
from ftray.config.serving import Serving, ServingEngine, VllmEngine
from ftray.errors import ModelError, ServeError
from ftray.models.encoder import is_encoder
from ftray.models.load import Shape, load_base, load_config, load_tokenizer
from ftray.serve.engine import EngineFacts

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
LONGEST = 4096
CACHE_SHARE = 0.4
"""Of the memory that is free once the base is loaded."""


def engine_kind(serving: Serving) -> str:
    """auto resolved: vllm beside a GPU where it is installed, encoder for an encoder, else bank."""
    kind = serving.engine.kind
    if kind != "auto":
        return kind
    if is_encoder(load_config(serving.model)):
        return "encoder"
    import torch

    if torch.cuda.is_available() and importlib.util.find_spec("vllm") is not None:
        return "vllm"
    return "bank"


def build_engine(serving: Serving) -> Any:
    """The engine that the serve file asks for, ready. ServeError, ModelError when it cannot be."""
    kind = engine_kind(serving)
    if kind == "vllm":
        from ftray.serve.vllm import build_vllm_engine

        section = serving.engine if isinstance(serving.engine, VllmEngine) else VllmEngine()
        return build_vllm_engine(serving, section)
    if kind == "encoder":
        from ftray.serve.encoder import build_encoder_engine

        return build_encoder_engine(serving)
    return bank_engine(serving, serving.engine if isinstance(serving.engine, BankSection) else BankSection())


def bank_engine(serving: Serving, section: BankSection) -> Any:
    """The bank engine over the base of a serve file."""
    import torch

    from ftray.models.turns import stop_ids
    from ftray.serve import native
    from ftray.serve.bank import Bank
    from ftray.serve.cache import Cache
    from ftray.serve.lanes import Lane, OwnLanes
    from ftray.serve.loop import BankEngine
    from ftray.serve.pack import pack
    from ftray.serve.stepper import Settings

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(threads(serving.engine))
    dtype = dtype_of(serving.model, device)
    config = load_config(serving.model)
    shape = Shape.from_config(config)
    tokenizer = load_tokenizer(serving.model)
    base = load_base(serving.model, method=Full(), dtype=dtype, attention="sdpa").to(device).requires_grad_(False)
    _check_attention(base)
    eos_ids = frozenset(stop_ids(base, tokenizer))
    adapters = serving.adapters
    bank = Bank(base, slots=adapters.slots, max_rank=adapters.max_rank, dtype=dtype, device=device)
    pack(bank, base)
    lane = Lane(base, bank=bank)
    length = max_length(section, shape)
    quick = bank.compiled.native if bank.compiled and shape.head_dim in native.WIDTHS else None
    sizes: dict[str, Any] = {
        "layers": shape.layers,
        "length": length,
        "heads": shape.kv_heads,
        "width": shape.head_dim,
        "dtype": torch.float32 if device.type == "cpu" and quick is None else dtype,
    }
    cache = Cache(rows=cache_rows(section, Cache.bytes_per_row(**sizes), device), device=device, native=quick, **sizes)
    _try_out(lane, cache)
    return BankEngine(
        facts=EngineFacts(
            kind="bank",
            base=serving.model.base,
            dtype=next(short for short, name in DTYPES.items() if getattr(torch, name) is dtype),
            device=str(device),
            max_length=length,
            vocab_size=shape.vocab_size,
            room={"bank": adapters.slots, "own": adapters.own},
        ),
        settings=Settings(min(section.max_batch, len(cache.rows)), section.prefill_chunk, section.prefix_cache),
        lane=lane,
        bank=bank,
        own=OwnLanes(serving.model, dtype=dtype, device=device),
        cache=cache,
        tokenizer=tokenizer,
        eos_ids=eos_ids,
    )


def threads(section: ServingEngine) -> int:
    """CPU threads: what is asked for, or else what Ray or the environment reserved for this process, or 1."""
    asked = getattr(section, "threads", "auto")
    return int(os.environ.get("OMP_NUM_THREADS") or 1) if asked == "auto" else int(asked)


def dtype_of(model: Model, device: Any) -> Any:
    """auto: bf16 on GPUs, fp32 on CPUs."""
    import torch

    if model.dtype != "auto":
        return getattr(torch, DTYPES[model.dtype])
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def max_length(section: BankSection, shape: Shape) -> int:
    """ServeError when more is asked for than the model can."""
    if section.max_length == "auto":
        return min(shape.max_positions or LONGEST, LONGEST)
    if shape.max_positions and section.max_length > shape.max_positions:
        raise ServeError(
            f"engine.max_length: {section.max_length} is more than the model's {shape.max_positions}; lower it"
        )
    return section.max_length


def cache_rows(section: BankSection, row_bytes: int, device: Any) -> int:
    """How many sequences the cache's memory holds; twice the batch at most, so that ended ones may stay.

    ServeError when not even one fits.
    """
    room = section.cache_gb * 2**30 if section.cache_gb != "auto" else CACHE_SHARE * _free_bytes(device)
    rows = min(int(room // row_bytes), 2 * section.max_batch)
    if rows < 1:
        raise ServeError(
            f"engine.cache_gb: a sequence of engine.max_length takes {row_bytes / 2**30:.2f} GB of keys and values, "
            f"and there is room for {room / 2**30:.2f}; lower max_length, or give the cache more"
        )
    return rows


def _free_bytes(device: Any) -> int:
    """What is free on the device; on CPUs also within the container's limit."""
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 8 * 2**30)
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        return free if limit == "max" else min(free, max(0, int(limit) - int(used)))
    except (OSError, ValueError):  # no second version of control groups here
        return free


def _try_out(lane: Any, cache: Any) -> None:
    """ModelError for a model that the bank engine's attention or cache is not made for, before anybody asks it."""
    try:
        lane.try_out(cache)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError) as error:
        said = " ".join(str(error).split())[:200]
        raise ModelError(
            f"model.base: the bank engine cannot run a {type(lane.model).__name__} ({said}); use engine.kind: vllm"
        ) from error


def _check_attention(model: Any) -> None:
    """ModelError for a model whose tokens are mixed by more than plain attention with a cache of keys and values."""
    from ftray.models.attention import PACKABLE_LAYERS

    config = model.config.get_text_config()
    other = set(getattr(config, "layer_types", None) or ()) - PACKABLE_LAYERS
    if other or getattr(model, "_is_stateful", False) or not model._supports_attention_backend:
        kind = ", ".join(sorted(other)) or type(model).__name__
        raise ModelError(
            f"model.base: the bank engine serves decoders with plain attention, not {kind}; use kind: vllm"
        )
