"""Where rows come from: a file, a folder, a glob, a URI, a Hub data set or a packaged one, read lazily.

`read` yields each row with its file and line; `digest` says whether a source is still the same.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import lzma
import os
import posixpath
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from ftray.config.schema import Source
from ftray.data.readers import COMPRESSED, PLAIN, READERS, BadRow, Reader, Row, Rows, kind_of, known
from ftray.errors import DataError

HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
SPLITS = {
    "train": {"train", "training"},
    "test": {"test", "testing", "heldout"},
    "validation": {"validation", "valid", "val", "dev", "eval"},
}

__all__ = ["BadRow", "Row", "digest", "read"]


class File(NamedTuple):
    """A file to read: `name` as errors show it, `path` in `filesystem`; None: this machine's own."""

    name: str
    path: str
    filesystem: Any = None


def read(source: Source) -> Rows:
    """The rows of a source in a fixed order. Raises DataError where it does not exist or cannot be read."""
    if source.path.startswith("builtin:"):
        return _builtin(source)
    if _by_datasets(source):
        return _dataset_rows(source)
    return (row for file in files(source) for row in _file_rows(file, READERS[_kind(file.name, source) or ""]))


def digest(source: Source) -> str:
    """Hash of the source's bytes; of what the server says about them where they are not on this machine."""
    if source.path.startswith("builtin:"):
        return _hash(json.dumps(row.data, sort_keys=True).encode() for row in _builtin(source) if isinstance(row, Row))
    if _by_datasets(source):
        return _dataset_digest(source)
    return _hash(_state(file) for file in files(source))


def files(source: Source) -> list[File]:
    """The files of a source, sorted by name. Raises DataError where there are none that can be read."""
    found = _remote(source.path) if "://" in source.path else _local(source.path)
    single = len(found) == 1 and found[0].name == source.path
    if single:
        if _kind(source.path, source) is None:
            raise DataError(f"{source.path}: unknown file format; known are {', '.join(known())}, also with .gz")
        return found
    readable = [file for file in found if _kind(file.name, source)]
    if not readable:
        raise DataError(f"{source.path}: no data files in it; known are {', '.join(known())}, also with .gz")
    return _of_split(readable, source)


def _kind(name: str, source: Source) -> str | None:
    """As which kind a file is read: where the run says conll, text files and those of no known kind are CoNLL."""
    kind = kind_of(name)
    return ".conll" if source.format == "conll" and kind in PLAIN else kind


def _of_split(found: list[File], source: Source) -> list[File]:
    """The files of the wanted split, told by their names; of a folder with several splits the training part."""
    base = os.path.commonpath([os.path.dirname(file.path) for file in found])
    by_split: dict[str, list[File]] = {}
    for file in found:
        words = set(re.split(r"[^a-z]+", file.path.removeprefix(base).lower()))
        by_split.setdefault(next((split for split, names in SPLITS.items() if names & words), ""), []).append(file)
    wanted = source.split
    if wanted is None and "train" in by_split and len(by_split) > 1 and not _is_glob(source.path):
        wanted = "train"
    if wanted is None:
        return found
    name = next((split for split, names in SPLITS.items() if wanted.lower() in names), wanted)
    if name not in by_split:
        have = ", ".join(sorted(filter(None, by_split))) or "none"
        raise DataError(f"{source.path}: no file of split '{wanted}'; splits by file name: {have}")
    return by_split[name]


def _is_glob(path: str) -> bool:
    return any(sign in path for sign in "*?[")


def _local(path: str) -> list[File]:
    where = Path(path).expanduser()
    if where.is_dir():
        inside = sorted(p for p in where.rglob("*") if p.is_file() and not _aside(p.relative_to(where)))
        return [File(str(Path(path) / p.relative_to(where)), str(p)) for p in inside]
    if where.exists():
        return [File(path, str(where))]
    if _is_glob(path):
        import glob

        matches = sorted(match for match in glob.glob(str(where), recursive=True) if Path(match).is_file())
        if matches:
            return [File(match, match) for match in matches]
        raise DataError(f"{path}: no file matches")
    raise DataError(f"{path}: no such file or folder{_similar(where)}")


def _aside(path: Path) -> bool:
    """Files of a data folder that are not data: hidden ones, and those about it."""
    return any(part.startswith((".", "_")) for part in path.parts) or path.stem.lower() in (
        "readme",
        "license",
        "licence",
    )


def _similar(where: Path) -> str:
    """A did-you-mean from the names beside a missing file, or the first folder of its path that is missing."""
    parent = where.parent
    if not parent.is_dir():
        missing = next(folder for folder in [*reversed(parent.parents), parent] if not folder.exists())
        return f"; the folder {missing} does not exist"
    near = difflib.get_close_matches(where.name, [entry.name for entry in parent.iterdir()], n=1, cutoff=0.5)
    return f"; did you mean {parent / near[0]}?" if near else ""


def _remote(path: str) -> list[File]:
    import fsspec

    try:
        filesystem, bare = fsspec.url_to_fs(path)
        if _is_glob(bare):
            found = sorted(filesystem.glob(bare))
        elif filesystem.isdir(bare):
            found = sorted(filesystem.find(bare))
        else:
            found = [bare] if filesystem.exists(bare) else []
    except ImportError as error:
        raise DataError(f"{path}: {error}; install what it names") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be reached: {error}") from None
    if not found:
        raise DataError(f"{path}: no such file or folder")
    if found == [bare]:
        return [File(path, bare, filesystem)]
    scheme = path.split("://")[0]
    return [File(f"{scheme}://{name.removeprefix(f'{scheme}://')}", name, filesystem) for name in found]


def _file_rows(file: File, reader: Reader) -> Rows:
    line = 0
    try:
        with _open(file) as stream:
            for row in reader(stream, file.name):
                yield row
                line = row.line
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        after = f"broken after line {line}: {error}; fetch it again" if line else f"cannot be read: {error}"
        raise DataError(f"{file.name}: {after}") from None


def _open(file: File) -> IO[bytes]:
    import fsspec

    filesystem = file.filesystem or fsspec.filesystem("file")
    compression = "infer" if file.name.lower().endswith(COMPRESSED) else None
    try:
        return filesystem.open(file.path, "rb", compression=compression)
    except (ImportError, ValueError) as error:
        raise DataError(f"{file.name}: {error}; decompress it, or install what it names") from None


def _hash(parts: Iterator[bytes]) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(hashlib.sha256(part).digest())
    return total.hexdigest()


def _state(file: File) -> bytes:
    """What changes when a file does: its name and its bytes, or its remote checksum and size."""
    name = posixpath.basename(file.name).encode()
    if file.filesystem is not None and "file" not in file.filesystem.protocol:
        return b"%s %d %d" % (name, file.filesystem.checksum(file.path), file.filesystem.size(file.path) or 0)
    try:
        with open(file.path, "rb") as stream:
            return name + hashlib.file_digest(stream, "sha256").digest()
    except OSError as error:
        raise DataError(f"{file.name}: cannot be read: {error.strerror}") from None


def _builtin(source: Source) -> Rows:
    from ftray.data.sample import builtin_rows

    return (Row(source.path, number, row) for number, row in enumerate(builtin_rows(source.path), 1))


def _by_datasets(source: Source) -> bool:
    """Whether the `datasets` library finds the rows: Hub names, saved data sets, folders that declare their splits."""
    where = Path(source.path).expanduser()
    if where.is_dir():
        card = where / "README.md"
        declared = card.is_file() and re.search(r"^(configs|dataset_info):", card.read_text("utf-8", "replace"), re.M)
        return bool(source.subset or declared or _saved(where))
    if where.exists() or "://" in source.path or kind_of(source.path) or not HUB_NAME.fullmatch(source.path):
        return False
    # a path into a folder that is here is a misspelt file, not a Hub name
    return not ("/" in source.path and where.parent.is_dir())


def _saved(where: Path) -> bool:
    return (where / "dataset_dict.json").is_file() or (where / "state.json").is_file()


def _dataset_rows(source: Source) -> Rows:
    with _explained(source):
        loaded = _dataset(source)
        features = {name: getattr(of, "feature", of) for name, of in (loaded.features or {}).items()}  # of a list
        labels = {name: of for name, of in features.items() if hasattr(of, "int2str")}
        for number, row in enumerate(loaded, 1):
            named = {name: of.int2str(row[name]) for name, of in labels.items() if row[name] is not None}
            yield Row(source.path, number, row | named)


def _dataset(source: Source) -> Any:
    import datasets

    where, split = Path(source.path).expanduser(), source.split or "train"
    if _saved(where):
        loaded = datasets.load_from_disk(str(where))
        if not isinstance(loaded, datasets.DatasetDict):
            return loaded
        if split not in loaded:
            raise DataError(f"{source.path}: no split '{split}'; it has {', '.join(loaded)}")
        return loaded[split]
    path = str(where) if where.is_dir() else source.path
    try:
        return datasets.load_dataset(path, source.subset, split=split, streaming=True)
    except OSError:
        # without a network a streamed data set cannot be opened, but one that was downloaded before can
        if where.is_dir():
            raise
        return datasets.load_dataset(path, source.subset, split=split)


def _dataset_digest(source: Source) -> str:
    where = Path(source.path).expanduser()
    if where.is_dir():
        inside = sorted(path for path in where.rglob("*") if path.is_file())
        return _hash(_state(File(str(path.relative_to(where)), str(path))) for path in inside)
    with _explained(source):
        import datasets

        builder = datasets.load_dataset_builder(source.path, source.subset)
        return _hash(iter([f"{builder.hash} {builder.config_id}".encode()]))


@contextmanager
def _explained(source: Source) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # `datasets` raises many kinds of errors, its own and its file readers'
        if isinstance(error, OSError) and not Path(source.path).expanduser().is_dir():
            way = "neither a file here nor a data set that the Hub gives us; check the name, the network and the login"
            raise DataError(f"{source.path}: {way} ({error})") from None
        raise DataError(f"{source.path}: cannot be loaded: {error}") from None
