"""Texts and messages to token ids and back, with the served base's tokenizer."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

from jinja2.exceptions import TemplateError

from ftray.errors import RequestError
from ftray.plain_template import plain_template

LONG_CHARS = 4096
_PER_TEXT_CHARS = 64
_MOST_COMPOSED = 4
"""So many characters may become one by NFC."""
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Token:
    """A token as it stands in the text. `text` has U+FFFD where a character is spread over several tokens."""

    text: str
    bytes: tuple[int, ...]
    special: bool


@dataclass(frozen=True)
class Encoded:
    """`spans`: where each token lies in the text, in characters; a token of the tokenizer's own has an empty one.
    `words`: which of the tokenizer's words it is of."""

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    words: tuple[int | None, ...]


class Prompts:
    """What is long is worked on in a thread, so that other requests' streams do not stop for it."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._template = tokenizer.chat_template or plain_template(tokenizer)
        self._special = frozenset(tokenizer.all_special_ids)
        self._spell = _speller(tokenizer)
        self._longest = _longest_token(tokenizer)
        self._threads = ThreadPoolExecutor(1, "tokenizer")
        self.token = lru_cache(maxsize=65536)(self._token)

    async def of_messages(self, messages: Sequence[Mapping[str, str]], *, most: int | None = None) -> tuple[int, ...]:
        """The chat template's rendering, up to where the assistant answers. RequestError where it refuses.

        `most` tokens can be used; what cannot possibly fit is refused before it is worked on, here and below.
        """
        texts = [message["content"] for message in messages]
        self._check_length(texts, most, param="messages")
        return await self._run(_length(texts), lambda: self._ids(self._rendered(messages), special=False))

    async def of_texts(
        self, texts: Sequence[str], *, most: int | None = None, param: str = "prompt"
    ) -> list[tuple[int, ...]]:
        """With the tokens that the tokenizer puts around a text, e.g. BOS. `most` is of each."""
        for text in texts:
            self._check_length([text], most, param=param)
        return await self._run(_length(texts), lambda: [self._ids(text, special=True) for text in texts])

    async def with_spans(self, texts: Sequence[str], *, most: int | None = None, param: str) -> list[Encoded]:
        """As of_texts, and where each token lies in its text, and in which word."""
        for text in texts:
            self._check_length([text], most, param=param)
        return await self._run(_length(texts), lambda: [self._encoded(text) for text in texts])

    async def texts_of(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        return await self._run(sum(map(len, prompts)), lambda: [self._text(ids) for ids in prompts])

    async def _run(self, length: int, work: Callable[[], _T]) -> _T:
        if length < LONG_CHARS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _check_length(self, texts: Sequence[str], most: int | None, *, param: str) -> None:
        length = sum(map(len, texts))
        if most is not None and self._longest is not None and length > most * self._longest:
            raise RequestError(
                f"{length} characters are more than {most} tokens of this model can hold; shorten the text",
                param=param,
                code="context_length_exceeded",
            )

    def _rendered(self, messages: Sequence[Mapping[str, str]]) -> str:
        try:
            rendered = self._tokenizer.apply_chat_template(
                list(messages), chat_template=self._template, tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise RequestError(
                f"the base's chat template refuses these messages: {str(error)[:300]}", param="messages"
            ) from error
        return str(rendered)

    def _ids(self, text: str, *, special: bool) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def _text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def _encoded(self, text: str) -> Encoded:
        if not self._tokenizer.is_fast:
            ids = self._ids(text, special=True)
            return Encoded(ids, ((0, 0),) * len(ids), (None,) * len(ids))
        encoding = self._tokenizer(text, return_offsets_mapping=True, verbose=False)
        return Encoded(tuple(encoding["input_ids"]), tuple(encoding["offset_mapping"]), tuple(encoding.word_ids()))

    def _token(self, id: int) -> Token:
        spelled = self._tokenizer.convert_ids_to_tokens(id)
        if spelled is None:
            return Token("", (), special=True)
        if id in self._special:
            return Token(spelled, tuple(spelled.encode()), special=True)
        content = self._spell(spelled)
        return Token(content.decode("utf-8", errors="replace"), tuple(content), special=False)


def _length(texts: Sequence[str]) -> int:
    """A text costs something even where it is empty."""
    return sum(len(text) + _PER_TEXT_CHARS for text in texts)


def _longest_token(tokenizer: Any) -> int | None:
    """In characters. None where nothing is known of how the tokenizer may shorten a text before it is cut up."""
    if not tokenizer.is_fast:
        return None
    normalizer = json.loads(tokenizer.backend_tokenizer.to_str()).get("normalizer") or {"type": "NFC"}
    longest = max(map(len, tokenizer.get_vocab()))
    return longest * _MOST_COMPOSED if normalizer["type"] == "NFC" else None


def _speller(tokenizer: Any) -> Callable[[str], bytes]:
    """How a vocabulary's entry reads as bytes: byte-level BPE has a letter for each byte, others write ▁ and <0x0A>."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = json.loads(backend.to_str()).get("decoder") if backend is not None else None
    if '"ByteLevel"' in json.dumps(decoder):
        letters = _letters_of_bytes()
        return lambda entry: b"".join(
            bytes([letters[letter]]) if letter in letters else letter.encode() for letter in entry
        )
    return _spelled_plainly


def _spelled_plainly(entry: str) -> bytes:
    if match := _BYTE_TOKEN.fullmatch(entry):
        return bytes([int(match[1], 16)])
    return entry.replace("▁", " ").encode()


def _letters_of_bytes() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the rest for letters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
