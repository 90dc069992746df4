"""Scores of tags: of entities as conlleval and seqeval count them, and of words. Arithmetic on arrays, no torch.

An entity is right where its first and last word and its kind are. An I- that goes on with nothing begins an entity, in
what a model says as in what is right. Where no tag is BIO, each word counts for itself, its tag being its kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ftray.data.tagged import kind_of
from ftray.objectives.label_scores import BINS

_WORDS = 3 + BINS  # figures of a row before those of kinds


def kinds_of(labels: Sequence[str]) -> tuple[str, ...]:
    """Kinds of entity, in the order of the labels; the labels themselves where none is BIO."""
    return tuple(dict.fromkeys(kind for label in labels if (kind := kind_of(label)))) or tuple(labels)


def entities(tags: Sequence[str], *, bio: bool = True) -> set[tuple[int, int, str]]:
    """(first word, word after the last, kind) of each.

    >>> sorted(entities(["B-x", "I-x", "I-y", "O", "I-y", "B-y"]))
    [(0, 2, 'x'), (2, 3, 'y'), (4, 5, 'y'), (5, 6, 'y')]
    """
    if not bio:
        return {(at, at + 1, tag) for at, tag in enumerate(tags)}
    found = set()
    start, before = 0, None
    for at, tag in enumerate([*tags, "O"]):
        kind = kind_of(tag)
        if before is not None and (kind != before or tag.startswith("B-")):
            found.add((start, at, before))
        if kind is not None and (kind != before or tag.startswith("B-")):
            start = at
        before = kind
    return found


def figures(logits_NL: np.ndarray, right_N: np.ndarray, labels: Sequence[str]) -> np.ndarray:
    """Of one text's words, figures that add up over texts: nats, words, hits, by bin of confidence the hits less the
    confidence [BINS], and by kind the right entities, those said, and those both [3 K]."""
    kinds = kinds_of(labels)
    bio = kinds != tuple(labels)
    shifted = logits_NL - logits_NL.max(1, keepdims=True)
    logs_NL = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    said_N = logits_NL.argmax(1)
    hits_N = said_N == right_N
    confidence_N = np.exp(logs_NL.max(1))
    bins = np.clip(np.ceil(confidence_N * BINS).astype(int) - 1, 0, BINS - 1)
    right, said = (entities([labels[tag] for tag in tags_N], bio=bio) for tags_N in (right_N, said_N))
    numbers = {kind: number for number, kind in enumerate(kinds)}
    counts = [
        np.bincount([numbers[kind] for _, _, kind in found], minlength=len(kinds))
        for found in (right, said, right & said)
    ]
    words = [-logs_NL[np.arange(len(right_N)), right_N].sum(), len(right_N), hits_N.sum()]
    return np.concatenate([words, np.bincount(bins, weights=hits_N - confidence_N, minlength=BINS), *counts])


def scores(observed: np.ndarray, labels: Sequence[str]) -> dict[str, float]:
    """From `figures` of texts, [texts, figures]. Micro averages over the entities; without BIO tags, `f1` over tags is
    the macro average of those that occur."""
    if not len(observed):
        return {}
    total = observed.sum(0)
    nats, words, hits = total[:3]
    right_K, said_K, both_K = total[_WORDS:].reshape(3, -1)
    found = {"loss": nats / words, "token_accuracy": hits / words, "ece": np.abs(total[3:_WORDS]).sum() / words}
    if kinds_of(labels) == tuple(labels):
        found["f1"] = _rates(right_K, said_K, both_K)[2][right_K + said_K > 0].mean()
    else:
        names = ("entity_precision", "entity_recall", "entity_f1")
        found.update(zip(names, _rates(right_K.sum(), said_K.sum(), both_K.sum()), strict=True))
    return {name: float(value) for name, value in found.items()}


def details(observed: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
    """`labels`: rows of {name, precision, recall, f1, rows} by kind; `of`: what `rows` counts. For the report."""
    if not len(observed):
        return {}
    kinds = kinds_of(labels)
    right_K, said_K, both_K = observed.sum(0)[_WORDS:].reshape(3, -1)
    columns = zip(kinds, *_rates(right_K, said_K, both_K), right_K, strict=True)
    rows = [
        {"name": kind, "precision": float(p), "recall": float(r), "f1": float(f1), "rows": int(count)}
        for kind, p, r, f1, count in columns
    ]
    return {"labels": rows, "of": "words" if kinds == tuple(labels) else "entities"}


def _rates(right: Any, said: Any, both: Any) -> tuple[Any, Any, Any]:
    """Precision, recall, F1; 0 where undefined."""
    return both / np.maximum(said, 1), both / np.maximum(right, 1), 2 * both / np.maximum(right + said, 1)
