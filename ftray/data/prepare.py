"""From a run's data section to token stores: read, clean, split, render and tokenise once, cached by content.

`prepare` runs where the run is started; rendering and tokenising, which take nearly all the time, go through
`map_chunks`, which may spread them over many CPUs. Whoever needs the result later calls `open_prepared` with its key.
"""

from __future__ import annotations

import errno
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from ftray.config.objectives import ObjectiveSection
from ftray.config.schema import Data
from ftray.data import sources
from ftray.data.build import Build
from ftray.data.encode import Asked, Chunk, Encoded, Question
from ftray.data.encoders import encoder_for
from ftray.data.report import DataReport, histogram
from ftray.data.tokens import TokenStore, TokenWriter
from ftray.errors import DataError, StorageError

CODE_VERSION = 2  # raised whenever the same input gives other tokens, so that no stale cache is used
COMPLETE = "COMPLETE.json"
MapChunks = Callable[[Callable[[Chunk], Encoded], Iterable[Chunk]], Iterable[Encoded]]


class Storage(Protocol):
    """The part of the storage that is needed here; `upload` copies the marker last."""

    def exists(self, key: str) -> bool: ...
    def upload(self, local_folder: Path, key: str) -> Any: ...
    def download(self, key: str, into: Path) -> Path: ...


@dataclass(frozen=True)
class Prepared:
    """A prepared data set: `key` in the storage, `folder` on this machine.

    `baselines`: the questions once more for each number of examples shown before them, in the same order.
    """

    key: str
    folder: Path
    train: TokenStore
    eval: TokenStore
    questions: list[Question]
    report: DataReport
    baselines: dict[int, list[Question]] = field(default_factory=dict)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels that rows have, in the order of the head's rows; none for other objectives."""
        return tuple(label.name for label in self.report.labels)


def prepare(
    data: Data,
    *,
    objective: ObjectiveSection,
    tokenizer: Any,
    fingerprint: str,
    seed: int,
    storage: Storage,
    baselines: Sequence[int] = (),
    workdir: Path | None = None,
    map_chunks: MapChunks | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Prepared:
    """The data set of a run, from the cache where the same was prepared before.

    `fingerprint` is the tokenizer's; `baselines`: numbers of examples with which each question is asked too;
    `map_chunks(fn, chunks)` gives the results in order; `on_progress(rows)` is told how many rows were read so far.
    Raises DataError.
    """
    digest = content_digest(data, objective=objective, fingerprint=fingerprint, seed=seed, baselines=baselines)
    key = f"data/{digest}"
    if not storage.exists(f"{key}/{COMPLETE}"):
        encoder = encoder_for(data, objective, tokenizer)
        if baselines:
            encoder.baselines = tuple(baselines)
        with _scratch(workdir) as folder:
            build = Build(data, encoder, seed=seed, baselines=baselines, on_progress=on_progress)
            _write(build, map_chunks or map, folder, digest)
            # another run may have prepared the same meanwhile, and its files are in use
            if not storage.exists(f"{key}/{COMPLETE}"):
                storage.upload(folder, key)
    prepared = open_prepared(storage, key, workdir)
    return replace(prepared, report=prepared.report.weighted(data))


def open_prepared(storage: Storage, key: str, cache: Path | None = None) -> Prepared:
    """A prepared data set by its key. From an object store it is copied below `cache` once per machine."""
    if not storage.exists(f"{key}/{COMPLETE}"):
        raise DataError(f"{key}: no prepared data set here; start the run again and it is prepared")
    folder = _local_copy(storage, key, cache)
    lines = (folder / "questions.jsonl").read_text(encoding="utf-8").split("\n")
    questions = [Question(**json.loads(line)) for line in lines if line]
    shown = {question.shots for question in questions if question.shots is not None}
    return Prepared(
        key=key,
        folder=folder,
        train=TokenStore.open(folder / "train"),
        eval=TokenStore.open(folder / "eval"),
        questions=[question for question in questions if question.shots is None],
        baselines={count: [one for one in questions if one.shots == count] for count in sorted(shown)},
        report=DataReport.from_json(json.loads((folder / "report.json").read_text(encoding="utf-8"))),
    )


def content_digest(
    data: Data, *, objective: ObjectiveSection, fingerprint: str, seed: int, baselines: Sequence[int] = ()
) -> str:
    """What a prepared data set depends on: the bytes of its sources and everything that decides about tokens.

    Weights and packing are left out: they order rows, they do not change them.
    """
    unweighted = {"__all__": {"weight"}}
    section = data.model_dump(mode="json", exclude={"packing": True, "sources": unweighted, "eval_sources": unweighted})
    parts = {
        "version": CODE_VERSION,
        "data": section,
        "bytes": [sources.digest(source) for source in [*data.sources, *data.eval_sources]],
        "objective": objective.model_dump(mode="json", include=set(objective.decides)),
        "tokenizer": fingerprint,
        "seed": seed,
        **({"baselines": sorted(baselines)} if baselines else {}),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@contextmanager
def _scratch(workdir: Path | None) -> Iterator[Path]:
    if workdir is not None:
        workdir.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix="ftray-data-", dir=workdir) as folder:
            yield Path(folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = workdir or tempfile.gettempdir()
        raise StorageError(
            f"disk full while preparing data in {where}; free space, or point TMPDIR elsewhere"
        ) from error


def _write(build: Build, map_chunks: MapChunks, folder: Path, digest: str) -> None:
    """Fills a folder with the token stores, the questions, the report, and the marker."""
    started = time.monotonic()
    encoder, asked = build.encoder, list[Asked]()
    train = TokenWriter(folder / "train", len(encoder.tokenizer), build.labels)
    held_out = TokenWriter(folder / "eval", len(encoder.tokenizer), build.labels)
    with train, held_out:
        for encoded in map_chunks(encoder, build.chunks()):
            build.count(encoded)
            asked += encoded.asked
            writer = held_out if encoded.held_out else train
            rows = [(place.source, writer.file_number(place.file), place.line) for place in encoded.places]
            writer.extend(encoded.ids, encoded.trained, encoded.lengths, rows, encoded.columns, encoded.streams)
    build.check()
    questions = [
        Question(a.ids, a.answer, f"{a.place.file}:{a.place.line}", build.labels[a.place.source], a.shots)
        for a in asked
    ]
    lines = [json.dumps(question._asdict(), ensure_ascii=False) + "\n" for question in questions]
    (folder / "questions.jsonl").write_text("".join(lines), encoding="utf-8")
    report = _report(
        build, folder, digest, questions=sum(a.shots is None for a in asked), seconds=time.monotonic() - started
    )
    (folder / "report.json").write_text(json.dumps(report.to_json(), ensure_ascii=False), encoding="utf-8")
    (folder / COMPLETE).write_text(json.dumps({"digest": digest, "version": CODE_VERSION}), encoding="utf-8")


def _report(build: Build, folder: Path, digest: str, *, questions: int, seconds: float) -> DataReport:
    train, held_out = TokenStore.open(folder / "train"), TokenStore.open(folder / "eval")
    notes = [*build.notes(train=len(train), held_out=len(held_out)), *build.encoder.notes(train, held_out)]
    return DataReport(
        digest=digest,
        sources=tuple(tally.report() for tally in build.tallies),
        train_examples=len(train),
        eval_examples=len(held_out),
        tokens=train.tokens,
        trained_tokens=train.trained_tokens,
        eval_tokens=held_out.tokens,
        eval_trained_tokens=held_out.trained_tokens,
        questions=questions,
        questions_too_long=build.asked_too_long,
        max_length=build.data.max_length,
        length_histogram=histogram(train.lengths),
        preview=build.encoder.preview(train, 0),
        seconds=round(seconds, 3),
        notes=tuple(notes),
        labels=build.encoder.balance(train, held_out),
    )


def _local_copy(storage: Storage, key: str, cache: Path | None) -> Path:
    folder = (cache or Path(tempfile.gettempdir())) / "ftray-cache" / Path(key).name
    # the marker of a copy: files arrive one by one, and another worker of this machine may be copying them
    copied = folder / "COPIED"
    if copied.exists():
        return folder
    there = storage.download(key, folder)
    if there == folder:
        copied.touch()
    return there
