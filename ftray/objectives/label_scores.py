"""Scores of labels and numbers, from logits and what is right: arithmetic on arrays, no torch, no scikit-learn.

Axes: N examples, L labels. Averages over labels are over those that occur among answers or predictions, and what is
undefined counts 0, as in scikit-learn with zero_division=0.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ftray.models.heads import Head

BINS = 15
"""Of the calibration error, as in On Calibration of Modern Neural Networks (arXiv 1706.04599)."""
CONFUSIONS = 5000  # pairs of labels kept; more are no figure that anyone reads


def scores(observed: np.ndarray, scoring: str) -> dict[str, float]:
    """Scores by name, from [N, L + 1] (one label), [N, 2 L] (each) or [N, 2] (numbers); empty for no examples."""
    if not len(observed):
        return {}
    if scoring == "value":
        return _number_scores(*_halves(observed))
    if scoring == "each":
        return _several_scores(*_halves(observed))
    return _one_scores(observed[:, :-1], observed[:, -1].astype(int))


def details(observed: np.ndarray, head: Head) -> dict[str, Any]:
    """Scores of each label, and which was taken for which: plain data for the report. Empty for numbers.

    `labels`: rows of {name, precision, recall, f1, rows}. `confusion`: [right label, said label, examples], where they
    are two and one of them is right; the most frequent first.
    """
    if head.scoring == "value" or not len(observed):
        return {}
    if head.scoring == "each":
        logits_NL, right_NL = _halves(observed)
        said_NL, right_NL = logits_NL > 0, right_NL > 0.5
        confusion: list[list[Any]] = []
    else:
        said_N, right_N = observed[:, :-1].argmax(1), observed[:, -1].astype(int)
        count = len(head.labels)
        said_NL, right_NL = np.eye(count, dtype=bool)[said_N], np.eye(count, dtype=bool)[right_N]
        table = np.bincount(right_N * count + said_N, minlength=count * count).reshape(count, count)
        pairs = sorted(np.argwhere(table), key=lambda pair: (-table[tuple(pair)], *pair))[:CONFUSIONS]
        confusion = [[int(right), int(said), int(table[right, said])] for right, said in pairs]
    precision, recall, f1 = _by_label(said_NL, right_NL)
    rows = right_NL.sum(0)
    labels = [
        {
            "name": name,
            "precision": float(precision[i]),
            "recall": float(recall[i]),
            "f1": float(f1[i]),
            "rows": int(rows[i]),
        }
        for i, name in enumerate(head.labels)
    ]
    return {"labels": labels, "confusion": confusion}


def _one_scores(logits_NL: np.ndarray, right_N: np.ndarray) -> dict[str, float]:
    shifted = logits_NL - logits_NL.max(1, keepdims=True)
    logs_NL = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    said_N = logits_NL.argmax(1)
    labels = np.eye(logits_NL.shape[1], dtype=bool)
    hits_N = said_N == right_N
    return {
        "loss": float(-logs_NL[np.arange(len(right_N)), right_N].mean()),
        "accuracy": float(hits_N.mean()),
        **_averages(labels[said_N], labels[right_N]),
        "ece": calibration_error(np.exp(logs_NL.max(1)), hits_N),
    }


def _several_scores(logits_NL: np.ndarray, right_NL: np.ndarray) -> dict[str, float]:
    """Accuracy: all labels of an example right. Confidence: of each answer, yes or no, in each label."""
    said_NL, right = logits_NL > 0, right_NL > 0.5
    nats_NL = np.logaddexp(0, logits_NL) - logits_NL * right_NL  # log(1 + e^x) - x y
    confidence_NL = 1 / (1 + np.exp(-np.abs(logits_NL).clip(max=700)))
    return {
        "loss": float(nats_NL.mean()),
        "accuracy": float((said_NL == right).all(1).mean()),
        **_averages(said_NL, right),
        "ece": calibration_error(confidence_NL.ravel(), (said_NL == right).ravel()),
    }


def _number_scores(said_N1: np.ndarray, right_N1: np.ndarray) -> dict[str, float]:
    """R²: 1 - squared error / spread of the right values; Pearson's r. Neither where all values are the same."""
    said, right = said_N1[:, 0], right_N1[:, 0]
    errors = said - right
    mse = float(np.square(errors).mean())
    found = {"loss": mse, "mse": mse, "mae": float(np.abs(errors).mean())}
    spread = float(np.square(right - right.mean()).mean())
    if spread:
        found["r2"] = 1 - mse / spread
        together = float(((said - said.mean()) * (right - right.mean())).mean())
        if deviation := float(said.std()):
            found["pearson"] = together / (deviation * spread**0.5)
    return found


def calibration_error(confidence_N: np.ndarray, hits_N: np.ndarray) -> float:
    """Mean over the examples of |share of hits - mean confidence| of their bin; bins of equal width, (lower, upper]."""
    bins = np.clip(np.ceil(confidence_N * BINS).astype(int) - 1, 0, BINS - 1)
    gaps = np.bincount(bins, weights=hits_N - confidence_N, minlength=BINS)
    return float(np.abs(gaps).sum() / len(confidence_N))


def _averages(said_NL: np.ndarray, right_NL: np.ndarray) -> dict[str, float]:
    """Macro averages of precision, recall and F1, and F1 over all answers together."""
    occurs = said_NL.any(0) | right_NL.any(0)
    precision, recall, f1 = (values[occurs].mean() if occurs.any() else 0.0 for values in _by_label(said_NL, right_NL))
    answers = said_NL.sum() + right_NL.sum()
    micro = 2 * (said_NL & right_NL).sum() / answers if answers else 0.0
    return {"precision": float(precision), "recall": float(recall), "f1": float(f1), "f1_micro": float(micro)}


def _by_label(said_NL: np.ndarray, right_NL: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[L] precision, recall, F1."""
    hits = (said_NL & right_NL).sum(0)
    said, right = said_NL.sum(0), right_NL.sum(0)
    return hits / np.maximum(said, 1), hits / np.maximum(right, 1), 2 * hits / np.maximum(said + right, 1)


def _halves(observed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    middle = observed.shape[1] // 2
    return observed[:, :middle], observed[:, middle:]
