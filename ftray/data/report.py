"""What became of the rows: counts, reasons and one decoded example, for the terminal and the report page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np

from ftray.config.schema import Data

PREVIEW_TOKENS = 400
FEW_LABELS = 12  # that many are all shown in the terminal
MAX_NAMED = 20  # dropped rows named per source; the rest are counted


@dataclass(frozen=True)
class Dropped:
    """One row that is not used: where it is and why."""

    file: str
    line: int
    reason: str


@dataclass(frozen=True)
class LabelCount:
    """Examples with one label, of several labels each by itself; or words with a tag."""

    name: str
    train: int
    held_out: int


@dataclass(frozen=True)
class SourceReport:
    """The rows of one source. `dropped` counts by reason; `examples` names the first ones; tokens are of kept rows."""

    path: str
    format: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    unused_columns: tuple[str, ...] = ()
    weight: float = 1.0
    held_out: bool = False
    rows_read: int = 0
    rows_train: int = 0
    rows_eval: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    examples: tuple[Dropped, ...] = ()
    altered: int = 0  # copies beside the rows
    truncated: int = 0
    zero_trained: int = 0
    tokens: int = 0
    trained_tokens: int = 0

    @property
    def rows_kept(self) -> int:
        return self.rows_train + self.rows_eval

    @property
    def rows_dropped(self) -> int:
        return sum(self.dropped.values())


@dataclass(frozen=True)
class DataReport:
    """The whole of a prepared data set.

    `tokens`, `trained_tokens` and `length_histogram` ([lower edge in tokens, examples] pairs, powers of two) are of the
    training examples; `preview` is one of them decoded, with the trained tokens marked as «...».
    """

    digest: str
    sources: tuple[SourceReport, ...]
    train_examples: int
    eval_examples: int
    tokens: int
    trained_tokens: int
    eval_tokens: int
    eval_trained_tokens: int
    questions: int
    questions_too_long: int
    max_length: int
    length_histogram: tuple[tuple[int, int], ...]
    preview: str
    seconds: float
    notes: tuple[str, ...] = ()
    labels: tuple[LabelCount, ...] = ()

    @property
    def rows_read(self) -> int:
        return sum(source.rows_read for source in self.sources)

    @property
    def rows_kept(self) -> int:
        return sum(source.rows_kept for source in self.sources)

    @property
    def truncated(self) -> int:
        return sum(source.truncated for source in self.sources)

    @property
    def zero_trained(self) -> int:
        return sum(source.zero_trained for source in self.sources)

    @property
    def dropped(self) -> dict[str, int]:
        total: Counter[str] = Counter()
        for source in self.sources:
            total.update(source.dropped)
        return dict(total.most_common())

    @property
    def weights(self) -> dict[str, float]:
        return {source.path: source.weight for source in self.sources if not source.held_out}

    def weighted(self, data: Data) -> DataReport:
        """The report with a run's own weights: they are no part of what is cached."""
        given = zip(self.sources, [*data.sources, *data.eval_sources], strict=True)
        return replace(self, sources=tuple(replace(source, weight=said.weight) for source, said in given))

    def to_json(self) -> dict[str, Any]:
        """Plain data; the totals are included for readers that are not Python."""
        totals = {
            name: getattr(self, name) for name in ("rows_read", "rows_kept", "truncated", "zero_trained", "dropped")
        }
        return {**asdict(self), **totals}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DataReport:
        fields = {name: data[name] for name in cls.__dataclass_fields__ if name in data}
        fields["sources"] = tuple(_source(source) for source in data["sources"])
        fields["length_histogram"] = tuple((int(low), int(count)) for low, count in data["length_histogram"])
        fields["notes"] = tuple(data["notes"])
        fields["labels"] = tuple(LabelCount(**label) for label in data.get("labels", ()))
        return cls(**fields)

    def lines(self) -> list[str]:
        """For the terminal."""
        return list(_lines(self))


def histogram(lengths: np.ndarray) -> tuple[tuple[int, int], ...]:
    """(lower edge, examples) per power of two of the length in tokens."""
    if not len(lengths):
        return ()
    powers = np.log2(np.maximum(lengths, 1)).astype(int)
    counts = np.bincount(powers)
    return tuple((1 << power, int(counts[power])) for power in range(powers.min(), len(counts)))


def marked_text(tokenizer: Any, ids: np.ndarray, trained: np.ndarray, limit: int = PREVIEW_TOKENS) -> str:
    """An example as text, with its trained stretches in «»; at most `limit` tokens of it."""
    cut = min(len(ids), limit)
    edges = [0, *(np.flatnonzero(np.diff(trained[:cut])) + 1).tolist(), cut]
    text = ""
    for start, end in pairwise(edges):
        part = tokenizer.decode(ids[start:end].tolist(), clean_up_tokenization_spaces=False)
        text += f"«{part}»" if trained[start] else part
    return text + ("..." if cut < len(ids) else "")


def _source(data: Mapping[str, Any]) -> SourceReport:
    fields = dict(data)
    fields["examples"] = tuple(Dropped(**example) for example in data["examples"])
    fields["unused_columns"] = tuple(data["unused_columns"])
    return SourceReport(**fields)


def _lines(report: DataReport) -> Iterable[str]:
    for source in report.sources:
        use = "held out" if source.held_out else f"weight {source.weight:g}"
        yield f"{source.path}: {source.format}, {use}, {source.rows_read:,} rows read, {source.rows_kept:,} kept"
        if source.columns:
            yield "  columns: " + ", ".join(f"{ours} = {theirs}" for ours, theirs in source.columns.items())
        if source.unused_columns:
            yield "  not used: " + ", ".join(source.unused_columns)
        for reason, count in sorted(source.dropped.items(), key=lambda item: -item[1]):
            yield f"  dropped {count:,}: {reason}"
        for example in source.examples[:5]:
            yield f"    {example.file}:{example.line}: {example.reason}"
        if len(source.examples) > 5:
            yield f"    ... {source.rows_dropped - 5:,} more; the report names {len(source.examples)}"
        if source.altered:
            yield f"  altered copies: {source.altered:,}"
        if source.truncated:
            yield f"  cut to {report.max_length} tokens: {source.truncated:,}"
    if report.trained_tokens:
        trained = f", {report.trained_tokens:,} trained ({report.trained_tokens / max(report.tokens, 1):.0%})"
        asked = f", {report.questions:,} questions"
    else:
        trained = asked = ""  # a text is learnt from as a whole
    yield f"train: {report.train_examples:,} examples, {report.tokens:,} tokens{trained}"
    yield f"eval: {report.eval_examples:,} examples, {report.eval_tokens:,} tokens{asked}"
    yield from _label_lines(report.labels, of="words" if report.trained_tokens else "rows")
    if report.questions_too_long:
        yield f"  {report.questions_too_long:,} questions are longer than {report.max_length} tokens and are not asked"
    if report.length_histogram:
        # an example may hold several texts of max_length
        highs = [2 * low - 1 for low, _ in report.length_histogram]
        bars = ", ".join(
            f"{low}-{high}: {count:,}" for (low, count), high in zip(report.length_histogram, highs, strict=True)
        )
        yield f"lengths in tokens: {bars}"
    yield from report.notes
    if report.preview:
        yield "one example, trained tokens in «»:" if report.trained_tokens else "one example:"
        yield from ("  " + line for line in report.preview.splitlines())


def _label_lines(labels: Sequence[LabelCount], *, of: str) -> Iterable[str]:
    if not labels:
        return
    ranked = sorted(labels, key=lambda label: (-label.train, label.name))
    if len(ranked) <= FEW_LABELS:
        shown = ", ".join(f"{label.name} {label.train:,}" for label in ranked)
    else:
        most, least = ranked[:3], ranked[-3:]
        shown = ", ".join(f"{label.name} {label.train:,}" for label in most) + ", … "
        shown += ", ".join(f"{label.name} {label.train:,}" for label in least)
    yield f"labels: {len(labels):,}, with training {of}: {shown}"
