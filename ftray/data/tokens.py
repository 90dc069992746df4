"""The token store: tokenised examples on disk, memory-mapped, so that every worker reads them without loading them.

A folder holds, for n examples of together t tokens:

    ids.bin         t token ids, uint16 where the vocabulary fits, else uint32
    trained.bin     t bytes, 1 where the token counts in the loss
    offsets.npy     n + 1 int64: example i is ids[offsets[i]:offsets[i + 1]]
    counts.npy      n int32: trained tokens of each example
    rows.npy        n x 3 int64: source, file, line
    <name>.column.npy   n more values: what an objective keeps about each example, if it does
    <name>.stream.npy   what it keeps about each trained token, in their order
    meta.json       the id type, the file names and the source labels; written last
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ftray.errors import DataError


class TokenWriter:
    """Appends examples to a folder. Use as a context manager, or call close()."""

    def __init__(self, folder: str | Path, vocab_size: int, tasks: Sequence[str] = ()):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
        self.tasks = list(tasks)
        self._ids = (self.folder / "ids.bin").open("wb")
        self._trained = (self.folder / "trained.bin").open("wb")
        self._lengths: list[np.ndarray] = []
        self._counts: list[np.ndarray] = []
        self._rows: list[np.ndarray] = []
        self._columns: dict[str, list[np.ndarray]] = {}
        self._streams: dict[str, list[np.ndarray]] = {}
        self._files: dict[str, int] = {}

    def add(self, ids: Any, trained: Any, source: int, line: int, file: str = "") -> None:
        """One example: ids and trained (bool) of equal length, from `line` of `file`, which belongs to `source`."""
        ids = np.asarray(ids)
        self.extend(ids, np.asarray(trained), [len(ids)], [(source, self.file_number(file), line)])

    def extend(
        self,
        ids: np.ndarray,
        trained: np.ndarray,
        lengths: Any,
        rows: Any,
        columns: Mapping[str, np.ndarray] | None = None,
        streams: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Many examples, joined: `lengths` cuts ids and trained; `rows` is (source, file number, line) of each.

        `columns`: more arrays with a value for each of them, `streams`: for each trained token; the same names every
        time.
        """
        lengths = np.asarray(lengths, dtype=np.int64)
        if len(ids) != len(trained) or len(ids) != lengths.sum():
            raise ValueError(f"{len(ids)} ids, {len(trained)} trained flags, lengths that add up to {lengths.sum()}")
        for name, values in (columns or {}).items():
            if len(values) != len(lengths):
                raise ValueError(f"column {name}: {len(values)} values for {len(lengths)} examples")
        if not len(lengths):
            return
        trained = np.asarray(trained, dtype=np.bool_)
        for name, values in (streams or {}).items():
            if len(values) != trained.sum():
                raise ValueError(f"stream {name}: {len(values)} values for {trained.sum()} trained tokens")
            self._streams.setdefault(name, []).append(values)
        self._ids.write(np.ascontiguousarray(ids, dtype=self.dtype).data)
        self._trained.write(np.ascontiguousarray(trained).data)
        before = np.concatenate([[0], np.cumsum(trained, dtype=np.int64)])
        ends = np.cumsum(lengths)
        self._lengths.append(lengths)
        self._counts.append((before[ends] - before[ends - lengths]).astype(np.int32))
        self._rows.append(np.asarray(rows, dtype=np.int64).reshape(len(lengths), 3))
        for name, values in (columns or {}).items():
            self._columns.setdefault(name, []).append(values)

    def file_number(self, file: str) -> int:
        return self._files.setdefault(file, len(self._files))

    def close(self) -> None:
        self._ids.close()
        self._trained.close()
        lengths = np.concatenate([*self._lengths, np.zeros(0, np.int64)])
        np.save(self.folder / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
        np.save(self.folder / "counts.npy", np.concatenate([*self._counts, np.zeros(0, np.int32)]))
        np.save(self.folder / "rows.npy", np.concatenate([*self._rows, np.zeros((0, 3), np.int64)]))
        for name, parts in self._columns.items():
            np.save(self.folder / f"{name}.column.npy", np.concatenate(parts))
        for name, parts in self._streams.items():
            np.save(self.folder / f"{name}.stream.npy", np.concatenate(parts))
        meta = {"dtype": self.dtype.name, "files": list(self._files), "tasks": self.tasks}
        (self.folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._ids.close()
            self._trained.close()


class TokenStore:
    """Read-only view of a folder written by TokenWriter. Pickles as its path."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            self._meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(f"{self.folder}: no finished token store here; prepare the data again") from None
        self._offsets = np.load(self.folder / "offsets.npy", mmap_mode="r")
        self.trained_counts: np.ndarray = np.load(self.folder / "counts.npy", mmap_mode="r")
        self._rows = np.load(self.folder / "rows.npy", mmap_mode="r")
        self._ids = _map(self.folder / "ids.bin", np.dtype(self._meta["dtype"]))
        self._trained = _map(self.folder / "trained.bin", np.dtype(np.bool_))
        self._beside: dict[str, np.ndarray] = {}
        if not len(self._ids) == len(self._trained) == self.tokens:
            raise DataError(
                f"{self.folder}: the token store is cut off ({len(self._ids)} of {self.tokens} tokens); "
                "delete the folder and prepare the data again"
            )

    @classmethod
    def open(cls, folder: str | Path) -> TokenStore:
        return cls(folder)

    def __reduce__(self):
        return (type(self), (self.folder,))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int32 [n]."""
        return np.diff(self._offsets).astype(np.int32)

    @property
    def sources(self) -> np.ndarray:
        """Which source each example came from, int64 [n], an index into `tasks`."""
        return self._rows[:, 0]

    @property
    def tasks(self) -> list[str]:
        """Labels of the sources, in the run's order."""
        return self._meta["tasks"]

    def ids(self, i: int) -> np.ndarray:
        """Token ids of example i."""
        start, end = self._span(i)
        return self._ids[start:end]

    def trained(self, i: int) -> np.ndarray:
        """Which tokens of example i count in the loss, bool."""
        start, end = self._span(i)
        return self._trained[start:end]

    def column(self, name: str) -> np.ndarray:
        """What the encoder kept about each example under this name, [n, ...]."""
        return self._kept(f"{name}.column.npy")

    def stream(self, name: str) -> np.ndarray:
        """What the encoder kept about each trained token under this name, [trained tokens]."""
        return self._kept(f"{name}.stream.npy")

    def stream_of(self, name: str, i: int) -> np.ndarray:
        """The same of example i alone."""
        end = int(self._trained_ends[i])
        return self.stream(name)[end - int(self.trained_counts[i]) : end]

    def row_name(self, i: int) -> str:
        """Where example i came from, e.g. "orders.jsonl:17"."""
        _, file, line = self._rows[i]
        return f"{self._meta['files'][file]}:{line}"

    def task(self, i: int) -> str:
        """Label of the source of example i."""
        source = int(self._rows[i, 0])
        return self.tasks[source] if source < len(self.tasks) else str(source)

    @property
    def tokens(self) -> int:
        return int(self._offsets[-1])

    @cached_property
    def trained_tokens(self) -> int:
        return int(self.trained_counts.sum(dtype=np.int64))

    @cached_property
    def _trained_ends(self) -> np.ndarray:
        return np.cumsum(self.trained_counts, dtype=np.int64)

    def _kept(self, file: str) -> np.ndarray:
        """What stands in a file of its own, opened once: batches ask for it row by row."""
        if file not in self._beside:
            self._beside[file] = np.load(self.folder / file, mmap_mode="r") if len(self) else np.zeros(0)
        return self._beside[file]

    def _span(self, i: int) -> tuple[int, int]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"example {i} of {len(self)}")
        i %= len(self)
        return int(self._offsets[i]), int(self._offsets[i + 1])


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    # an empty file cannot be memory-mapped
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)
