"""The order in which an epoch visits the rows of a mixture: seeded, weighted, the same on every worker.

Each source is an endless stream of its own shuffles, laid end to end; an epoch takes the next round(weight x rows) of
it. So weight 2 shows every row twice per epoch, and weight 0.5 shows one half in one epoch and the other half in the
next. No row is copied on disk.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ftray.data.tokens import TokenStore


def order(store: TokenStore, weights: Sequence[float], seed: int, epoch: int) -> np.ndarray:
    """Row numbers of `store` in the order of `epoch` (0, 1, ...), int64. `weights[s]` belongs to source s; missing: 1.

    Every epoch has the same length, `epoch_rows(store, weights)`.
    """
    parts = []
    for source, rows, take in _takes(store, weights):
        # the same tokens in the same number of rows may come with other tasks, so the source is part of the stream
        parts.append(rows[_stream(len(rows), epoch * take, take, (seed, source))])
    joined = np.concatenate([*parts, np.zeros(0, np.int64)])
    return np.random.default_rng((seed, epoch)).permutation(joined)


def epoch_rows(store: TokenStore, weights: Sequence[float]) -> int:
    """Rows that one epoch visits."""
    return sum(take for _, _, take in _takes(store, weights))


def _takes(store: TokenStore, weights: Sequence[float]):
    sources = np.asarray(store.sources)
    for source in np.unique(sources):
        rows = np.flatnonzero(sources == source)
        weight = weights[source] if source < len(weights) else 1.0
        yield int(source), rows, max(1, round(weight * len(rows)))


def _stream(rows: int, start: int, count: int, seed: tuple[int, int]) -> np.ndarray:
    """Elements start .. start + count of the endless stream of shuffles of range(rows)."""
    first, last = start // rows, (start + count - 1) // rows
    shuffles = [np.random.default_rng((*seed, turn)).permutation(rows) for turn in range(first, last + 1)]
    return np.concatenate(shuffles)[start - first * rows :][:count]
