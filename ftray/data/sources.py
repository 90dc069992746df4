"""Reads the rows of a source lazily, each with its file and line; what cannot be read is a `BadRow`, not a crash."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ftray.config.schema import Source
from ftray.errors import DataError


class Row(NamedTuple):
    file: str
    line: int
    data: dict[str, Any]


class BadRow(NamedTuple):
    file: str
    line: int
    reason: str
    detail: str = ""


def read(source: Source) -> Iterator[Row | BadRow]:
    path = Path(source.path)
    if not path.is_file():
        raise DataError(f"{source.path}: no such file")
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                try:
                    data = json.loads(line.decode("utf-8"))
                except UnicodeDecodeError as error:
                    yield BadRow(source.path, number, "not UTF-8", str(error))
                except ValueError as error:
                    yield BadRow(source.path, number, "not JSON", str(error))
                else:
                    yield Row(source.path, number, data)


def digest(source: Source) -> str:
    import hashlib

    with open(source.path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
