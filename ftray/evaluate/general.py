"""The general text of the forgetting probe: how much worse a tuned model reads what it was not tuned on.

Forgetting is the rise of the loss on this text, in nats per token, as PEFT's method comparison defines it.
"""

from __future__ import annotations

from importlib.resources import files
from itertools import islice
from pathlib import Path

from ftray.errors import DataError

# Enough for a loss that is steady to about 0.01 nats, and seconds of work for a small model.
MAX_PARAGRAPHS = 500


def general_text(forgetting: bool | str) -> list[str]:
    """Paragraphs of general text: our own 150 for True, a text file's (between empty lines) for a path, none for False.

    At most MAX_PARAGRAPHS are read; a file without empty lines gives its lines. Raises DataError where the file is
    missing, is not UTF-8, or holds no text.
    """
    if forgetting is False:
        return []
    if forgetting is True:
        return _paragraphs(files("ftray.evaluate").joinpath("general.txt").read_text(encoding="utf-8"))
    path = Path(forgetting).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(_problem(path, error.strerror or "cannot be read")) from error
    except UnicodeDecodeError as error:
        raise DataError(_problem(path, f"byte {error.start} is not UTF-8")) from error
    paragraphs = _paragraphs(text)
    if not paragraphs:
        raise DataError(_problem(path, "it holds no text"))
    return paragraphs


def _paragraphs(text: str) -> list[str]:
    blocks = text.replace("\r\n", "\n").split("\n\n")
    if len(blocks) == 1:
        blocks = text.splitlines()
    return list(islice((" ".join(block.split()) for block in blocks if block.strip()), MAX_PARAGRAPHS))


def _problem(path: Path, what: str) -> str:
    return (
        f"evaluate.forgetting: {path}: {what}; name a plain text file with paragraphs between empty lines, "
        "or write true for the text that comes with ftray, or false"
    )
