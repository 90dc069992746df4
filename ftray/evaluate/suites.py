"""What is measured on answers to held-out prompts: pure functions of texts and labels. No torch."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ftray.data.numbers import is_number, last_number, same_number
from ftray.errors import DataError

NEARLY_ALL = 0.95


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


def pass_at_1(predictions: Sequence[str], answers: Sequence[str]) -> float:
    """Share of predictions that end in the number of their answer, as for GSM8K (Cobbe et al. 2021, arXiv 2110.14168).

    With one greedy answer to a question it is pass@k (Chen et al. 2021, arXiv 2107.03374) at n = k = 1.
    """
    return _mean([same_number(said, answer) for said, answer in zip(predictions, answers, strict=True)])


def numeric_tasks(answers: Sequence[str], tasks: Sequence[str], numeric: bool | Literal["auto"]) -> frozenset[str]:
    """The tasks whose answers are compared by number: all or none, or with "auto" those where NEARLY_ALL are numbers.

    `answers`: those expected, in step with their tasks; "" is none.
    """
    numbers: dict[str, list[bool]] = {}
    for answer, task in zip(answers, tasks, strict=True):
        if answer:
            numbers.setdefault(task, []).append(is_number(answer) if numeric == "auto" else numeric)
    return frozenset(task for task, found in numbers.items() if _mean(found) >= NEARLY_ALL)


def numbered(answers: Sequence[str], tasks: Sequence[str], numeric: Collection[str]) -> list[int]:
    """Positions of the expected answers that hold a number and belong to one of the tasks `numeric`."""
    pairs = enumerate(zip(answers, tasks, strict=True))
    return [row for row, (answer, task) in pairs if task in numeric and last_number(answer) is not None]


def check_numbers(answers: Iterable[str], rows: Sequence[str]) -> None:
    """Raises DataError naming the rows ("file:line") whose expected answer holds no number."""
    bare = [(row, answer) for row, answer in zip(rows, answers, strict=True) if last_number(answer) is None]
    if not bare:
        return
    lines = [f"evaluate.numeric: {len(bare)} held-out answer{'s hold' if len(bare) > 1 else ' holds'} no number"]
    lines += [f"  {row}: {_shortened(normalised(answer))!r}" for row, answer in bare[:10]]
    if len(bare) > 10:
        lines.append(f"  and {len(bare) - 10} more")
    lines.append("  correct the rows, or leave evaluate.numeric at auto")
    raise DataError("\n".join(lines))


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


def answer_scores(
    predictions: Sequence[str], answers: Sequence[str], labels: Sequence[str] = (), numbers: Sequence[int] = ()
) -> dict[str, float]:
    """Every score that generated answers allow, by name; empty where nothing was generated.

    `numbers`: positions of the answers that are compared by their number.
    """
    if not answers:
        return {}
    scores = {"exact_match": exact_match(predictions, answers)}
    same_json = json_match(predictions, answers)
    if same_json is not None:
        scores["json_match"] = same_json
    if numbers:
        scores["pass_at_1"] = pass_at_1([predictions[i] for i in numbers], [answers[i] for i in numbers])
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
