"""What is dropped before training: empty rows, rows of the wrong size, exact and near duplicates."""

from __future__ import annotations

import hashlib
import unicodedata

from ftray.config.schema import Clean
from ftray.data.format import Example, Unusable


def content(example: Example) -> str:
    """All that an example says, normalised: equal for rows that differ in white space or Unicode form only."""
    if not example.messages:
        return normalised(example.text)
    return "\x1e".join(_said(message) for message in example.messages)


def prompt(example: Example) -> str:
    """What comes before the last answer, normalised and case-folded; all of it where nothing comes before."""
    last = example.last_answer
    if last <= 0:
        return content(example).casefold()
    return "\x1e".join(_said(message) for message in example.messages[:last]).casefold()


def normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _said(message: dict) -> str:
    calls = message.get("tool_calls")
    return f"{message['role']}\x1f{normalised(message.get('content') or '')}{calls or ''}"


def key(text: str, seed: int = 0) -> int:
    """64 bits of the text."""
    salt = seed.to_bytes(8, "little")
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, salt=salt).digest(), "big"
    )


class Cleaner:
    """Checks examples one by one, remembering those seen. `check` raises Unusable."""

    def __init__(self, clean: Clean):
        self.clean = clean
        self._seen: set[int] = set()

    def check(self, example: Example) -> None:
        said = example.text if not example.messages else example.messages[example.last_answer].get("content") or ""
        if not said.strip() and not (example.messages and example.messages[example.last_answer].get("tool_calls")):
            raise Unusable("empty answer" if example.messages else "empty text")
        if len(said.strip()) < self.clean.min_chars:
            raise Unusable("shorter than min_chars", f"{len(said.strip())} characters", bad=False)
        if self.clean.duplicates == "keep":
            return
        seen = key(content(example))
        if seen in self._seen:
            raise Unusable("duplicate", bad=False)
        self._seen.add(seen)
