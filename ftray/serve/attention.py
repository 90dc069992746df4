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
from ftray.serve.native import GROUPS, LANES

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
        self.row_T = torch.tensor([row.index for row in rows])
        self.position_T = torch.tensor(positions)
        if cache.native is not None:
            self.room = torch.empty(GROUPS * (cache.length + LANES))
        head_K = torch.arange(cache.heads)
        flat = (self.row_T[:, None] * cache.heads + head_K) * cache.length + self.position_T[:, None]
        self.flat = flat.flatten().to(cache.device)
        """Where [T, K] keys go in a slab seen as [R * K * L, D]."""
        self.runs = [Run(self, tokens) for tokens in _dense(self.row_T.tolist())]


class Run:
    """Rows that lie close together, as one view of the slabs; most are in use, the others' answers are thrown away."""

    def __init__(self, step: Step, tokens: list[int]):
        device = step.cache.device
        token_T = torch.tensor(tokens)
        row_T, last_T = step.row_T[token_T], step.position_T[token_T]
        self.low, self.high = int(row_T.min()), int(row_T.max()) + 1
        self.length = int(last_T.max()) + 1
        place_T = row_T - self.low
        last_R = torch.zeros(self.high - self.low, dtype=torch.long)
        last_R[place_T] = last_T
        self.last_R = last_R.to(device)
        as_they_lie = tokens == list(range(step.decoding)) and place_T.tolist() == list(range(len(tokens)))
        self.token_T = None if as_they_lie else token_T.to(device)
        self.place_T = place_T.to(device)
        self._masks: dict[int | None, torch.Tensor] = {}

    def mask(self, window: int | None, dtype: Any) -> torch.Tensor:
        """[R, 1, 1, L] to add to scores: 0 where a row's newest token looks, else minus infinity."""
        if window not in self._masks:
            place_L = torch.arange(self.length, device=self.last_R.device)
            sees_RL = place_L <= self.last_R[:, None]
            if window is not None:
                sees_RL &= place_L > self.last_R[:, None] - window
            mask = torch.zeros(sees_RL.shape, dtype=dtype, device=sees_RL.device)
            self._masks[window] = mask.masked_fill_(~sees_RL, float("-inf"))[:, None, None]
        return self._masks[window]


def _dense(rows: list[int]) -> list[list[int]]:
    """Places in `rows`, grouped so that within a group at least two of three rows are there."""
    groups: list[list[int]] = []
    for place in sorted(range(len(rows)), key=rows.__getitem__):
        if groups and 2 * (rows[place] - rows[groups[-1][0]] + 1) <= 3 * (len(groups[-1]) + 1):
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


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
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, H, T, D], key and value [1, K, T, D]; stores the new keys and values, returns [1, T, H, D]."""
    assert step is not None, "the engine passes its step to the model"
    if s_aux is not None:
        raise NotImplementedError("attention sinks")
    layer = module.layer_idx
    assert isinstance(layer, int)
    keys, values = step.cache.keys[layer], step.cache.values[layer]
    dtype = query.dtype
    if dtype != keys.dtype:
        query, key, value = query.to(keys.dtype), key.to(keys.dtype), value.to(keys.dtype)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    done = []
    if step.decoding:
        new = query[0, :, : step.decoding], key[0, :, : step.decoding], value[0, :, : step.decoding]
        native = step.cache.native
        if native is not None and softcap is None:
            places: dict[str, Any] = {"rows": step.row_T, "positions": step.position_T, "room": step.room}
            done.append(native.attend(*new, keys, values, scale=scale, window=sliding_window or 0, **places))
        else:
            done.append(_decode(step, *new, keys, values, scale, sliding_window, softcap))
    for chunk in step.chunks:
        piece = slice(chunk.begin, chunk.end)
        end = chunk.position + chunk.end - chunk.begin
        keys[chunk.row.index, :, chunk.position : end] = key[0, :, piece]
        values[chunk.row.index, :, chunk.position : end] = value[0, :, piece]
        seen = keys[chunk.row.index, :, :end], values[chunk.row.index, :, :end]
        done.append(_read(query[:, :, piece], *seen, chunk.position, scale, sliding_window, softcap))
    out = done[0] if len(done) == 1 else torch.cat(done)
    return out.to(dtype)[None], None


def _decode(
    step: Step,
    query_HTD: torch.Tensor,
    key_KTD: torch.Tensor,
    value_KTD: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """One new token for each sequence, all at once; [T, H, D]."""
    heads, count, width = query_HTD.shape
    for slab, new in ((keys, key_KTD), (values, value_KTD)):
        slab.view(-1, width).index_copy_(0, step.flat, new.transpose(0, 1).reshape(-1, width))
    query_T = query_HTD.transpose(0, 1).reshape(count, keys.shape[1], heads // keys.shape[1], width)
    out_T = torch.empty_like(query_T)
    for run in step.runs:
        seen = keys[run.low : run.high, :, : run.length], values[run.low : run.high, :, : run.length]
        mask = run.mask(window, query_T.dtype)
        if run.token_T is None:
            query_R = query_T
        else:
            query_R = query_T.new_zeros(run.high - run.low, *query_T.shape[1:])
            query_R.index_copy_(0, run.place_T, query_T.index_select(0, run.token_T))
        if softcap is None and (run.length > SHORT_LENGTH or keys.is_cuda):
            out_R = scaled_dot_product_attention(query_R, *seen, attn_mask=mask, scale=scale)
        else:
            out_R = _two_products(query_R, *seen, mask, scale, softcap)
        if run.token_T is None:
            out_T = out_R
        else:
            out_T.index_copy_(0, run.token_T, out_R.index_select(0, run.place_T))
    return out_T.reshape(count, heads, width)


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
