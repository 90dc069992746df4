"""Attention over a packed row: examples lie one after another in [1, T] and none sees another.

Registered with transformers under the name `ftray_varlen`, with a mask function that builds none, so there is no [T, T]
mask. Axes: H heads, K key-value heads, T tokens of a packed row, L tokens of one example, D width of a head.

On CUDA in 16 bits it is torch's ragged flash kernel. Elsewhere each example is attended to alone: on one CPU core, for
examples of 30 to 300 tokens, forward and backward took 33 ms (T = 2139, 8 heads of 32, fp32), where examples grouped by
length into padded batches took 47 to 68 ms, and the [T, T] mask 434 ms.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from ftray.models.heads import inner

NAME = "ftray_varlen"
SHORT = (torch.bfloat16, torch.float16)
PACKABLE_LAYERS = frozenset({"full_attention", "sliding_attention"})


def register() -> str:
    """Makes `ftray_varlen` known to transformers; returns the name for `attn_implementation`. May be called again."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, varlen_attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, no_mask)
    return NAME


def no_mask(q_length: int, kv_length: int, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> None:
    """Refuses what a mask would be needed for: without a mask function, transformers drops masks without a word."""
    if attention_mask is not None or q_length != kv_length:
        raise ValueError(
            f"{NAME} takes neither an attention mask nor a cache; call set_attn_implementation('sdpa') first"
        )


def supports_packing(model: Any) -> bool:
    """Whether examples of a packed row stay apart in this model under `ftray_varlen`.

    False where anything but attention mixes tokens (state-space, linear attention, convolutions), where attention needs
    what sdpa has not (soft caps, sinks, chunks), and where positions are not given by `position_ids` (ALiBi): those
    models are trained padded.
    """
    base = _transformers_model(model)
    config = base.config.get_text_config()
    layer_types = set(getattr(config, "layer_types", None) or ())
    mixes_by_attention = not getattr(base, "_is_stateful", False) and layer_types <= PACKABLE_LAYERS
    plain_scores = not getattr(config, "attn_logit_softcapping", None) and not getattr(config, "alibi", False)
    passes_lengths_on = base._supports_attention_backend and base._supports_flash_attn and base._supports_sdpa
    return bool(mixes_by_attention and plain_scores and passes_lengths_on and not config.is_encoder_decoder)


def varlen_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | Sequence[int] | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each example of a packed row.

    `query` [1, H, T, D], `key` and `value` [1, K, T, D]; `cu_seq_lens_q` is either the int32 tensor of the N+1 borders
    [0, L1, L1+L2, ..., T] or a sequence of the N lengths; without it every row is one example. Returns [1, T, H, D].
    """
    if kwargs.get("softcap") is not None or attention_mask is not None:
        raise ValueError(f"{NAME} takes neither a mask nor a soft cap; use eager for this model")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    dtype = _result_dtype(query, value)
    # torch's CPU kernel takes 1.5 times as long in bf16 as in fp32 with conversions
    computing = torch.float32 if query.device.type == "cpu" and dtype in SHORT else dtype
    query, key, value = query.to(computing), key.to(computing), value.to(computing)
    if cu_seq_lens_q is not None and _has_kernel(query, value, dropout=dropout):
        return _flash_varlen(query, key, value, cu_seq_lens_q, max_length_q, scaling, causal, sliding_window), None
    lengths = [query.shape[2]] if cu_seq_lens_q is None else _lengths(cu_seq_lens_q)
    # split, not slices: its backward is one concatenation, where each slice would fill a whole row with zeros
    parts = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    with torch.autocast(query.device.type, enabled=False):  # it would go back to bf16
        attended = [_one_example(*part, dropout, scaling, causal, sliding_window) for part in parts]
        whole = attended[0] if len(attended) == 1 else torch.cat(attended, 2)
    return whole.transpose(1, 2).to(dtype).contiguous(), None


def _result_dtype(query: torch.Tensor, value: torch.Tensor) -> torch.dtype:
    """As sdpa's: autocast's where it is on (an fp32 norm on queries and keys makes them fp32 beside bf16 values)."""
    device = query.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype


def _one_example(query, key, value, dropout, scaling, causal, sliding_window) -> torch.Tensor:
    length = query.shape[2]
    window = None
    if sliding_window is not None and length > sliding_window:
        past = torch.arange(length, device=query.device)
        distance_LL = past[:, None] - past[None, :]
        window = (distance_LL < sliding_window) & (distance_LL >= 0 if causal else distance_LL > -sliding_window)
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=window,
        dropout_p=dropout,
        scale=scaling,
        is_causal=causal and window is None,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _has_kernel(query: torch.Tensor, value: torch.Tensor, *, dropout: float) -> bool:
    """torch's flash kernel for ragged rows: CUDA (Ampere or newer), 16-bit, heads of 8n <= 256, no dropout."""
    return (
        query.is_cuda
        and query.dtype in SHORT
        and query.shape[-1] == value.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and not dropout
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _flash_varlen(query, key, value, borders, longest, scaling, causal, sliding_window) -> torch.Tensor:
    from torch.nn.attention import varlen

    varlen_attn: Any = varlen.varlen_attn
    if not isinstance(borders, torch.Tensor):
        longest = max(borders)
        borders = pad(torch.tensor(borders, device=query.device).cumsum(0, dtype=torch.int32), (1, 0))
    borders = borders.to(device=query.device, dtype=torch.int32)
    longest = longest or int(borders.diff().max())
    before = -1 if sliding_window is None else sliding_window - 1
    attended_THD = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        borders,
        borders,
        longest,
        longest,
        scale=scaling,
        window_size=(before, 0 if causal else before),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended_THD.unsqueeze(0)


def _lengths(borders_or_lengths: torch.Tensor | Sequence[int]) -> list[int]:
    if not isinstance(borders_or_lengths, torch.Tensor):
        return list(borders_or_lengths)
    borders = borders_or_lengths.tolist()
    return [end - start for start, end in pairwise(borders)]


def _transformers_model(model: Any) -> Any:
    """The transformers model inside PEFT, DeepSpeed and DDP wrappers."""
    while isinstance(getattr(model, "module", None), torch.nn.Module):
        model = model.module
    return inner(model)
