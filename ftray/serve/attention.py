"""Attention of one engine step: new tokens of many sequences against each sequence's own row of the cache.

Registered with transformers as `ftray_cached`. A step's tokens lie in one packed row: first one token for each
sequence that is being answered, then pieces of prompts. Axes: T tokens, R cache rows, H heads, K key-value heads,
G = H / K, L positions, D width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from ftray.serve.cache import Cache, Row

NAME = "ftray_cached"
SHORT_LENGTH = 320
"""Below it, on CPUs, two batched products beat the fused kernel (0.35 against 0.44 ms at 96 positions, 32 rows)."""


@dataclass(frozen=True)
class Chunk:
    """A piece of a prompt: tokens `begin`..`end` of the step, at positions from `position` of a row."""

    row: Row
    begin: int
    end: int
    position: int


class Step:
    """Where a step's tokens belong. Built once, used by every layer.

    `rows` and `positions` are those of the tokens that continue answers, which come first in the step.
    """

    def __init__(self, cache: Cache, rows: list[Row], positions: list[int], chunks: list[Chunk]):
        self.cache, self.chunks = cache, chunks
        self.decoding = len(rows)
        if not rows:
            return
        device = cache.device
        index_T = torch.tensor([row.index for row in rows])
        position_T = torch.tensor(positions)
        head_K = torch.arange(cache.heads)
        self.flat = (
            ((index_T[:, None] * cache.heads + head_K) * cache.length + position_T[:, None]).flatten().to(device)
        )
        """Where [T, K] keys go in a slab seen as [R * K * L, D]."""
        self.length = max(positions) + 1
        extent = int(index_T.max()) + 1
        in_order = bool((index_T[1:] > index_T[:-1]).all())
        if extent * 2 <= len(rows) * 3:
            # Most rows up to the last one are in use: look at all of them, and throw the others' answers away.
            self.picked = None
            self.extent = extent
            self.place = None if in_order and extent == len(rows) else index_T.to(device)
        else:
            self.picked = index_T.to(device)
            self.extent = len(rows)
            self.place = None
        last_R = torch.zeros(self.extent, dtype=torch.long)
        last_R[torch.arange(len(rows)) if self.place is None else index_T] = position_T
        self.last_R = last_R.to(device)
        self._masks: dict[int | None, torch.Tensor] = {}

    def mask(self, window: int | None) -> torch.Tensor:
        """[R, 1, 1, L] to add to scores: 0 where a row's newest token looks, else minus infinity."""
        if window not in self._masks:
            place_L = torch.arange(self.length, device=self.last_R.device)
            sees_RL = place_L <= self.last_R[:, None]
            if window is not None:
                sees_RL &= place_L > self.last_R[:, None] - window
            mask = torch.zeros(sees_RL.shape, dtype=self.cache.dtype, device=sees_RL.device)
            self._masks[window] = mask.masked_fill_(~sees_RL, float("-inf"))[:, None, None]
        return self._masks[window]


def register() -> str:
    """Makes `ftray_cached` known to transformers; returns the name for `set_attn_implementation`."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, cached_attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _no_mask)
    return NAME


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The step knows which positions a token sees."""


def cached_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    step: Step | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, H, T, D], key and value [1, K, T, D]; stores the new keys and values, returns [1, T, H, D]."""
    assert step is not None, "the engine passes its step to the model"
    layer = module.layer_idx
    assert isinstance(layer, int)
    keys, values = step.cache.keys[layer], step.cache.values[layer]
    dtype = query.dtype
    if dtype != keys.dtype:
        query, key, value = query.to(keys.dtype), key.to(keys.dtype), value.to(keys.dtype)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    done = []
    if step.decoding:
        _store(step, keys, key)
        _store(step, values, value)
        done.append(_decode(step, query[0, :, : step.decoding], keys, values, scale, sliding_window, softcap))
    for chunk in step.chunks:
        piece = slice(chunk.begin, chunk.end)
        end = chunk.position + chunk.end - chunk.begin
        keys[chunk.row.index, :, chunk.position : end] = key[0, :, piece]
        values[chunk.row.index, :, chunk.position : end] = value[0, :, piece]
        seen = keys[chunk.row.index, :, :end], values[chunk.row.index, :, :end]
        done.append(_read(query[:, :, piece], *seen, chunk.position, scale, sliding_window, softcap))
    out = done[0] if len(done) == 1 else torch.cat(done)
    return out.to(dtype)[None], None


def _store(step: Step, slab: torch.Tensor, new: torch.Tensor) -> None:
    width = slab.shape[-1]
    slab.view(-1, width).index_copy_(0, step.flat, new[0, :, : step.decoding].transpose(0, 1).reshape(-1, width))


def _decode(
    step: Step,
    query_HTD: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """One new token for each sequence, all at once; [T, H, D]."""
    heads, count, width = query_HTD.shape
    groups = heads // keys.shape[1]
    query_R = query_HTD.transpose(0, 1).reshape(count, keys.shape[1], groups, width)
    if step.place is not None:
        spread = query_R.new_zeros(step.extent, *query_R.shape[1:])
        query_R = spread.index_copy_(0, step.place, query_R)
    if step.picked is not None:
        keys, values = keys[:, :, : step.length][step.picked], values[:, :, : step.length][step.picked]
    else:
        keys, values = keys[: step.extent, :, : step.length], values[: step.extent, :, : step.length]
    mask = step.mask(window)
    if softcap is None and (step.length > SHORT_LENGTH or keys.is_cuda):
        out_R = scaled_dot_product_attention(query_R, keys, values, attn_mask=mask, scale=scale)
    else:
        out_R = _two_products(query_R, keys, values, mask, scale, softcap)
    out = out_R.reshape(step.extent, heads, width)
    return out if step.place is None else out.index_select(0, step.place)


def _two_products(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    scores = torch.matmul(query * scale, keys.transpose(-1, -2))
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    return torch.matmul(torch.softmax(scores.add_(mask), -1), values)


def _read(
    query: torch.Tensor,
    keys_KLD: torch.Tensor,
    values_KLD: torch.Tensor,
    position: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """A piece of a prompt against everything up to it; [T, H, D]."""
    heads, count = query.shape[1:3]
    length = keys_KLD.shape[1]
    keys, values = keys_KLD[None], values_KLD[None]
    if softcap is None and window is None and position == 0:
        out = scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scale, enable_gqa=True)
        return out[0].transpose(0, 1)
    place_T = torch.arange(position, position + count, device=query.device)
    place_L = torch.arange(length, device=query.device)
    sees_TL = place_L <= place_T[:, None]
    if window is not None:
        sees_TL &= place_L > place_T[:, None] - window
    if softcap is None:
        out = scaled_dot_product_attention(query, keys, values, attn_mask=sees_TL, scale=scale, enable_gqa=True)
        return out[0].transpose(0, 1)
    groups = heads // keys.shape[1]
    mask = torch.zeros(sees_TL.shape, dtype=query.dtype, device=query.device).masked_fill_(~sees_TL, float("-inf"))
    keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    return _two_products(query, keys, values, mask, scale, softcap)[0].transpose(0, 1)
