"""Answers that are compared, as token ids: pairs of a chosen and a rejected one, and single ones judged good or bad.

Each answer is rendered with its prompt as sft renders it, so what is trained is what the model would write. A pair is
one example of the token store,

    ids      prompt chosen  prompt rejected
    trained         xxxxxx         xxxxxxxx
    column   cut, the number of tokens of the first half

and a judged answer is one whose column `good` is 1 or 0. A reward model learns from both: `cut` is 0 where an answer
stands alone, `good` is -1 in pairs, and column `margin` is how far apart a pair's rewards shall be.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ftray.data.encode import Chunk, Encoded, Encoder, Item, Prompted
from ftray.data.format import Example, Unusable
from ftray.data.render import Piece
from ftray.data.report import marked_text
from ftray.data.tokens import TokenStore
from ftray.errors import DataError


class Side(NamedTuple):
    """One answer after its prompt."""

    ids: np.ndarray
    trained: np.ndarray


class AnswerEncoder(Encoder):
    """Examples of one or more answers each, every answer in at most `max_length` tokens."""

    def __call__(self, chunk: Chunk) -> Encoded:
        encoded = Encoded(chunk.held_out)
        usable: list[tuple[Item, list[list[Piece]]]] = []
        asked: list[Prompted] = []
        for item in chunk.items:
            try:
                usable.append((item, [self._rendered(each) for each in answers_of(item.example)]))
                if chunk.held_out and item.example.good is not False and (found := self._question(item.example)):
                    asked.append(Prompted(item, *found))
            except Unusable as unusable:
                encoded.dropped.append((item.place, unusable))
        sides = self._sides([side for _, rendered in usable for side in rendered])
        parts: list[Side] = []
        kept: list[tuple[Item, list[Side]]] = []
        for item, rendered in usable:
            whole = [next(sides) for _ in rendered]
            try:
                kept.append((item, self._fitting(encoded, item, whole)))
            except Unusable as unusable:
                encoded.dropped.append((item.place, unusable))
        for item, fitting in kept:
            encoded.places.append(item.place)
            parts += fitting
        if kept:
            encoded.ids = np.concatenate([side.ids for side in parts])
            encoded.trained = np.concatenate([side.trained for side in parts])
            encoded.lengths = np.array([sum(len(side.ids) for side in fitting) for _, fitting in kept], np.int64)
            encoded.columns = self._columns(kept)
        self._add_questions(encoded, asked)
        return encoded

    def _columns(self, kept: Sequence[tuple[Item, list[Side]]]) -> dict[str, np.ndarray]:
        raise NotImplementedError

    def _rendered(self, example: Example) -> list[Piece]:
        rendered = self.renderer.pieces(example)
        if len(rendered) > 1:
            raise Unusable(
                "its answers cannot stand in one text", "the chat template rewrites earlier turns", bad=False
            )
        return rendered[0]

    def _sides(self, rendered: Sequence[list[Piece]]) -> Iterator[Side]:
        ids = iter(self.tokenise(rendered))
        eos = self.tokenizer.eos_token_id
        for pieces in rendered:
            parts = [next(ids) + ([eos] if piece.eos and eos is not None else []) for piece in pieces]
            trained = np.repeat([piece.trained for piece in pieces], [len(part) for part in parts])
            trained[:1] = False  # nothing comes before a text's first token to predict it from
            yield Side(np.array([token for part in parts for token in part], np.uint32), trained.astype(np.bool_))

    def _fitting(self, encoded: Encoded, item: Item, whole: Sequence[Side]) -> list[Side]:
        """The sides in at most max_length tokens each. Raises Unusable where nothing is left to compare."""
        limit = self.max_length
        longest = max(len(side.ids) for side in whole)
        if longest > limit and self.too_long == "drop":
            raise self._lost(longest)
        fitting = [Side(side.ids[:limit], side.trained[:limit]) for side in whole]
        for side, before in zip(fitting, whole, strict=True):
            if not side.trained.any():
                raise self._lost(len(before.ids))
        if len(fitting) == 2 and np.array_equal(fitting[0].ids, fitting[1].ids):
            if longest > limit:
                raise Unusable("chosen and rejected are the same", f"in the first {limit} tokens", bad=False)
            raise Unusable("chosen and rejected are the same", "once rendered")
        encoded.truncated[item.source] += longest > limit
        return fitting


class PairEncoder(AnswerEncoder):
    def _columns(self, kept):
        return {"cut": np.array([len(chosen.ids) for _, (chosen, _) in kept], np.int32)}

    def preview(self, store: TokenStore, row: int) -> str:
        return _pair_text(self.tokenizer, store, row)


class JudgedEncoder(AnswerEncoder):
    def _columns(self, kept):
        return {"good": np.array([bool(item.example.good) for item, _ in kept], np.int8)}

    def notes(self, train: TokenStore, held_out: TokenStore) -> Iterator[str]:
        good = int(train.column("good").sum())
        bad = len(train) - good
        if not good or not bad:
            kind = "good" if good else "bad"
            raise DataError(
                f"all {len(train):,} answers to learn from are {kind}, and kto learns from both; add the others, name "
                "the right column with columns: {label: …}, or use sft for good ones alone"
            )
        more, fewer, weight = (good, bad, "undesirable") if good > bad else (bad, good, "desirable")
        if more > 4 / 3 * fewer:
            counts = f"{good:,} good and {bad:,} bad answers"
            yield f"note: {counts}; they weigh alike with objective.{weight}_weight: {more / fewer:.2g}"

    def preview(self, store: TokenStore, row: int) -> str:
        return f"{'good' if store.column('good')[row] else 'bad'}: {super().preview(store, row)}"


class RewardEncoder(AnswerEncoder):
    def _columns(self, kept):
        pairs = [len(sides) == 2 for _, sides in kept]
        return {
            "cut": np.array(
                [len(sides[0].ids) if pair else 0 for (_, sides), pair in zip(kept, pairs, strict=True)], np.int32
            ),
            "good": np.array(
                [-1 if pair else bool(item.example.good) for (item, _), pair in zip(kept, pairs, strict=True)], np.int8
            ),
            "margin": np.array([item.example.margin for item, _ in kept], np.float32),
        }

    def notes(self, train: TokenStore, held_out: TokenStore) -> Iterable[str]:
        good = np.asarray(train.column("good"))
        if len(set(good.tolist()) - {-1}) == 1 and not (good < 0).any():
            kind = "good" if good[0] else "bad"
            raise DataError(
                f"all {len(train):,} answers to learn from are {kind}, and a reward model tells both apart; add the "
                "others, name the right column with columns: {label: …}, or learn from pairs"
            )
        return ()

    def preview(self, store: TokenStore, row: int) -> str:
        if store.column("cut")[row]:
            return _pair_text(self.tokenizer, store, row)
        return f"{'good' if store.column('good')[row] else 'bad'}: {super().preview(store, row)}"


def answers_of(example: Example) -> list[Example]:
    """The conversations that an example compares, each with only its own answer trained."""
    if not example.rejected:
        return [example]  # the answers in its prompt are untrained already
    both = (example.messages, example.rejected)
    return [Example(_untrained(messages, example.shared), tools=example.tools) for messages in both]


def _untrained(messages: list[dict], count: int) -> list[dict]:
    """The same with the assistant's first answers, among `count` messages, as context only."""
    return [
        {**message, "weight": 0} if n < count and message["role"] == "assistant" else message
        for n, message in enumerate(messages)
    ]


def halves(store: TokenStore, row: int) -> list[Side]:
    """The chosen and the rejected answer of a pair, each after its prompt."""
    ids, trained, cut = store.ids(row), store.trained(row), int(store.column("cut")[row])
    return [Side(ids[:cut], trained[:cut]), Side(ids[cut:], trained[cut:])]


def _pair_text(tokenizer: Any, store: TokenStore, row: int) -> str:
    chosen, rejected = (marked_text(tokenizer, *side) for side in halves(store, row))
    return f"chosen: {chosen}\nrejected: {rejected}"
