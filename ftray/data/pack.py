"""Dealing the examples of one step to workers and micro-batches. Every worker deals alike, so nothing is sent.

A step's window is always the same `batch_size` examples; packing, workers and micro-batch size only decide how they
are laid out, so the gradient does not depend on them.
"""

from __future__ import annotations

import numpy as np

Hands = list[list[np.ndarray]]  # [worker][micro-batch] -> positions in the window


def deal(lengths: np.ndarray, *, workers: int, micro_batch_size: int, max_length: int, packed: bool) -> Hands:
    """Cut a window of examples with `lengths` [B] tokens into equally many micro-batches for each worker.

    Packed: a micro-batch holds at most micro_batch_size x max_length tokens, and loads are levelled (longest first to
    the lightest, Graham 1969). Padded: at most micro_batch_size examples, neighbours in length, to keep padding small.
    A worker without an example for its turn gets an empty array.
    """
    if packed:
        return _deal_packed(lengths, workers=workers, budget=micro_batch_size * max_length)
    return _deal_padded(lengths, workers=workers, size=micro_batch_size)


def _deal_packed(lengths: np.ndarray, *, workers: int, budget: int) -> Hands:
    order = np.argsort(-lengths, kind="stable")
    rounds = max(1, -(-int(lengths.sum()) // (workers * budget)))
    while True:
        loads = np.zeros(workers * rounds, np.int64)
        bins: list[list[int]] = [[] for _ in loads]
        for position in order:
            lightest = int(loads.argmin())
            bins[lightest].append(int(position))
            loads[lightest] += lengths[position]
        if loads.max() <= budget or rounds >= len(lengths):
            break
        rounds += 1
    return [[np.array(sorted(bins[r * workers + w]), np.int64) for r in range(rounds)] for w in range(workers)]


def _deal_padded(lengths: np.ndarray, *, workers: int, size: int) -> Hands:
    order = np.argsort(-lengths, kind="stable")
    rounds = -(-len(lengths) // (workers * size))
    groups = np.array_split(order, workers * rounds)
    return [[groups[r * workers + w] for r in range(rounds)] for w in range(workers)]
