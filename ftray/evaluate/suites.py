"""What is measured on answers to held-out prompts: pure functions of texts and labels. No torch."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ftray.errors import DataError


def perplexity(loss: float) -> float:
    """exp(nats per token); infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def normalised(text: str) -> str:
    """Runs of white space become one space; none at the ends."""
    return " ".join(text.split())


def exact_match(predictions: Sequence[str], answers: Sequence[str]) -> float:
    """Share of predictions equal to their answer up to white space."""
    hits = [normalised(said) == normalised(answer) for said, answer in zip(predictions, answers, strict=True)]
    return _mean(hits)


def json_match(predictions: Sequence[str], answers: Sequence[str]) -> float | None:
    """Share of predictions with the same JSON value as their answer, over the answers that are an object or a list.

    Key order, spacing and 1 against 1.0 do not matter; true is not 1. None where no answer is an object or a list.
    """
    hits = []
    for said, answer in zip(predictions, answers, strict=True):
        wanted = _parsed(answer)
        if isinstance(wanted, dict | list):
            hits.append(_same_json(_parsed(said), wanted))
    return _mean(hits) if hits else None


@dataclass(frozen=True)
class LabelScores:
    """Shares of right answers; a prediction that is no label is simply wrong.

    Precision, recall and F1 are macro averages over the labels that occur among answers or predictions, 0 where
    undefined (scikit-learn's `average="macro", zero_division=0`).
    """

    accuracy: float
    precision: float
    recall: float
    f1: float


def label_scores(predictions: Sequence[str], answers: Sequence[str], labels: Sequence[str]) -> LabelScores:
    """Scores of generated labels, compared up to white space and case.

    Raises DataError where an answer is none of `labels`.
    """
    check_labels(labels, answers)
    said = [_label_key(text) for text in predictions]
    true = [_label_key(text) for text in answers]
    known = {_label_key(label) for label in labels}
    pairs = list(zip(said, true, strict=True))
    precisions, recalls, f1s = [], [], []
    for label in sorted(known & ({*said, *true})):
        hits = sum(s == t == label for s, t in pairs)
        predicted, actual = said.count(label), true.count(label)
        precisions.append(hits / predicted if predicted else 0.0)
        recalls.append(hits / actual if actual else 0.0)
        f1s.append(2 * hits / (predicted + actual))
    return LabelScores(_mean([s == t for s, t in pairs]), _mean(precisions), _mean(recalls), _mean(f1s))


def check_labels(labels: Sequence[str], answers: Iterable[str], rows: Sequence[str] = ()) -> None:
    """Raises DataError naming every answer that is none of `labels`, and the row ("file:line") it was first seen in."""
    known = {_label_key(label): label for label in labels}
    strangers: dict[str, str] = {}
    for index, answer in enumerate(answers):
        if _label_key(answer) not in known:
            strangers.setdefault(normalised(answer), rows[index] if index < len(rows) else "")
    if not strangers:
        return
    lines = [f"evaluate.labels: {len(strangers)} held-out answer{'s are' if len(strangers) > 1 else ' is'} no label"]
    for answer, row in list(strangers.items())[:10]:
        near = difflib.get_close_matches(_label_key(answer), known, n=1)
        hint = f"; did you mean {known[near[0]]!r}?" if near else ""
        lines.append(f"  {row + ': ' if row else ''}{_shortened(answer)!r}{hint}")
    if len(strangers) > 10:
        lines.append(f"  and {len(strangers) - 10} more")
    lines.append("  add them to evaluate.labels, correct the rows, or leave evaluate.labels out")
    raise DataError("\n".join(lines))


def answer_scores(predictions: Sequence[str], answers: Sequence[str], labels: Sequence[str] = ()) -> dict[str, float]:
    """Every score that generated answers allow, by name; empty where nothing was generated."""
    if not answers:
        return {}
    scores = {"exact_match": exact_match(predictions, answers)}
    same_json = json_match(predictions, answers)
    if same_json is not None:
        scores["json_match"] = same_json
    if labels:
        scores |= vars(label_scores(predictions, answers, labels))
    return scores


def _parsed(text: str) -> Any:
    """The JSON value, or a mark that equals nothing: answers are text that a model wrote."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _NOT_JSON


_NOT_JSON = object()


def _same_json(a: Any, b: Any) -> bool:
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same_json(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same_json, a, b))
    return bool(a == b)


def _label_key(text: str) -> str:
    return normalised(text).casefold()


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
