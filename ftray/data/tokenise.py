"""Rendered pieces to token ids, such that what precedes an answer has the ids that the model is asked with.

A row is tokenised as one text, as the whole of a prompt is when the model is asked. Where a trained piece then begins
inside a token, or white space before it was grouped with a view to what follows (many pre-tokenizers look ahead), the
prompt alone would have other ids; such a row is tokenised piece by piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Any

from ftray.data.render import Piece
from ftray.errors import DataError

TAIL = 24  # characters before a piece that may decide how white space at their end is grouped


class PieceTokeniser:
    """Adds no special tokens. Needs a fast tokenizer (DataError)."""

    def __init__(self, tokenizer: Any):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise DataError(f"{type(tokenizer).__name__} is not a fast tokenizer; the model needs a tokenizer.json")
        self.backend = backend
        # SentencePiece-like tokenizers put a space before whatever they are given; after a line break they do not
        self._lead = [] if self._joins(tokenizer) else self.texts(["\n"])[0]
        self._stays: dict[tuple[str, str], bool] = {}

    def __call__(self, rows: Sequence[Sequence[Piece]]) -> list[list[int]]:
        """Ids of every piece of every row, in one list."""
        wholes = self._encoded(["".join(piece.text for piece in row) for row in rows])
        result = [self._cut(row, whole) for row, whole in zip(rows, wholes, strict=True)]
        others = [n for n, ids in enumerate(result) if ids is None]
        for n, ids in zip(others, self._apart([rows[n] for n in others]), strict=True):
            result[n] = ids
        return list(chain.from_iterable(ids for ids in result if ids is not None))

    def texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of whole texts."""
        return [encoding.ids for encoding in self._encoded(texts, fast=True)]

    def _cut(self, row: Sequence[Piece], whole: Any) -> list[list[int]] | None:
        """The ids of a row cut into those of its pieces; None where a trained piece would not begin as when asked."""
        ids, at, cuts = whole.ids, 0, [0]
        for left, right in pairwise(row):
            at += len(left.text)
            token = whole.char_to_token(at) if right.text else len(ids)
            if token is None:
                return None
            if right.text and whole.token_to_chars(token)[0] < at:
                if right.trained:
                    return None
                token += 1  # a special token that takes the white space after it in
            elif right.trained and not self._stays_grouped(left.text[-TAIL:], right.text[:1]):
                return None
            cuts.append(token)
        return [ids[start:end] for start, end in pairwise([*cuts, len(ids)])]

    def _stays_grouped(self, tail: str, following: str) -> bool:
        if not tail[-1:].isspace():
            return True
        key = (tail, following)
        if key not in self._stays:
            alone, together = self.texts([tail, tail + following])
            self._stays[key] = together[: len(alone)] == alone
        return self._stays[key]

    def _apart(self, rows: Sequence[Sequence[Piece]]) -> list[list[list[int]]]:
        """Ids of the pieces, each tokenised by itself, those after the first as continuations."""
        flat = [("\n" if n and self._lead else "") + piece.text for row in rows for n, piece in enumerate(row)]
        ids = iter(self.texts(flat))
        return [[self._led(next(ids), piece.text, n) for n, piece in enumerate(row)] for row in rows]

    def _led(self, ids: list[int], text: str, n: int) -> list[int]:
        size = len(self._lead)
        if not n or not size:
            return ids
        return ids[size:] if ids[:size] == self._lead else self.texts([text])[0]

    def _joins(self, tokenizer: Any) -> bool:
        pieces = ["ab", "cd", " ef"]
        ids = list(chain.from_iterable(self.texts(pieces)))
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False) == "".join(pieces)

    def _encoded(self, texts: Sequence[str], *, fast: bool = False) -> list[Any]:
        # many a tokenizer.json comes with truncation or padding switched on
        self.backend.no_truncation()
        self.backend.no_padding()
        encode = self.backend.encode_batch_fast if fast else self.backend.encode_batch
        return encode(list(texts), add_special_tokens=False)
