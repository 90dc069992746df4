"""What is dropped before training: empty rows, rows of the wrong size, exact and near duplicates.

Rows are looked at once, in order; the first of several alike is kept. Exact duplicates cost about 100 bytes of memory a
row, near duplicates about 2 KiB.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ftray.config.schema import Clean
from ftray.data.format import Example, Unusable

PERMUTATIONS = 128
SHINGLE = 5  # characters
BLOCK = 4096  # shingles hashed at once, to bound memory on long texts


class Said(NamedTuple):
    """All that an example says, and what comes before its last answer (all of it where nothing does), normalised.

    Equal for rows that differ in white space or Unicode form only; the prompt also where they differ in case.
    """

    content: str
    prompt: str


def said(example: Example) -> Said:
    """Raises Unusable on what is no Unicode text: JSON can escape half of a surrogate pair."""
    says = _said(example)
    try:
        says.content.encode()
    except UnicodeEncodeError:
        raise Unusable("not Unicode text", "half of a surrogate pair") from None
    return says


def _said(example: Example) -> Said:
    if not example.messages:
        content = _normalised(example.text)
        if example.label is None:
            return Said(content, content.casefold())
        asked = content if example.pair is None else f"{content}\x1e{_normalised(example.pair)}"
        return Said(f"{asked}\x1f{json.dumps(example.label, ensure_ascii=False, default=str)}", asked.casefold())
    parts = [_message(message) for message in example.messages]
    tools = [json.dumps(example.tools, ensure_ascii=False)] if example.tools else []
    before = parts[: example.shared if example.rejected else max(example.last_answer, 0)] or parts
    if example.rejected:
        parts += ["\x1d", *(_message(message) for message in example.rejected[example.shared :])]
    if example.good is not None:
        parts.append("good" if example.good else "bad")
    return Said("\x1e".join(tools + parts), "\x1e".join(tools + before).casefold())


def key(text: str, seed: int = 0) -> int:
    """64 bits of the text."""
    salt = seed.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, salt=salt).digest(), "little")


def _normalised(text: str) -> str:
    return " ".join((text if text.isascii() else unicodedata.normalize("NFC", text)).split())


def _message(message: Mapping[str, Any]) -> str:
    more = {name: value for name, value in message.items() if name not in ("role", "content", "weight")}
    written = json.dumps(more, ensure_ascii=False, sort_keys=True) if more else ""
    return f"{message['role']}\x1f{_normalised(message['content'] or '')}{written}"


class Cleaner:
    """Checks examples one by one, remembering those seen. `check` raises Unusable."""

    def __init__(self, clean: Clean):
        self.clean = clean
        self._seen: set[int] = set()
        self._near = NearDuplicates(clean.near_threshold) if clean.duplicates == "near" else None

    def check(self, example: Example, said: Said, *, row: str) -> None:
        """`row` names the example, for the rows that turn out to repeat it."""
        self._check_size(example)
        if self.clean.duplicates == "keep":
            return
        seen = key(said.content)
        if seen in self._seen:
            raise Unusable("duplicate", bad=False)
        self._seen.add(seen)
        if self._near and (like := self._near.find_or_add(said.content, row)):
            raise Unusable("near duplicate", f"like {like}", bad=False)

    def _check_size(self, example: Example) -> None:
        if example.rejected:
            self._check_size(Example(example.rejected))
        for number, message in enumerate(example.messages, 1):
            if not (message["content"] or "").strip() and not message.get("tool_calls") and message["role"] != "system":
                kind = "empty answer" if message["role"] == "assistant" else "empty prompt or message"
                raise Unusable(kind, f"message {number} of {len(example.messages)}")
        if not example.messages and not example.text.strip():
            raise Unusable("empty text")
        if example.pair is not None and not example.pair.strip():
            raise Unusable("empty text", "the second one")
        answer = example.messages[example.last_answer] if example.messages else {"content": example.text}
        length = len((answer["content"] or "").strip())
        if length < self.clean.min_chars and not answer.get("tool_calls"):
            raise Unusable("shorter than min_chars", f"{length} characters", bad=False)
        total = sum(len(message["content"] or "") for message in example.messages) + len(example.text)
        if self.clean.max_chars and total > self.clean.max_chars:
            raise Unusable("longer than max_chars", f"{total} characters", bad=False)


class NearDuplicates:
    """MinHash and locality-sensitive hashing (Broder 1997; Leskovec, Rajaraman, Ullman, Mining of Massive Datasets).

    Similarity is the Jaccard index of the sets of 5-character shingles, estimated from 128 minima (standard error at
    most 0.044). Texts whose signatures agree in one band of `rows` minima are compared; `rows` is chosen so that a
    pair at the threshold is compared with a probability of at least 0.95.
    """

    def __init__(self, threshold: float):
        self.threshold = threshold
        rng = np.random.default_rng(0)
        self._factors = rng.integers(1 << 63, size=PERMUTATIONS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self._offsets = rng.integers(1 << 63, size=PERMUTATIONS, dtype=np.uint64)
        fitting = (n for n in (16, 8, 4, 2) if 1 - (1 - threshold**n) ** (PERMUTATIONS // n) >= 0.95)
        self._rows = next(fitting, 1)
        self._bands: dict[int, int] = {}
        self._signatures: list[np.ndarray] = []
        self._names: list[str] = []

    def find_or_add(self, text: str, name: str) -> str | None:
        """The name and similarity of an earlier text like this one; None, and the text is remembered."""
        signature = self.signature(text)
        keys = [hash((n, signature[n : n + self._rows].tobytes())) for n in range(0, PERMUTATIONS, self._rows)]
        for other in {self._bands[band] for band in keys if band in self._bands}:
            similarity = float((self._signatures[other] == signature).mean())
            if similarity >= self.threshold:
                return f"{self._names[other]} ({similarity:.2f})"
        for band in keys:
            self._bands.setdefault(band, len(self._names))
        self._signatures.append(signature)
        self._names.append(name)
        return None

    def signature(self, text: str) -> np.ndarray:
        """uint32 [128]."""
        points = np.frombuffer(text.casefold().encode("utf-32-le"), np.uint32).astype(np.uint64)
        if len(points) < SHINGLE:
            points = np.pad(points, (0, SHINGLE - len(points)))
        count = len(points) - SHINGLE + 1
        hashes = np.zeros(count, np.uint64)
        for n in range(SHINGLE):
            hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + points[n : n + count]
        hashes = np.unique(hashes)
        minima = np.full(PERMUTATIONS, np.iinfo(np.uint32).max, np.uint32)
        for start in range(0, len(hashes), BLOCK):
            mixed = (hashes[start : start + BLOCK, None] * self._factors + self._offsets) >> np.uint64(32)
            minima = np.minimum(minima, mixed.min(axis=0).astype(np.uint32))
        return minima
