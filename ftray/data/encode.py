"""One chunk of examples to token ids: the part of preparation that runs on many CPUs at once.

An `Encoder` and its chunks pickle, so a chunk can be encoded anywhere; what comes back is arrays and places, not text.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from itertools import chain, pairwise
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from ftray.data.format import Example, Unusable
from ftray.data.render import Piece, Renderer
from ftray.data.report import LabelCount, marked_text
from ftray.data.tokenise import PieceTokeniser
from ftray.data.tokens import TokenStore
from ftray.plain_template import adds_bos


class Place(NamedTuple):
    """Where an example came from. `source` counts the run's sources, then its held-out sources."""

    source: int
    file: str
    line: int


class Item(NamedTuple):
    source: int
    file: str
    line: int
    example: Example

    @property
    def place(self) -> Place:
        return Place(*self[:3])


@dataclass
class Chunk:
    """Examples that are encoded together; `held_out`: they are for evaluation.

    `shots`: source -> training examples shown before each prompt of that source, one more than are shown, so that an
    example is never shown itself.
    """

    held_out: bool
    items: list[Item]
    shots: dict[int, list[Item]] = field(default_factory=dict)


class Question(NamedTuple):
    """A held-out prompt, generation prompt included, the answer expected of it, and the row it came from.

    `shots`: a baseline's, with so many training examples before it; None: the run's own.
    """

    prompt_ids: list[int]
    answer: str
    row: str
    task: str
    shots: int | None = None


@dataclass
class Asked:
    """A held-out prompt, generation prompt included, and the answer expected of it."""

    place: Place
    ids: list[int]
    answer: str
    shots: int | None = None


@dataclass
class Encoded:
    """Encoded examples: ids (uint32) and trained (bool) of all of them joined, cut by lengths; one place each."""

    held_out: bool
    ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint32))
    trained: np.ndarray = field(default_factory=lambda: np.zeros(0, np.bool_))
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    places: list[Place] = field(default_factory=list)
    columns: dict[str, np.ndarray] = field(default_factory=dict)  # more about each example, [examples, ...]
    streams: dict[str, np.ndarray] = field(default_factory=dict)  # more about each trained token
    dropped: list[tuple[Place, Unusable]] = field(default_factory=list)
    truncated: Counter[int] = field(default_factory=Counter)  # by source
    asked: list[Asked] = field(default_factory=list)
    asked_too_long: int = 0


@dataclass
class Encoder:
    """Renders and tokenises chunks. `objective` is sft or pretrain; `too_long` is truncate, drop, split or auto.

    `baselines`: each question is asked with so many training examples before it too, whatever its length.
    """

    tokenizer: Any
    objective: str = "sft"
    train_on: str = "assistant"
    max_length: int = 1024
    too_long: str = "auto"
    few_shot: int = 0
    baselines: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.renderer = Renderer(self.tokenizer, self.train_on)
        self.tokenise = PieceTokeniser(self.tokenizer)
        self.bos = str(self.tokenizer.bos_token) if adds_bos(self.tokenizer) else ""
        self.eos = self.tokenizer.eos_token

    def __reduce__(self):
        options = tuple(getattr(self, option.name) for option in fields(self) if option.name != "tokenizer")
        return (_restored, (type(self), pickle.dumps(self.tokenizer), options))

    def __call__(self, chunk: Chunk) -> Encoded:
        encoded = Encoded(chunk.held_out)
        owners: list[Item] = []
        rendered: list[list[Piece]] = []
        prompts: list[Prompted] = []
        for item in chunk.items:
            try:
                example = self._with_shots(item, chunk, self.few_shot)
                examples = self._pieces(example)
                if chunk.held_out and self.objective == "sft" and (question := self._question(example)):
                    prompts.append(Prompted(item, *question, self._baselines(item, chunk)))
            except Unusable as unusable:
                encoded.dropped.append((item.place, unusable))
                continue
            owners += [item] * len(examples)
            rendered += examples
        self._add_examples(encoded, owners, rendered)
        self._add_questions(encoded, prompts)
        return encoded

    def preview(self, store: TokenStore, row: int) -> str:
        """An example as people read it, with the trained tokens marked."""
        return marked_text(self.tokenizer, store.ids(row), store.trained(row))

    def balance(self, train: TokenStore, held_out: TokenStore) -> tuple[LabelCount, ...]:
        """How many rows each label has; none where rows have no labels."""
        return ()

    def notes(self, train: TokenStore, held_out: TokenStore) -> Iterable[str]:
        """What a user may want to know of the examples. Raises DataError where an objective cannot learn from them."""
        return ()

    def _pieces(self, example: Example) -> list[list[Piece]]:
        if not example.messages:
            text = example.text
            opened = text.startswith(self.bos)
            closed = self.eos is None or text.endswith(self.eos)
            return [[Piece(text if opened else self.bos + text, True, eos=not closed)]]
        if self.objective == "pretrain":
            return [[self.renderer.whole(example)]]
        return self.renderer.pieces(example)

    def _question(self, example: Example) -> tuple[str, str] | None:
        last = example.last_answer
        answer = example.messages[last].get("content") if last > 0 else None
        return (self.renderer.prompt(example), answer) if answer and example.messages[last].get("weight", 1) else None

    def _baselines(self, item: Item, chunk: Chunk) -> dict[int, str]:
        shown = {count: self._with_shots(item, chunk, count) for count in self.baselines if count != self.few_shot}
        return {count: self.renderer.prompt(example) for count, example in shown.items()}

    def _with_shots(self, item: Item, chunk: Chunk, count: int) -> Example:
        example = item.example
        if not count or not example.messages:
            return example
        shots = [shot for shot in chunk.shots.get(item.source, ()) if shot.place != item.place][:count]
        shown = [{**m, "weight": 0} for shot in shots for m in shot.example.messages if m["role"] != "system"]
        head = 1 if example.messages[0]["role"] == "system" else 0
        return Example(example.messages[:head] + shown + example.messages[head:], tools=example.tools)

    def _add_examples(self, encoded: Encoded, owners: Sequence[Item], rendered: Sequence[list[Piece]]) -> None:
        if not rendered:
            return
        flat = list(chain.from_iterable(rendered))
        ids = self.tokenise(rendered)
        if self.tokenizer.eos_token_id is not None:
            for piece, piece_ids in zip(flat, ids, strict=True):
                if piece.eos:
                    piece_ids.append(self.tokenizer.eos_token_id)
        sizes = np.fromiter(map(len, ids), np.int64, len(ids))
        joined = np.fromiter(chain.from_iterable(ids), np.uint32, int(sizes.sum()))
        trained = np.repeat(np.fromiter((piece.trained for piece in flat), np.bool_, len(flat)), sizes)
        starts = np.cumsum([0, *map(len, rendered)])
        ends = np.concatenate([[0], np.cumsum(sizes)])[starts].tolist()
        before = np.concatenate([[0], np.cumsum(trained)])
        windows: list[tuple[int, int]] = []
        lost: dict[Place, Unusable] = {}
        for item, (start, end) in zip(owners, pairwise(ends), strict=True):
            kept = [(a, b) for a, b in self._fit(encoded, item, start, end) if before[b] > before[min(a + 1, b)]]
            windows += kept
            encoded.places += [item.place] * len(kept)
            if not kept:
                lost[item.place] = self._lost(end - start)
        found = set(encoded.places)
        encoded.dropped += [(place, why) for place, why in lost.items() if place not in found]
        if windows:
            encoded.ids = np.concatenate([joined[a:b] for a, b in windows])
            # nothing comes before a row's first token to predict it from: it is never counted as trained
            encoded.trained = np.concatenate([np.append(False, trained[a + 1 : b]) for a, b in windows])
            encoded.lengths = np.array([b - a for a, b in windows], np.int64)

    def _fit(self, encoded: Encoded, item: Item, start: int, end: int) -> list[tuple[int, int]]:
        """The example in at most max_length tokens: as it is, cut, in windows, or not at all."""
        limit = self.max_length
        if end - start <= limit:
            return [(start, end)]
        mode = self.too_long
        if mode == "auto":
            mode = "truncate" if item.example.messages and self.objective == "sft" else "split"
        if mode == "split":
            return [(at, min(at + limit, end)) for at in range(start, end, limit)]
        if mode == "drop":
            return []
        encoded.truncated[item.source] += 1
        return [(start, start + limit)]

    def _lost(self, length: int) -> Unusable:
        """Why nothing is left of an example of so many tokens."""
        if length <= self.max_length:
            return Unusable("no trained tokens", "its answer is empty once rendered", bad=False)
        if self.too_long == "drop":
            return Unusable("longer than max_length", f"{length} tokens, max_length {self.max_length}", bad=False)
        return Unusable("no trained tokens", f"the prompt alone fills max_length, {self.max_length} tokens", bad=False)

    def _add_questions(self, encoded: Encoded, prompts: Sequence[Prompted]) -> None:
        kept = set(encoded.places)
        prompts = [prompt for prompt in prompts if prompt.item.place in kept]
        asked = []
        for prompt, ids in zip(prompts, self.tokenise.texts([prompt.text for prompt in prompts]), strict=True):
            if len(ids) < self.max_length:
                encoded.asked.append(Asked(prompt.item.place, ids, prompt.answer))
                asked += [(prompt, count, text) for count, text in prompt.baselines.items()]
            else:
                encoded.asked_too_long += 1
        longer = self.tokenise.texts([text for _, _, text in asked]) if asked else []
        for (prompt, count, _), ids in zip(asked, longer, strict=True):
            encoded.asked.append(Asked(prompt.item.place, ids, prompt.answer, count))


class Prompted(NamedTuple):
    """A question as text; `baselines`: the same with other numbers of examples before it."""

    item: Item
    text: str
    answer: str
    baselines: Mapping[int, str] = MappingProxyType({})


@lru_cache(maxsize=2)
def _restored(kind: type[Encoder], tokenizer: bytes, options: tuple) -> Encoder:
    """The same encoder for every chunk that a process gets: building a large tokenizer takes longer than a chunk."""
    return kind(pickle.loads(tokenizer), *options)
