"""Tagged rows to token ids: words and a tag for each, kept for the first token of every word.

Words are joined by single spaces and read as the base reads any text, so that a served version meets what it has
learnt; where each word begins is told by the characters that tokens stand for. Tags are BIO (B-x begins an entity of
kind x, I-x goes on with it, O is outside of all), or names of any other sort, such as parts of speech.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Any

import numpy as np

from ftray.config.schema import Data
from ftray.data import sources
from ftray.data.encode import Chunk, Encoded, Encoder, Item
from ftray.data.format import Refused, Unusable, recognise
from ftray.data.labelled import SAMPLE_ROWS, LabelEncoder, count_notes, near_names
from ftray.data.report import LabelCount
from ftray.data.tokens import TokenStore
from ftray.errors import DataError

TAG = "tag"
"""The stream: each trained token's tag, an index into the labels."""
MENDED, LOST = "mended", "lost"
"""Columns: tags of an example read as B-; words of it whose tag no token carries."""
PREVIEW_WORDS = 60
_BIO = re.compile(r"([BI])-(.+)")
_OTHER_SCHEME = re.compile(r"[ESLU]-(.+)")


def tag_encoder(data: Data, objective: Any, tokenizer: Any) -> TagEncoder:
    """The encoder of token classification. Reads the training rows for their tags where none are named."""
    named = tuple(objective.labels)
    labels = named or tag_names(data)
    check_scheme(labels)
    return TagEncoder(
        tokenizer,
        objective=objective.kind,
        max_length=data.max_length,
        too_long=data.too_long,
        labels=labels,
        named=bool(named),
        strict=data.strict,
    )


def tag_names(data: Data) -> tuple[str, ...]:
    """Tags of the training rows: O, then by kind, B- before I-. DataError where they are no tags to learn."""
    found: set[str] = set()
    for source in data.sources:
        rows = (row for row in sources.read(source) if isinstance(row, sources.Row))
        first = list(islice(rows, SAMPLE_ROWS))
        if not first:
            continue
        layout = recognise([row.data for row in first], source, objective="token_classification")
        for row in (*first, *rows):
            try:
                found.update(mended(tags_in(layout.example(row.data).label))[0])
            except Refused as refused:
                raise DataError(f"{row.file}:{row.line}: {refused.reason}") from None
            except Unusable:
                continue  # it is dropped, with its reason, when the rows are prepared
    if len(found) < 2:
        only = f"every word has the tag {next(iter(found))!r}" if found else "no row has tags"
        raise DataError(f"{data.sources[0].path}: {only}; there is nothing to tell apart")
    return tuple(sorted(found, key=lambda tag: (tag != "O", kind_of(tag) or tag, tag)))


def tags_in(values: Sequence[Any], names: Sequence[str] = ()) -> list[str]:
    """A row's tags as text; numbers are looked up in `names`. Raises Unusable, or Refused where they have no names."""
    tags = []
    for value in values:
        if isinstance(value, int) and not isinstance(value, bool):
            if not names:
                raise Refused("tags are numbers", "say what each is called in objective.labels, from 0 on")
            if not 0 <= value < len(names):
                raise Refused("unknown label", f"number {value}, and objective.labels has 0 to {len(names) - 1}")
            value = names[value]
        if not isinstance(value, str) or not value.strip():
            raise Unusable("a tag is not text", f"{value!r:.60}")
        tags.append(value.strip())
    return tags


def mended(tags: Sequence[str]) -> tuple[list[str], int]:
    """Tags in which an I-x that goes on with nothing is B-x, and how many were such.

    >>> mended(["O", "I-person", "I-person", "I-group"])
    (['O', 'B-person', 'I-person', 'B-group'], 2)
    """
    found: list[str] = []
    count = 0
    for tag in tags:
        kind = kind_of(tag)
        if tag.startswith("I-") and kind != (kind_of(found[-1]) if found else None):
            tag, count = f"B-{kind}", count + 1
        found.append(tag)
    return found, count


def kind_of(tag: str) -> str | None:
    """The kind of entity that a BIO tag is of; None for O and for tags of other sorts."""
    match = _BIO.fullmatch(tag)
    return match[2] if match else None


def check_scheme(labels: Sequence[str]) -> None:
    """DataError where tags mark ends and single words as well (BIOES, BILOU): read as BIO they would be misread."""
    kinds = {kind_of(tag) for tag in labels} - {None}
    strange = [tag for tag in labels if (match := _OTHER_SCHEME.fullmatch(tag)) and match[1] in kinds]
    if strange:
        raise DataError(
            f"data.sources: tags such as {strange[0]!r} are of BIOES or BILOU, and BIO is read; write S- and U- as B-, "
            "E- and L- as I-"
        )


def first_tokens(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Word -> the first of its tokens, where it has one. `offsets`: (start, end) of each token, in characters of the
    words joined by single spaces; a token that takes the space before a word along is that word's."""
    text = " ".join(words)
    starts = list(accumulate((len(word) + 1 for word in words), initial=0))
    found: dict[int, int] = {}
    for token, (start, end) in enumerate(offsets):
        while start < end and text[start].isspace():
            start += 1
        if start < end:
            found.setdefault(bisect_right(starts, start) - 1, token)
    return found


@dataclass
class TagEncoder(LabelEncoder):
    """`labels` are tags; `strict`: an I- that goes on with nothing is a bad row."""

    strict: bool = False

    def __call__(self, chunk: Chunk) -> Encoded:
        encoded = Encoded(chunk.held_out)
        kept: list[tuple[Any, dict[int, int], list[int], int]] = []
        for item, encoding in zip(chunk.items, self._encoded(chunk.items), strict=True):
            try:
                numbers, count = self._tags(item)
                self._check_length(item, encoding, encoded)
                first = first_tokens(item.example.words, encoding.offsets)
                if not first:
                    raise Unusable("no trained tokens", "no word has a token of its own", bad=False)
            except Unusable as unusable:
                encoded.dropped.append((item.place, unusable))
                continue
            encoded.places.append(item.place)
            kept.append((encoding.ids, first, numbers, count))
        if kept:
            encoded.lengths = np.array([len(ids) for ids, *_ in kept], np.int64)
            encoded.ids = np.concatenate([np.array(ids, np.uint32) for ids, *_ in kept])
            encoded.trained = np.zeros(len(encoded.ids), np.bool_)
            starts = np.cumsum(encoded.lengths) - encoded.lengths
            for start, (_, first, _, _) in zip(starts, kept, strict=True):
                encoded.trained[start + np.array([*first.values()])] = True
            tags = [numbers[word] for _, first, numbers, _ in kept for word in first]
            encoded.streams = {TAG: np.array(tags, np.int32)}
            lost = [len(numbers) - len(first) for _, first, numbers, _ in kept]
            encoded.columns = {MENDED: np.array([row[3] for row in kept], np.int32), LOST: np.array(lost, np.int32)}
        return encoded

    def preview(self, store: TokenStore, row: int) -> str:
        """The text as the base reads it, with the trained tokens marked, and their tags."""
        tags = [self.labels[tag] for tag in store.stream_of(TAG, row)]
        more = " ..." if len(tags) > PREVIEW_WORDS else ""
        return f"{Encoder.preview(self, store, row)}\n-> {' '.join(tags[:PREVIEW_WORDS])}{more}"

    def notes(self, train: TokenStore, held_out: TokenStore) -> Iterator[str]:
        """What is odd about the tags."""
        yield from count_notes(self.balance(train, held_out), of="word")
        kinds = sorted({kind_of(label) or label for label in self.labels})
        for one, other in near_names(kinds):
            yield f"note: kinds {one!r} and {other!r} differ in little; is one misspelt?"
        for column, told in (
            (MENDED, "I- tags go on with nothing and are read as B-"),
            (LOST, "words have no token of their own, most of them behind max_length; they are not learnt or scored"),
        ):
            if count := sum(int(store.column(column).sum()) for store in (train, held_out)):
                yield f"note: {count:,} {told}"

    def balance(self, train: TokenStore, held_out: TokenStore) -> tuple[LabelCount, ...]:
        counts = [self._counts(store) for store in (train, held_out)]
        return tuple(LabelCount(name, int(counts[0][i]), int(counts[1][i])) for i, name in enumerate(self.labels))

    def _counts(self, store: TokenStore) -> np.ndarray:
        return np.bincount(store.stream(TAG).astype(np.int64), minlength=len(self.labels))

    def _tags(self, item: Item) -> tuple[list[int], int]:
        """Numbers of the words' tags, and how many of them were mended."""
        said = tags_in(item.example.label, self.labels if self.named else ())
        tags, count = mended(said)
        if count and self.strict:
            at = next(at for at, (was, now) in enumerate(zip(said, tags, strict=True)) if was != now)
            where = f"token {at + 1}, {item.example.words[at]!r:.60}, is {said[at]!r}"
            raise Unusable("an I- tag goes on with nothing", f"{where}; write {tags[at]!r}")
        for tag in tags:
            if tag not in self._numbers:
                raise self._stranger(tag)
        return [self._numbers[tag] for tag in tags], count
