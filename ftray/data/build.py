"""The serial part of preparation: rows are read, checked, cleaned and split into chunks, and what becomes of each is
counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice

from ftray.config.schema import Data, Source
from ftray.data import sources
from ftray.data.augment import Augmenter
from ftray.data.clean import Cleaner, key, said
from ftray.data.encode import Chunk, Encoded, Encoder, Item, Place
from ftray.data.format import Layout, Refused, Unusable, recognise
from ftray.data.report import MAX_NAMED, Dropped, SourceReport
from ftray.data.split import Split
from ftray.errors import DataError

CHUNK_ROWS = 500
SAMPLE_ROWS = 20  # rows that decide about a source's layout
SHOT_ROWS = 2000  # training rows of a source from which the few-shot examples are taken
# reasons for which a source may lose all its rows without an error
HARMLESS = {"duplicate", "near duplicate", "also held out", "more than eval_rows"}


@dataclass
class Tally:
    """What became of the rows of one source, counted while it is read."""

    source: Source
    held_out: bool
    layout: Layout | None = None
    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    named: list[Dropped] = field(default_factory=list)
    kept: Counter[bool] = field(default_factory=Counter)  # rows by whether they are held out
    last_kept: Place | None = None
    altered: int = 0
    truncated: int = 0
    tokens: int = 0
    trained_tokens: int = 0

    def drop(self, file: str, line: int, unusable: Unusable) -> None:
        self.dropped[unusable.kind] += 1
        if len(self.named) < MAX_NAMED:
            self.named.append(Dropped(file, line, unusable.reason))

    def report(self) -> SourceReport:
        columns = self.layout.columns if self.layout else {}
        return SourceReport(
            path=self.source.path,
            format=self.layout.kind if self.layout else "",
            columns={ours: theirs for ours, theirs in columns.items() if ours != theirs},
            unused_columns=self.layout.unused if self.layout else (),
            weight=self.source.weight,
            held_out=self.held_out,
            rows_read=self.read,
            rows_train=self.kept[False],
            rows_eval=self.kept[True],
            dropped=dict(self.dropped.most_common()),
            examples=tuple(self.named),
            altered=self.altered,
            truncated=self.truncated,
            zero_trained=self.dropped["no trained tokens"] + self.dropped["no message to train on"],
            tokens=self.tokens,
            trained_tokens=self.trained_tokens,
        )


class Build:
    """One preparation. `chunks()` gives what to encode; each result goes to `count()`; `check()` ends it.

    Sources are numbered as the run names them, held-out sources after the others. Held-out sources are read first, so
    that training rows with their prompts can be left out; their own rows are encoded last.
    """

    def __init__(
        self,
        data: Data,
        encoder: Encoder,
        *,
        seed: int,
        baselines: Sequence[int] = (),
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        self.data, self.encoder, self.seed = data, encoder, seed
        self._asked_with = max(baselines, default=0)
        self._most_shown = max(data.few_shot, self._asked_with)
        self.tallies = [Tally(s, False) for s in data.sources] + [Tally(s, True) for s in data.eval_sources]
        self.labels = [tally.source.task or tally.source.path for tally in self.tallies]
        self.asked_too_long = 0
        self._progress = on_progress or (lambda rows: None)
        self._cleaner = Cleaner(data.clean)
        self._bad: list[str] = []
        self._refused: list[str] = []
        self._held_prompts: set[int] = set()
        self._shots: dict[int, list[Item]] = {}

    def chunks(self) -> Iterator[Chunk]:
        """What to encode: training rows as they are read, then the held-out rows. Raises DataError."""
        given = bool(self.data.eval_sources)
        fraction = 1.0 if given else self.data.eval_fraction
        split = Split(fraction=fraction, limit=self.data.eval_rows)
        train = range(len(self.data.sources))
        if given:
            for item, prompt in self._items(range(len(train), len(self.tallies))):
                self._held_prompts.add(prompt)
                for over in split.add(item, prompt):
                    self._drop(over.place, Unusable("more than eval_rows", bad=False))
            rows: Iterable[Item] = (item for item, _ in self._items(train))
        else:
            rows = self._split_off(split, train)
        trained = self._with_shots(rows) if self._most_shown else rows
        if self.data.augment.copies:
            trained = self._with_copies(trained)
        yield from self._chunked(trained, held_out=False)
        self._progress(sum(tally.read for tally in self.tallies))
        yield from self._chunked(iter(split.held()), held_out=True)

    def count(self, encoded: Encoded) -> None:
        """Takes note of an encoded chunk. Raises DataError under `strict`."""
        for place, unusable in encoded.dropped:
            self._drop(place, unusable)
            if isinstance(unusable, Refused):
                self._refused.append(f"{place.file}:{place.line}: {unusable.reason}")
        at = 0
        for place, length in zip(encoded.places, encoded.lengths.tolist(), strict=True):
            tally = self.tallies[place.source]
            tally.tokens += length
            tally.trained_tokens += int(encoded.trained[at : at + length].sum())
            # examples of one row stand together
            tally.kept[encoded.held_out] += place != tally.last_kept
            tally.last_kept = place
            at += length
        for source, count in encoded.truncated.items():
            self.tallies[source].truncated += count
        self.asked_too_long += encoded.asked_too_long

    def check(self) -> None:
        """Raises DataError where there is nothing to train on, a row that is refused, or a bad one under `strict`."""
        if self._refused:
            more = f"\n  and {len(self._refused) - 10:,} more" if len(self._refused) > 10 else ""
            lines = "".join(f"\n  {line}" for line in self._refused[:10])
            raise DataError(f"{len(self._refused):,} rows contradict the others; mend or remove them{lines}{more}")
        if self._bad:
            self._refuse()
        for tally in self.tallies:
            if not tally.kept and set(tally.dropped) - HARMLESS:
                raise DataError(f"{tally.source.path}: none of its {tally.read:,} rows can be used:{_reasons([tally])}")
        for number, shots in self._shots.items():
            if shots and len(shots) < self._asked_with:
                path, wanted = self.tallies[number].source.path, self._asked_with
                raise DataError(f"evaluate.baselines: {path} has {len(shots)} training rows to show, not {wanted}")
        train = self.tallies[: len(self.data.sources)]
        if not any(tally.kept[False] for tally in train):
            raise DataError(f"no row is left to train on:{_reasons(train) or ' all of them are held out'}")

    def notes(self, *, train: int, held_out: int) -> Iterator[str]:
        """What a user may want to change; `train` and `held_out` are numbers of examples."""
        cut = sum(tally.truncated for tally in self.tallies)
        if cut > 0.05 * (train + held_out):
            share = cut / (train + held_out)
            yield f"note: {share:.0%} of the examples are cut at {self.data.max_length} tokens; raise data.max_length"
        if not held_out:
            yield "note: no rows are held out, so nothing can be compared; set data.eval_fraction or data.eval_sources"
        for tally in self.tallies:
            if tally.read and not tally.kept:
                yield f"note: {tally.source.path}: no row of it is used; {', '.join(tally.dropped)}"

    def _split_off(self, split: Split, numbers: range) -> Iterator[Item]:
        any_trained = False
        for item, prompt in self._items(numbers):
            for trained in split.add(item, prompt):
                any_trained = True
                yield trained
        yield from split.finish(trained=any_trained)

    def _items(self, numbers: Iterable[int]) -> Iterator[tuple[Item, int]]:
        """Usable examples of some sources, each with the hash of its prompt."""
        for number in numbers:
            tally = self.tallies[number]
            for row in self._rows(number, tally):
                place = Place(number, row.file, row.line)
                try:
                    assert tally.layout is not None
                    example = tally.layout.example(row.data)
                    says = said(example)
                    prompt = key(says.prompt, self.seed)
                    if not tally.held_out and prompt in self._held_prompts:
                        raise Unusable("also held out", "its prompt is in eval_sources", bad=False)
                    self._cleaner.check(example, says, row=f"{row.file}:{row.line}")
                except Unusable as unusable:
                    self._drop(place, unusable)
                    continue
                yield Item(*place, example), prompt

    def _rows(self, number: int, tally: Tally) -> Iterator[sources.Row]:
        rows = self._readable(number, tally)
        first = list(islice(rows, SAMPLE_ROWS))
        if not tally.read:
            raise DataError(f"{tally.source.path}: no rows in it")
        if first:
            tally.layout = recognise(
                [row.data for row in first],
                tally.source,
                objective=self.encoder.objective,
                template=self.data.template,
                system=self.data.system,
            )
        yield from chain(first, rows)

    def _readable(self, number: int, tally: Tally) -> Iterator[sources.Row]:
        for row in sources.read(tally.source):
            tally.read += 1
            if tally.read % 1000 == 0:
                self._progress(sum(each.read for each in self.tallies))
            if isinstance(row, sources.BadRow):
                self._drop(Place(number, row.file, row.line), Unusable(row.reason, row.detail))
            else:
                yield row

    def _drop(self, place: Place, unusable: Unusable) -> None:
        self.tallies[place.source].drop(place.file, place.line, unusable)
        if unusable.bad and self.data.strict:
            self._bad.append(f"{place.file}:{place.line}: {unusable.reason}")
            if len(self._bad) >= MAX_NAMED:
                self._refuse()

    def _refuse(self) -> None:
        count = f"{len(self._bad)} bad row{'s' if len(self._bad) > 1 else ''}"
        more = " or more" if len(self._bad) >= MAX_NAMED else ""
        lines = "".join(f"\n  {line}" for line in self._bad)
        raise DataError(f"{count}{more}, and data.strict is set; mend them, or set it to false to drop them{lines}")

    def _with_shots(self, rows: Iterable[Item]) -> Iterator[Item]:
        """Passes rows on, once those of each source that are shown as examples have been chosen from its first ones.

        One more than are shown are chosen, by hash, so that files sorted by answer give a mixture.
        """
        waiting: list[Item] = []
        for item in rows:
            if waiting and (waiting[0].source != item.source or len(waiting) == SHOT_ROWS):
                self._choose_shots(waiting)
                yield from waiting
                waiting = []
            if item.source in self._shots:
                yield item
            else:
                waiting.append(item)
        if waiting:
            self._choose_shots(waiting)
            yield from waiting

    def _with_copies(self, rows: Iterable[Item]) -> Iterator[Item]:
        """Rows and their altered copies; a copy that asks what a held-out row may ask is left out."""
        augmenter = Augmenter(self.data.augment, seed=self.seed)
        held = 0.0 if self.data.eval_sources else self.data.eval_fraction * 2**64
        for item in rows:
            yield item
            for example in augmenter.copies(item):
                prompt = key(said(example).prompt, self.seed)
                if prompt >= held and prompt not in self._held_prompts:
                    self.tallies[item.source].altered += 1
                    yield Item(*item.place, example)

    def _choose_shots(self, items: list[Item]) -> None:
        talks = [item for item in items if item.example.messages]
        ranked = sorted(talks, key=lambda item: key(f"{item.file}:{item.line}", self.seed))
        self._shots.setdefault(items[0].source, ranked[: self._most_shown + 1])

    def _chunked(self, items: Iterable[Item], *, held_out: bool) -> Iterator[Chunk]:
        items = iter(items)
        while part := list(islice(items, CHUNK_ROWS)):
            yield Chunk(held_out, part, {number: self._shown(number) for number in {item.source for item in part}})

    def _shown(self, number: int) -> list[Item]:
        """Few-shot examples for a source; a held-out one takes those of the source at its place, or of the first."""
        if number < len(self.data.sources) or not self._shots:
            return self._shots.get(number, [])
        return self._shots.get(number - len(self.data.sources), next(iter(self._shots.values())))


def _reasons(tallies: Iterable[Tally]) -> str:
    total: Counter[str] = Counter()
    for tally in tallies:
        total.update(tally.dropped)
    named = [example for tally in tallies for example in tally.named]
    lines = [f"\n  {count:,}: {reason}" for reason, count in total.most_common()]
    return "".join(lines) + (f"\n  e.g. {named[0].file}:{named[0].line}: {named[0].reason}" if named else "")
