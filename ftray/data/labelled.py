"""Labelled rows to token ids: a text, perhaps a second one, and its label, its labels or a number, kept as a column.

Which labels there are is known before anything is encoded: the run names them, or they are those of the training rows,
sorted. A row's column is then an index into them, or for several labels 0 or 1 for each.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from typing import Any

import numpy as np

from ftray.config.schema import Data
from ftray.data import sources
from ftray.data.encode import Chunk, Encoded, Encoder, Item
from ftray.data.format import Refused, Unusable, recognise
from ftray.data.report import LabelCount
from ftray.data.tokens import TokenStore
from ftray.errors import DataError

TARGET, SECOND = "label", "second"
"""Columns: the label; the token with which the second text begins, 0 where there is none."""
SAMPLE_ROWS = 20  # rows that decide about a source's layout
SEPARATOR = "|"
MANY = 50  # labels from which it looks as if the column held something else
NEAR = 0.92  # likeness of two names from which one may be a misspelling of the other
COMPARED = 400  # names that are compared with each other


def label_encoder(data: Data, objective: Any, tokenizer: Any) -> LabelEncoder:
    """The encoder of classification and regression. Reads the training rows for their labels where none are named."""
    classifies = objective.kind == "classification"
    several = classifies and objective.multi_label
    named = tuple(objective.labels) if classifies else ()
    return LabelEncoder(
        tokenizer,
        objective=objective.kind,
        max_length=data.max_length,
        too_long=data.too_long,
        labels=named or (label_names(data, several=several) if classifies else ()),
        several=several,
        named=bool(named),
    )


def label_names(data: Data, *, several: bool) -> tuple[str, ...]:
    """Labels of the training rows, sorted, numbers by their size. DataError where they are no labels to learn."""
    found: set[str] = set()
    count = 0
    for source in data.sources:
        rows = (row for row in sources.read(source) if isinstance(row, sources.Row))
        first = list(islice(rows, SAMPLE_ROWS))
        if not first:
            continue
        layout = recognise([row.data for row in first], source, objective="classification", template=data.template)
        for row in (*first, *rows):
            try:
                found.update(names_in(layout.example(row.data).label, several=several))
                count += 1
            except Unusable:
                continue  # it is dropped, with its reason, when the rows are prepared
        if len(found) > MANY and len(found) > count / 2:
            raise DataError(
                f"{source.path}: {len(found):,} different labels in {count:,} rows of column "
                f"'{layout.columns['label']}'; name the labels' column with columns: {{label: <column>}}, or use "
                "objective kind: regression"
            )
    if len(found) < (1 if several else 2):
        only = f"every row has the label {next(iter(found))!r}" if found else "no row has a label"
        raise DataError(f"{data.sources[0].path}: {only}; there is nothing to tell apart")
    return tuple(sorted(found, key=_rank))


def names_in(value: Any, *, several: bool) -> tuple[str, ...]:
    """The names that a label says. Raises Unusable where it says none, or more than one and `several` is not set."""
    items = value if isinstance(value, list | tuple) else [value]
    if several:
        items = [part for item in items for part in (item.split(SEPARATOR) if isinstance(item, str) else [item])]
    names = tuple(dict.fromkeys(name for item in items if (name := _name(item))))
    if not several and len(names) != 1:
        raise Unusable("not one label", f"{value!r}; with objective.multi_label: true a row may have several")
    return names


def number_in(value: Any) -> float:
    """The number that a label says. Raises Unusable where it is none."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise Unusable("label is not a number", f"{value!r:.60}")
    return number


@dataclass
class LabelEncoder(Encoder):
    """Tokenises texts with the special tokens that the tokenizer puts around them, cut to max_length.

    `labels` in the order of the head's rows, none for numbers; `several`: a row may have any of them; `named`: the run
    names them.
    """

    labels: tuple[str, ...] = ()
    several: bool = False
    named: bool = False

    def __post_init__(self) -> None:
        self.backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if self.backend is None:
            raise DataError(
                f"{type(self.tokenizer).__name__} is not a fast tokenizer; the model needs a tokenizer.json"
            )
        self._numbers = {name: number for number, name in enumerate(self.labels)}

    def __call__(self, chunk: Chunk) -> Encoded:
        encoded = Encoded(chunk.held_out)
        targets: list[Any] = []
        second: list[int] = []
        kept: list[Any] = []
        for item, encoding in zip(chunk.items, self._encoded(chunk.items), strict=True):
            try:
                target = self._target(item.example.label)
                self._check_length(item, encoding, encoded)
            except Unusable as unusable:
                encoded.dropped.append((item.place, unusable))
                continue
            encoded.places.append(item.place)
            targets.append(target)
            kept.append(encoding.ids)
            second.append(encoding.type_ids.index(1) if 1 in encoding.type_ids else 0)
        if kept:
            encoded.lengths = np.fromiter(map(len, kept), np.int64, len(kept))
            encoded.ids = np.concatenate([np.array(ids, np.uint32) for ids in kept])
            encoded.trained = np.zeros(len(encoded.ids), np.bool_)  # the loss is on the text as a whole
            encoded.columns = {TARGET: self._column(targets), SECOND: np.array(second, np.int32)}
        return encoded

    def preview(self, store: TokenStore, row: int) -> str:
        """The text as the base reads it, and its label."""
        text = self.tokenizer.decode(store.ids(row).tolist(), clean_up_tokenization_spaces=False)
        return f"{text}\n-> {self._said(store.column(TARGET)[row])}"

    def balance(self, train: TokenStore, held_out: TokenStore) -> tuple[LabelCount, ...]:
        if not self.labels:
            return ()
        counts = [self._counts(store) for store in (train, held_out)]
        return tuple(LabelCount(name, int(counts[0][i]), int(counts[1][i])) for i, name in enumerate(self.labels))

    def notes(self, train: TokenStore, held_out: TokenStore) -> Iterator[str]:
        """What is odd about the labels."""
        if not self.labels:
            yield from _value_notes(train.column(TARGET))
            return
        yield from count_notes(self.balance(train, held_out))
        for one, other in near_names(self.labels):
            yield f"note: labels {one!r} and {other!r} differ in little; is one misspelt?"
        joined = [label for label in self.labels if SEPARATOR in label]
        if joined and not self.several:
            yield f"note: {joined[0]!r} is taken for one label; with objective.multi_label: true it is several"

    def _encoded(self, items: Sequence[Item]) -> list[Any]:
        texts = [
            item.example.text if item.example.pair is None else (item.example.text, item.example.pair) for item in items
        ]
        backend: Any = self.backend
        backend.no_padding()  # many a tokenizer.json comes with it switched on
        backend.enable_truncation(self.max_length, strategy="longest_first")
        try:
            return backend.encode_batch(texts)
        finally:
            backend.no_truncation()  # the tokenizer is saved with the version

    def _check_length(self, item: Item, encoding: Any, encoded: Encoded) -> None:
        if not encoding.ids:
            raise Unusable("empty text", "the tokenizer finds no token in it")
        if not encoding.overflowing:
            return
        if self.too_long == "drop":
            raise Unusable("longer than max_length", f"max_length {self.max_length}", bad=False)
        encoded.truncated[item.source] += 1

    def _target(self, value: Any) -> Any:
        if self.objective == "regression":
            return number_in(value)
        names = names_in(value, several=self.several)
        for name in names:
            if name not in self._numbers:
                raise self._stranger(name)
        return [self._numbers[name] for name in names]

    def _stranger(self, name: str) -> Refused:
        near = difflib.get_close_matches(name, self.labels, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        if self.named:
            return Refused("unknown label", f"{name!r} is not in objective.labels{hint}")
        return Refused("unknown label", f"{name!r} is in no training row{hint}")

    def _column(self, targets: Sequence[Any]) -> np.ndarray:
        if self.objective == "regression":
            return np.array(targets, np.float64)
        if not self.several:
            return np.array([only for (only,) in targets], np.int32)
        column = np.zeros((len(targets), len(self.labels)), np.uint8)
        for row, numbers in enumerate(targets):
            column[row, numbers] = 1
        return column

    def _counts(self, store: TokenStore) -> np.ndarray:
        column = store.column(TARGET)
        if not len(column):
            return np.zeros(len(self.labels), np.int64)
        return column.sum(0, dtype=np.int64) if self.several else np.bincount(column, minlength=len(self.labels))

    def _said(self, target: Any) -> str:
        if not self.labels:
            return f"{float(target):g}"
        numbers = np.flatnonzero(target) if self.several else [int(target)]
        return ", ".join(self.labels[number] for number in numbers) or "no label"


def near_names(labels: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Pairs of names that are one word misspelt, or written in two ways, as far as anyone can tell."""
    for one, other in combinations(labels[:COMPARED], 2):
        first, second = _letters(one), _letters(other)
        if min(len(first), len(second)) < 4 or abs(len(first) - len(second)) > 2:
            continue
        matcher = difflib.SequenceMatcher(None, first, second, autojunk=False)
        if first == second or (matcher.real_quick_ratio() >= NEAR and matcher.ratio() >= NEAR):
            yield one, other


def count_notes(counts: Sequence[LabelCount], *, of: str = "row") -> Iterator[str]:
    """Labels with little to learn from or to measure; `of`: what has a label."""
    few = [count for count in counts if count.train < 2]
    if few:
        shown = ", ".join(f"{count.name!r} ({count.train})" for count in few[:5])
        verb = "label has" if len(few) == 1 else "labels have"
        yield f"note: {len(few)} {verb} fewer than 2 training {of}s and will not be learnt: {shown}"
    held_out = [count.name for count in counts if count.train and not count.held_out]
    if held_out and any(count.held_out for count in counts):
        verb = "label has" if len(held_out) == 1 else "labels have"
        shown = ", ".join(repr(name) for name in held_out[:5])
        yield f"note: {len(held_out)} {verb} no held-out {of}, so nothing is measured of them: {shown}"


def _value_notes(values: np.ndarray) -> Iterator[str]:
    low, high, mean, spread = values.min(), values.max(), values.mean(), values.std()
    yield f"values of the training rows: {low:g} to {high:g}, mean {mean:.4g}, standard deviation {spread:.4g}"
    if not spread:
        yield "note: all values are the same; there is nothing to learn"
    elif abs(mean) > 10 or spread > 10:
        yield "note: the head begins near 0 and learns such values slowly; divide them, so that they are near 1"


def _name(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else "" if math.isnan(value) else str(value)
    if isinstance(value, str | int):
        return str(value).strip()
    if value is None:
        return ""
    raise Unusable("label is not text", type(value).__name__)


def _letters(name: str) -> str:
    return "".join(sign for sign in name.casefold() if sign.isalnum())


def _rank(name: str) -> tuple[float, str]:
    try:
        return float(name), name
    except ValueError:
        return math.inf, name
