"""Keys and values of the sequences in work: one row of a slab each, kept after the end for others that begin alike.

Axes: R rows, L positions, K key-value heads, D width of a head, T tokens of a step.

A row belongs to one sequence at a time. When the sequence ends, the row stays as it is until it is needed: a new
sequence of the same version whose prompt begins as that row does goes on in it, and one that begins as a row in use
copies the common part. Both are exact, because a version's weights never change under its key.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ftray.serve.native import Native


@dataclass
class Row:
    """What a row holds: the tokens whose keys and values are there, and for which version."""

    index: int
    owner: str | None = None
    tokens: list[int] = field(default_factory=list)
    busy: bool = False
    used: int = 0
    """Counts up with every sequence; the smallest free one was used longest ago."""


class Cache:
    """Rows of `length` positions in slabs of [R, K, L, D] for each layer; untouched ones cost no memory on CPUs.

    With `native`, attention over them is native.c's. Without it, on CPUs, they are best kept in fp32 whatever the
    weights are: for 32 sequences of 96, 0.35 ms a layer against 0.55 to 2.6 ms in bf16 (AVX-512 without AMX).
    """

    def __init__(
        self,
        *,
        layers: int,
        rows: int,
        length: int,
        heads: int,
        width: int,
        dtype: Any,
        device: Any,
        native: Native | None = None,
    ):
        shape = (rows, heads, length, width)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.heads, self.length, self.dtype, self.device = heads, length, dtype, device
        self.native = native
        self.rows = [Row(index) for index in range(rows)]
        self._clock = 0

    @staticmethod
    def bytes_per_row(*, layers: int, length: int, heads: int, width: int, dtype: Any) -> int:
        return 2 * layers * length * heads * width * torch.empty((), dtype=dtype).element_size()

    @property
    def free(self) -> int:
        return sum(not row.busy for row in self.rows)

    @property
    def tokens(self) -> int:
        """Positions that rows in use hold."""
        return sum(len(row.tokens) for row in self.rows if row.busy)

    def take(self, owner: str | None, tokens: list[int], *, reuse: bool) -> Row:
        """A free row, holding as much of `tokens` as is known (`row.tokens`), at most all but the last.

        The caller has seen that one is free.
        """
        best, shared = self._longest(owner, tokens) if reuse else (None, 0)
        if best is not None and not best.busy and shared >= len(best.tokens) // 2:
            row = best
        else:
            row = min((row for row in self.rows if not row.busy), key=lambda row: (row.used, row.index))
            if best is not None and best is not row:
                self._copy(best, row, shared)
        self._clock += 1
        row.owner, row.tokens, row.busy, row.used = owner, tokens[:shared], True, self._clock
        return row

    def give_back(self, row: Row) -> None:
        """The sequence ended; what the row holds stays until another sequence needs it."""
        row.busy = False
        if not row.tokens:
            row.owner, row.used = None, 0

    def forget(self, owner: str) -> None:
        """A version is gone, and its rows with it."""
        for row in self.rows:
            if row.owner == owner and not row.busy:
                row.owner, row.tokens, row.used = None, [], 0

    def write(self, row: Row, layer_keys_values: list[tuple[Any, Any]], *, stand_for: list[int]) -> None:
        """Puts given keys and values, [K, n, D] a layer, at the row's begin; `stand_for`: their places in `tokens`."""
        size = len(stand_for)
        for layer, (key, value) in enumerate(layer_keys_values):
            self.keys[layer][row.index, :, :size] = key
            self.values[layer][row.index, :, :size] = value
        row.tokens = list(stand_for)

    def _longest(self, owner: str | None, tokens: list[int]) -> tuple[Row | None, int]:
        best, most = None, 0
        for row in self.rows:
            if row.owner != owner or not row.tokens or row.tokens[0] != tokens[0]:
                continue
            shared = common_prefix(row.tokens, tokens, limit=len(tokens) - 1)
            if shared > most or (shared == most and best is not None and best.busy and not row.busy):
                best, most = row, shared
        return best, most

    def _copy(self, source: Row, target: Row, count: int) -> None:
        for slab in (*self.keys, *self.values):
            slab[target.index, :, :count] = slab[source.index, :, :count]


def common_prefix(one: list[int], other: list[int], *, limit: int) -> int:
    """How many tokens two lists begin with in common, at most `limit`."""
    limit = max(0, min(limit, len(one), len(other)))
    if one[:limit] == other[:limit]:
        return limit
    low, high = 0, limit  # list comparison runs in C: halving beats a loop over tokens
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
