"""From a run's data section to token stores: read, clean, split, render and tokenise once, cached by content.

`prepare` runs where the run is started; rendering and tokenising, which take nearly all the time, go through
`map_chunks`, which may spread them over many CPUs. Whoever needs the result later calls `open_prepared` with its key.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ftray.config.schema import Data, Pretrain, Sft, Source
from ftray.data import clean, sources
from ftray.data.encode import Chunk, Encoded, Encoder, Item, Question
from ftray.data.format import Layout, Unusable, recognise
from ftray.data.report import MAX_NAMED, DataReport, Dropped, SourceReport, histogram
from ftray.data.split import Split
from ftray.data.tokens import TokenStore, TokenWriter
from ftray.errors import DataError

CODE_VERSION = 1  # raised whenever the same input gives other tokens, so that no stale cache is used
CHUNK_ROWS = 500
SAMPLE_ROWS = 20
COMPLETE = "COMPLETE.json"
MapChunks = Callable[[Callable[[Chunk], Encoded], Iterable[Chunk]], Iterable[Encoded]]


class Storage(Protocol):
    """The part of the storage that is needed here."""

    def exists(self, key: str) -> bool: ...
    def upload(self, local_folder: Path, key: str) -> Any: ...
    def download(self, key: str, into: Path) -> Path: ...
    def local_path(self, key: str) -> Path | None: ...
    def write_json(self, key: str, value: Any) -> Any: ...


@dataclass(frozen=True)
class Prepared:
    """A prepared data set: `key` in the storage, `folder` on this machine."""

    key: str
    folder: Path
    train: TokenStore
    eval: TokenStore
    questions: list[Question]
    report: DataReport


def prepare(
    data: Data,
    *,
    objective: Sft | Pretrain,
    tokenizer: Any,
    fingerprint: str,
    seed: int,
    storage: Storage,
    workdir: Path | None = None,
    map_chunks: MapChunks | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Prepared:
    """The data set of a run, from the cache where the same was prepared before.

    `fingerprint` is the tokenizer's; `map_chunks(fn, chunks)` gives the results in order; `on_progress(rows)` is told
    how many rows were read so far. Raises DataError.
    """
    digest = content_digest(data, objective=objective, fingerprint=fingerprint, seed=seed)
    key = f"data/{digest}"
    if not storage.exists(f"{key}/{COMPLETE}"):
        with tempfile.TemporaryDirectory(prefix="ftray-data-", dir=workdir) as folder:
            encoder = Encoder(
                tokenizer,
                objective=objective.kind,
                train_on=objective.train_on if isinstance(objective, Sft) else "all",
                max_length=data.max_length,
                too_long=data.too_long,
                few_shot=data.few_shot,
            )
            build = _Build(data, encoder, seed, Path(folder), digest, on_progress or (lambda rows: None))
            build.run(map_chunks or map)
            storage.upload(Path(folder), key)
            storage.write_json(f"{key}/{COMPLETE}", {"digest": digest, "version": CODE_VERSION})
    prepared = open_prepared(storage, key, workdir)
    return replace(prepared, report=_with_weights(prepared.report, data))


def open_prepared(storage: Storage, key: str, cache: Path | None = None) -> Prepared:
    """A prepared data set by its key. Object stores are copied below `cache` once per machine."""
    if not storage.exists(f"{key}/{COMPLETE}"):
        raise DataError(f"{key}: no prepared data set here; start the run again and it is prepared")
    folder = storage.local_path(key) or _downloaded(storage, key, cache)
    lines = (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    return Prepared(
        key=key,
        folder=folder,
        train=TokenStore.open(folder / "train"),
        eval=TokenStore.open(folder / "eval"),
        questions=[Question(**json.loads(line)) for line in lines],
        report=DataReport.from_json(json.loads((folder / "report.json").read_text(encoding="utf-8"))),
    )


def content_digest(data: Data, *, objective: Sft | Pretrain, fingerprint: str, seed: int) -> str:
    """What a prepared data set depends on: the bytes of its sources and everything that decides about tokens.

    Weights and packing are left out: they order rows, they do not change them.
    """
    section = data.model_dump(mode="json", exclude={"packing": True, "sources": {"__all__": {"weight"}}})
    parts = {
        "version": CODE_VERSION,
        "data": section,
        "bytes": [sources.digest(source) for source in [*data.sources, *data.eval_sources]],
        "objective": {name: value for name, value in objective.model_dump().items() if name in ("kind", "train_on")},
        "tokenizer": fingerprint,
        "seed": seed,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@dataclass
class _Tally:
    """Counts of one source while it is read."""

    source: Source
    held_out: bool
    layout: Layout | None = None
    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: list[Dropped] = field(default_factory=list)
    kept: dict[bool, set[int]] = field(default_factory=lambda: {True: set(), False: set()})
    rows: Counter[bool] = field(default_factory=Counter)
    truncated: int = 0
    tokens: int = 0
    trained: int = 0

    def report(self) -> SourceReport:
        layout = self.layout
        return SourceReport(
            path=self.source.path,
            format=layout.kind if layout else "",
            columns={ours: theirs for ours, theirs in layout.columns.items() if ours != theirs} if layout else {},
            unused_columns=layout.unused if layout else (),
            weight=self.source.weight,
            held_out=self.held_out,
            rows_read=self.read,
            rows_train=self.rows[False],
            rows_eval=self.rows[True],
            dropped=dict(self.dropped),
            examples=tuple(self.examples),
            truncated=self.truncated,
            zero_trained=self.dropped["no trained tokens"] + self.dropped["no message to train on"],
            tokens=self.tokens,
            trained_tokens=self.trained,
        )


class _Build:
    """One preparation, from rows to a finished folder."""

    def __init__(
        self, data: Data, encoder: Encoder, seed: int, folder: Path, digest: str, progress: Callable[[int], None]
    ):
        self.data, self.encoder, self.seed, self.folder, self.digest = data, encoder, seed, folder, digest
        self.progress = progress
        self.tallies = [_Tally(source, False) for source in data.sources]
        self.tallies += [_Tally(source, True) for source in data.eval_sources]
        self.cleaner = clean.Cleaner(data.clean)
        fraction = 0.0 if data.eval_sources else data.eval_fraction
        self.split = Split(fraction=fraction, limit=data.eval_rows)
        self.questions: list[Question] = []
        self.too_long = 0
        self.started = time.monotonic()

    def run(self, map_chunks: MapChunks) -> None:
        vocabulary = len(self.encoder.tokenizer)
        labels = [tally.source.path for tally in self.tallies]
        train = TokenWriter(self.folder / "train", vocabulary, labels)
        held = TokenWriter(self.folder / "eval", vocabulary, labels)
        with train, held:
            for encoded in map_chunks(self.encoder, self._chunks()):
                self._store(encoded, held if encoded.chunk.held_out else train)
        self._check()
        self._write()

    def _chunks(self) -> Iterator[Chunk]:
        pending: list[Item] = []
        for number, tally in enumerate(self.tallies):
            for item in self._items(number, tally):
                for trained in self.split.add(item, clean.key(clean.prompt(item.example), self.seed)):
                    pending.append(trained)
                    if len(pending) == CHUNK_ROWS:
                        yield Chunk(False, pending)
                        pending = []
        if pending:
            yield Chunk(False, pending)
        held = iter(self.split.held())
        while part := list(islice(held, CHUNK_ROWS)):
            yield Chunk(True, part)

    def _items(self, number: int, tally: _Tally) -> Iterator[Item]:
        for row in self._rows(tally):
            try:
                assert tally.layout is not None
                example = tally.layout.example(row.data)
                self.cleaner.check(example)
            except Unusable as unusable:
                self._drop(tally, row.file, row.line, unusable)
                continue
            yield Item(number, row.file, row.line, example)

    def _rows(self, tally: _Tally) -> Iterator[sources.Row]:
        rows = self._readable(tally)
        first = list(islice(rows, SAMPLE_ROWS))
        if not first:
            return
        tally.layout = recognise(
            [row.data for row in first],
            tally.source,
            objective=self.encoder.objective,
            template=self.data.template,
            system=self.data.system,
        )
        yield from chain(first, rows)

    def _readable(self, tally: _Tally) -> Iterator[sources.Row]:
        for row in sources.read(tally.source):
            tally.read += 1
            if tally.read % 1000 == 0:
                self.progress(sum(t.read for t in self.tallies))
            if isinstance(row, sources.BadRow):
                self._drop(tally, row.file, row.line, Unusable(row.reason, row.detail))
            else:
                yield row

    def _drop(self, tally: _Tally, file: str, line: int, unusable: Unusable) -> None:
        if unusable.bad and self.data.strict:
            raise DataError(f"{file}:{line}: {unusable.reason}; mend the row, or set data.strict: false to drop it")
        tally.dropped[unusable.kind] += 1
        if len(tally.examples) < MAX_NAMED:
            tally.examples.append(Dropped(file, line, unusable.reason))

    def _store(self, encoded: Encoded, writer: TokenWriter) -> None:
        items, held_out = encoded.chunk.items, encoded.chunk.held_out
        for number, unusable in encoded.dropped:
            item = items[number]
            self._drop(self.tallies[item.source], item.file, item.line, unusable)
        rows = [(items[n].source, writer.file_number(items[n].file), items[n].line) for n in encoded.items]
        writer.extend(encoded.ids, encoded.trained, encoded.lengths, rows)
        for source, count in Counter(items[n].source for n in set(encoded.items)).items():
            self.tallies[source].rows[held_out] += count
        for source, count in encoded.truncated.items():
            self.tallies[source].truncated += count
        self.too_long += encoded.questions_too_long
        for number, ids, answer in encoded.questions:
            item = items[number]
            task = self.tallies[item.source].source.path
            self.questions.append(Question(ids, answer, f"{item.file}:{item.line}", task))

    def _check(self) -> None:
        pass

    def _write(self) -> None:
        train, held = TokenStore.open(self.folder / "train"), TokenStore.open(self.folder / "eval")
        report = DataReport(
            digest=self.digest,
            sources=tuple(tally.report() for tally in self.tallies),
            train_examples=len(train),
            eval_examples=len(held),
            tokens=train.tokens,
            trained_tokens=train.trained_tokens,
            eval_tokens=held.tokens,
            eval_trained_tokens=held.trained_tokens,
            questions=len(self.questions),
            questions_too_long=self.too_long,
            max_length=self.data.max_length,
            length_histogram=histogram(train.lengths),
            preview="",
            seconds=round(time.monotonic() - self.started, 3),
        )
        lines = [json.dumps(question._asdict(), ensure_ascii=False) + "\n" for question in self.questions]
        (self.folder / "questions.jsonl").write_text("".join(lines), encoding="utf-8")
        (self.folder / "report.json").write_text(json.dumps(report.to_json(), ensure_ascii=False), encoding="utf-8")


def _with_weights(report: DataReport, data: Data) -> DataReport:
    given = [*data.sources, *data.eval_sources]
    return replace(
        report, sources=tuple(replace(r, weight=s.weight) for r, s in zip(report.sources, given, strict=True))
    )


def _downloaded(storage: Storage, key: str, cache: Path | None) -> Path:
    """Workers of one machine share a copy; each downloads beside it and the first to finish renames its own."""
    base = (cache or Path(tempfile.gettempdir())) / "ftray-cache"
    final = base / Path(key).name
    if final.is_dir():
        return final
    base.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=base, prefix=".part-"))
    folder = storage.download(key, part)
    try:
        os.rename(folder, final)
    except OSError:
        if not final.is_dir():
            raise
    shutil.rmtree(part, ignore_errors=True)
    return final
