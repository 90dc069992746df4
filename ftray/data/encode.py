"""One chunk of examples to token ids: the part of preparation that runs on many CPUs at once.

An `Encoder` and its chunks pickle, so a chunk can be encoded anywhere; results are arrays, joined end to end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ftray.data.format import Example, Unusable
from ftray.data.render import Piece, Renderer
from ftray.errors import DataError


class Item(NamedTuple):
    """An example and where it came from. `source` counts the run's sources, then its held-out sources."""

    source: int
    file: str
    line: int
    example: Example


@dataclass
class Chunk:
    """Examples that are encoded together; `held_out`: they are for evaluation.

    `shots`: source -> conversations shown before each prompt of that source, with the line each was taken from.
    """

    held_out: bool
    items: list[Item]
    shots: dict[int, list[Item]] = field(default_factory=dict)


class Question(NamedTuple):
    """A held-out prompt, generation prompt included, and the answer that is expected of it."""

    prompt_ids: list[int]
    answer: str
    row: str
    task: str


@dataclass
class Encoded:
    """Encoded examples: ids and trained of all examples joined, cut by lengths; `items` says which item each is of."""

    chunk: Chunk
    ids: np.ndarray
    trained: np.ndarray
    lengths: np.ndarray
    items: list[int]
    dropped: list[tuple[int, Unusable]] = field(default_factory=list)
    truncated: Counter[int] = field(default_factory=Counter)
    questions: list[tuple[int, list[int], str]] = field(default_factory=list)
    questions_too_long: int = 0


class Tokens(NamedTuple):
    ids: np.ndarray
    trained: np.ndarray


@dataclass
class Encoder:
    """Renders and tokenises chunks. `objective` is sft or pretrain; `too_long` is truncate, drop, split or auto."""

    tokenizer: Any
    objective: str = "sft"
    train_on: str = "assistant"
    max_length: int = 1024
    too_long: str = "auto"
    few_shot: int = 0

    def __post_init__(self) -> None:
        self.renderer = Renderer(self.tokenizer, self.train_on)
        self._encode = PieceEncoder(self.tokenizer)
        self.bos = self.tokenizer.bos_token if _adds_bos(self.tokenizer) else None
        self.eos = self.tokenizer.eos_token

    def __call__(self, chunk: Chunk) -> Encoded:
        owners: list[int] = []
        rendered: list[list[Piece]] = []
        asked: list[tuple[int, str, str]] = []
        dropped: list[tuple[int, Unusable]] = []
        for number, item in enumerate(chunk.items):
            try:
                example = self._with_shots(item, chunk)
                examples = self._pieces(example)
                if chunk.held_out and self.objective == "sft" and (question := self._question(example)):
                    asked.append((number, *question))
            except Unusable as unusable:
                dropped.append((number, unusable))
                continue
            owners += [number] * len(examples)
            rendered += examples
        encoded = Encoded(chunk, *_EMPTY, np.zeros(0, np.int64), [], dropped)
        self._add_examples(encoded, owners, rendered)
        for (number, _, answer), ids in zip(asked, self._encode([prompt for _, prompt, _ in asked]), strict=True):
            if len(ids) < self.max_length:
                encoded.questions.append((number, ids, answer))
            else:
                encoded.questions_too_long += 1
        return encoded

    def _pieces(self, example: Example) -> list[list[Piece]]:
        if not example.messages:
            text = example.text
            opened = self.bos and not text.startswith(self.bos)
            closed = self.eos is None or text.endswith(self.eos)
            return [[Piece((self.bos if opened else "") + text, True, eos=not closed)]]
        if self.objective == "pretrain":
            return [[self.renderer.closed(self.renderer.whole(example))]]
        return self.renderer.pieces(example)

    def _question(self, example: Example) -> tuple[str, str] | None:
        last = example.last_answer
        answer = example.messages[last].get("content") if last > 0 else None
        return (self.renderer.prompt(example), answer) if answer and example.messages[last].get("weight", 1) else None

    def _with_shots(self, item: Item, chunk: Chunk) -> Example:
        example = item.example
        if not self.few_shot or not example.messages:
            return example
        shots = [s for s in chunk.shots.get(item.source, ()) if (s.file, s.line) != (item.file, item.line)]
        head = 1 if example.messages[0]["role"] == "system" else 0
        shown = [
            {**m, "weight": 0} for s in shots[: self.few_shot] for m in s.example.messages if m["role"] != "system"
        ]
        return Example(example.messages[:head] + shown + example.messages[head:], tools=example.tools)

    def _add_examples(self, encoded: Encoded, owners: list[int], rendered: list[list[Piece]]) -> None:
        eos_id = self.tokenizer.eos_token_id
        flat = iter(
            self._encode(
                [p.text for pieces in rendered for p in pieces],
                [n == 0 for pieces in rendered for n in range(len(pieces))],
            )
        )
        parts: list[Tokens] = []
        for number, pieces in zip(owners, rendered, strict=True):
            ids: list[int] = []
            trained: list[bool] = []
            for piece in pieces:
                more = next(flat)
                if piece.eos and eos_id is not None:
                    more = [*more, eos_id]
                ids += more
                trained += [piece.trained] * len(more)
            fitting = self._fit(Tokens(np.array(ids, np.uint32), np.array(trained, np.bool_)), encoded, number)
            parts += fitting
            encoded.items += [number] * len(fitting)
        if parts:
            encoded.ids = np.concatenate([part.ids for part in parts])
            encoded.trained = np.concatenate([part.trained for part in parts])
            encoded.lengths = np.array([len(part.ids) for part in parts], np.int64)

    def _fit(self, tokens: Tokens, encoded: Encoded, number: int) -> list[Tokens]:
        """The example in at most max_length tokens: as it is, cut, in windows, or not at all."""
        item = encoded.chunk.items[number]
        limit, length = self.max_length, len(tokens.ids)
        mode = self.too_long
        if mode == "auto":
            mode = "truncate" if item.example.messages and self.objective == "sft" else "split"
        parts = [tokens]
        if length > limit:
            if mode == "drop":
                encoded.dropped.append(
                    (number, Unusable("too long", f"{length} tokens, max_length {limit}", bad=False))
                )
                return []
            starts = range(0, length, limit) if mode == "split" else range(1)
            parts = [Tokens(tokens.ids[at : at + limit], tokens.trained[at : at + limit]) for at in starts]
            encoded.truncated[item.source] += mode == "truncate"
        # the first token of a row is never predicted, so a trained flag there counts for nothing
        kept = [part for part in parts if part.trained[1:].any()]
        if not kept:
            reason = f"the prompt alone has max_length {limit} tokens or more" if length > limit else "no answer tokens"
            encoded.dropped.append((number, Unusable("no trained tokens", reason, bad=False)))
        return kept


_EMPTY = (np.zeros(0, np.uint32), np.zeros(0, np.bool_))


class PieceEncoder:
    """Tokenises pieces of text without adding special tokens; a later piece of a row is encoded as a continuation."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise DataError(f"{type(tokenizer).__name__} is not a fast tokenizer; the model needs a tokenizer.json")
        self.backend = backend
        # SentencePiece-like tokenizers put a space before whatever they are given; after a line break they do not
        self.lead = [] if self._raw(["a"])[0] == self._raw(["ba"])[0][1:] or self._joins() else self._raw(["\n"])[0]

    def __call__(self, texts: Sequence[str], first: Sequence[bool] | None = None) -> list[list[int]]:
        if first is None or not self.lead:
            return self._raw(texts)
        led = self._raw([text if start else "\n" + text for text, start in zip(texts, first, strict=True)])
        return [
            ids if start else self._continued(text, ids) for text, start, ids in zip(texts, first, led, strict=True)
        ]

    def _continued(self, text: str, ids: list[int]) -> list[int]:
        size = len(self.lead)
        return ids[size:] if ids[:size] == self.lead else self._raw([text])[0]

    def _joins(self) -> bool:
        pieces = ["ab", "cd", " ef"]
        ids = [i for part in self._raw(pieces) for i in part]
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False) == "".join(pieces)

    def _raw(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def _adds_bos(tokenizer: Any) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def chunks_of(items: Iterable[Item], size: int) -> Iterable[list[Item]]:
    chunk: list[Item] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
