"""One open file to rows: JSON lines, JSON arrays, CSV, Parquet, CoNLL and plain text, none of it held in memory as a
whole.

Every reader takes a binary stream and the file's name, and yields `Row`s and, for what cannot be read, `BadRow`s. Lines
count from 1 and are where a row begins; rows of Parquet files count from 1.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import IO, Any, NamedTuple

from ftray.errors import DataError

BLOCK_CHARS = 2000  # a row of a plain text file: whole paragraphs, until there is this much
LONGEST_BLOCK = 4 * BLOCK_CHARS  # text without blank lines is cut at a line end from here
PARQUET_BATCH = 512
PLAIN = (".txt", ".text", None)
"""Extensions of files that may hold any text; None: of no kind that is known."""
_BLANK = " \t\r\n"  # and no more: a word may be a no-break space
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class Row(NamedTuple):
    """A row as it stands in the file: column -> value."""

    file: str
    line: int
    data: dict[str, Any]


class BadRow(NamedTuple):
    """What could not be read as a row. `reason` is what the report counts."""

    file: str
    line: int
    reason: str
    detail: str = ""


Rows = Iterator[Row | BadRow]
Reader = Callable[[IO[bytes], str], Rows]


def json_lines(stream: IO[bytes], file: str) -> Rows:
    """One JSON object a line; blank lines are skipped."""
    for number, line in enumerate(_lines(stream, file), 1):
        if line.strip():
            yield _json_row(line, file, number)


def json_file(stream: IO[bytes], file: str) -> Rows:
    """A JSON array of objects; or JSON lines, which many files named .json hold."""
    stream = io.BufferedReader(stream)  # type: ignore[arg-type, type-var]
    _refuse_utf16(stream.peek(4), file)
    start = stream.peek(4096)[:4096].removeprefix(codecs.BOM_UTF8).lstrip()
    yield from json_lines(stream, file) if start[:1] != b"[" else _json_array(stream, file)


def _json_row(line: bytes, file: str, number: int) -> Row | BadRow:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRow(file, number, "not UTF-8", f"byte 0x{line[error.start]:02x} at column {error.start + 1}")
    except json.JSONDecodeError as error:
        return BadRow(file, number, "not JSON", f"{error.msg} at column {error.colno}")
    except RecursionError:
        return BadRow(file, number, "not JSON", "nested too deeply")
    return _row(value, file, number)


def _row(value: Any, file: str, number: int) -> Row | BadRow:
    if not isinstance(value, dict):
        return BadRow(file, number, "not a JSON object", f"a row is {{...}}, this is a {type(value).__name__}")
    return Row(file, number, value)


def _json_array(stream: IO[bytes], file: str) -> Rows:
    """Objects of an array, read piece by piece; what follows a syntax error cannot be told apart, so it ends there."""
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape")
    decoder = json.JSONDecoder()
    buffer, line = text.read(1 << 16).lstrip()[1:], 1
    while True:
        bare = buffer.lstrip(" \t\r\n,")
        line += buffer.count("\n", 0, len(buffer) - len(bare))
        buffer = bare
        if buffer[:1] == "]":
            return
        try:
            value, end = decoder.raw_decode(buffer)
        except json.JSONDecodeError as error:
            more = text.read(
                max(1 << 16, len(buffer))
            )  # doubling: an object larger than the buffer is read in few tries
            if not more:
                yield BadRow(file, line, "not JSON", f"{error.msg}; the rest of the array is not read")
                return
            buffer += more
            continue
        yield _row(value, file, line) if _decoded(buffer[:end]) else BadRow(file, line, "not UTF-8")
        line += buffer.count("\n", 0, end)
        buffer = buffer[end:]


def separated(stream: IO[bytes], file: str, delimiter: str | None = None) -> Rows:
    """CSV or TSV with a header; quoted fields may hold line breaks. The header's commonest of , ; tab parts fields."""
    stream = io.BufferedReader(stream)  # type: ignore[arg-type, type-var]
    header = stream.peek(1 << 14)
    _refuse_utf16(header, file)
    first = header.splitlines()[0] if header else b""
    delimiter = delimiter or max(",;\t", key=lambda sign: first.count(sign.encode()))
    csv.field_size_limit(1 << 27)  # the default, 128 KiB, is shorter than a long document
    # surrogates carry undecodable bytes through the parser, so that the row that holds them can be named
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    records = csv.reader(text, delimiter=delimiter, strict=True)
    names: list[str] | None = None
    while True:
        line = records.line_num + 1
        try:
            fields = next(records)
        except StopIteration:
            return
        except csv.Error as error:
            yield BadRow(file, line, "broken CSV", str(error))
            continue
        if names is None:
            names = [name.strip() for name in fields]
            _check_header(names, file)
        elif fields:
            yield _record(names, fields, file, line)


def _check_header(names: list[str], file: str) -> None:
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise DataError(f"{file}:1: the header names column '{min(twice)}' twice; rename one")


def _record(names: list[str], fields: list[str], file: str, line: int) -> Row | BadRow:
    if len(fields) != len(names):
        return BadRow(file, line, "wrong number of fields", f"{len(fields)}, and the header has {len(names)}")
    if not all(map(_decoded, fields)):
        return BadRow(file, line, "not UTF-8")
    return Row(file, line, dict(zip(names, fields, strict=True)))


def _decoded(text: str) -> bool:
    """False when undecodable bytes were carried through as surrogates."""
    return text.isascii() or not re.search("[\udc80-\udcff]", text)


def tab_separated(stream: IO[bytes], file: str) -> Rows:
    yield from separated(stream, file, "\t")


def parquet(stream: IO[bytes], file: str) -> Rows:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        for batch in ParquetFile(stream).iter_batches(PARQUET_BATCH):
            for value in batch.to_pylist():
                number += 1
                yield Row(file, number, value)
    except pyarrow.ArrowException as error:
        raise DataError(f"{file}: not a readable Parquet file after row {number}: {error}") from None


def text_blocks(stream: IO[bytes], file: str) -> Rows:
    """Plain text: a row is as many whole paragraphs (parted by blank lines) as make up about 2000 characters."""
    block: list[str] = []
    start, size = 1, 0
    for number, raw in enumerate(_lines(stream, file), 1):
        try:
            line = raw.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            yield BadRow(file, number, "not UTF-8", f"byte 0x{raw[error.start]:02x} at column {error.start + 1}")
            continue
        blank = not line.strip()
        if (blank and size >= BLOCK_CHARS) or size >= LONGEST_BLOCK:
            yield Row(file, start, {"text": "\n".join(block).strip("\n")})
            block, size = [], 0
        if block or not blank:
            start = start if block else number
            block.append(line)
            size += len(line)
    if size:
        yield Row(file, start, {"text": "\n".join(block).strip("\n")})


def conll(stream: IO[bytes], file: str) -> Rows:
    """A word and its tag a line, parted by a tab or by spaces, with other columns between them left out; a blank line
    ends a sentence, which is a row of `tokens` and `tags`. Comments and -DOCSTART- are no words."""
    words: list[str] = []
    tags: list[str] = []
    start, broken = 1, None
    for number, raw in enumerate(chain(_lines(stream, file), [b""]), 1):
        try:
            line = raw.decode("utf-8").strip(_BLANK)
        except UnicodeDecodeError as error:
            where = f"byte 0x{raw[error.start]:02x} at column {error.start + 1} of line {number}"
            line, broken = "?", broken or BadRow(file, start if words else number, "not UTF-8", where)
        if not line:
            if broken or words:
                yield broken or Row(file, start, {"tokens": words, "tags": tags})
            words, tags, broken = [], [], None
            continue
        if not words and (line.startswith("-DOCSTART-") or _is_comment(line)):
            continue
        start = start if words else number
        fields = [field.strip(_BLANK) for field in re.split("\t" if "\t" in line else " +", line)]
        if len(fields) < 2 or not fields[0]:
            what = f"line {number} is {line!r:.60}; write a word, a tab or space, and its tag"
            broken = broken or BadRow(file, start, "a word without a tag", what)
        words.append(fields[0])
        tags.append(fields[-1])


def _is_comment(line: str) -> bool:
    """Before a sentence: # without a tab. `# O` and `# B-x` are a word and its tag, and so is `#hashtag O`."""
    words = line.split()
    tagged = len(words) == 2 and re.fullmatch(r"O|[BI]-.+", words[1])
    return line.startswith("#") and "\t" not in line and not tagged


def _lines(stream: IO[bytes], file: str) -> Iterator[bytes]:
    first = True
    for line in stream:
        if first:
            _refuse_utf16(line, file)
            line, first = line.removeprefix(codecs.BOM_UTF8), False
        yield line


def _refuse_utf16(start: bytes, file: str) -> None:
    if start.startswith(UTF16):
        raise DataError(f"{file}: encoded as UTF-16; convert it: iconv -f UTF-16 -t UTF-8 {file}")


READERS: dict[str, Reader] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_file,
    ".csv": separated,
    ".tsv": tab_separated,
    ".parquet": parquet,
    ".txt": text_blocks,
    ".text": text_blocks,
    ".md": text_blocks,
    ".conll": conll,
    ".bio": conll,
    ".iob": conll,
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


def kind_of(name: str) -> str | None:
    """The extension that decides how a file is read, without that of its compression; None for an unknown one."""
    base = name.lower()
    for extension in COMPRESSED:
        base = base.removesuffix(extension)
    return next((extension for extension in READERS if base.endswith(extension)), None)


def known() -> Iterable[str]:
    return READERS
