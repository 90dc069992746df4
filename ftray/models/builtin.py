"""The models that come with ftray: id -> packaged folder, whole and unchanged."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path

from ftray.errors import ModelError

FOLDERS = {"builtin:tiny": Path(__file__).parent / "tiny"}
DIGESTS = "digests.json"
"""File name -> sha256 of the files that decide what the model computes; written by `write_digests`."""
DIGESTED = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@cache
def builtin_folder(base: str) -> Path:
    """The folder of a built-in model. ModelError for an unknown id, a missing file, or one that was changed.

    Reads every file once per process (11 MB, about 10 ms).
    """
    if base not in FOLDERS:
        raise ModelError(f"model.base: {base!r} is not built in; there is {', '.join(FOLDERS)}")
    folder = FOLDERS[base]
    digests = folder / DIGESTS
    expected = json.loads(digests.read_text(encoding="utf-8")) if digests.is_file() else dict.fromkeys(DIGESTED)
    for name, digest in expected.items():
        path = folder / name
        if not path.is_file():
            raise ModelError(f"{path}: missing from the installation; install ftray again")
        if digest and digest != _sha256(path):
            raise ModelError(f"{path}: differs from what ftray ships; install ftray again")
    return folder


def write_digests(folder: Path) -> None:
    """Records what the packaged files are; the last step of packing a model."""
    digests = {name: _sha256(folder / name) for name in DIGESTED}
    (folder / DIGESTS).write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
