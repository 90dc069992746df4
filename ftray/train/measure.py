"""Scores of the live model over held-out rows, shared out over the workers; every worker returns the same."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ftray.config.schema import Evaluate
from ftray.data.encode import Question
from ftray.data.pack import deal
from ftray.data.tokens import TokenStore
from ftray.evaluate.compare import Scores, score
from ftray.evaluate.general import general_text
from ftray.evaluate.generate import answer_questions
from ftray.evaluate.suites import LossSum
from ftray.objectives import language
from ftray.train.layout import Layout

WINDOW = 64  # held-out rows a worker takes at once, so that neighbours in length share a batch


@dataclass(frozen=True)
class Answer:
    """One generated answer, for the report."""

    row: str
    task: str
    prompt: str
    expected: str
    given: str


@dataclass(frozen=True)
class Measured:
    scores: Scores
    answers: list[Answer]


class Meter:
    """Measures one model on one prepared data set, on this worker's share of it."""

    def __init__(
        self,
        model,
        tokenizer,
        *,
        held_out: TokenStore,
        questions: Sequence[Question],
        evaluate: Evaluate,
        layout: Layout,
        max_length: int,
        computing: Callable[[], AbstractContextManager],
        beat: Callable[[], None] = lambda: None,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.held_out, self.questions = held_out, spread(questions, evaluate.generate_rows)
        self.evaluate, self.layout, self.max_length = evaluate, layout, max_length
        self.computing, self.beat = computing, beat
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def losses(self) -> dict[str, LossSum]:
        """Loss sums by task over every held-out row. Nats, counted over trained tokens."""
        rows = np.arange(len(self.held_out))
        totals: dict[str, LossSum] = defaultdict(LossSum)
        for task in self.held_out.tasks:
            mine = rows[[self.held_out.task(int(i)) == task for i in rows]]
            if len(mine):
                examples = [(self.held_out.ids(i), self.held_out.trained(i)) for i in mine]
                totals[task] = self._sum(examples)
        return dict(totals)

    def full(self) -> Measured:
        """Loss, answers by generation, and the forgetting probe."""
        losses = self.losses()
        answers = self._answers()
        general = self._general() if self.evaluate.forgetting else None
        scores = score(
            losses,
            predictions=[a.given for a in answers],
            answers=[a.expected for a in answers],
            tasks=[a.task for a in answers],
            labels=self.evaluate.labels,
            general=general,
        )
        return Measured(scores, answers)

    def _general(self) -> LossSum:
        """Loss on general text; what it rises by is what the model forgot (PEFT's method comparison defines it so)."""
        examples = []
        for text in general_text(self.evaluate.forgetting):
            ids = np.array(self.tokenizer(text, add_special_tokens=True)["input_ids"][: self.max_length], np.int64)
            if len(ids) > 1:
                examples.append((ids, np.ones(len(ids), bool)))
        return self._sum(examples)

    def _sum(self, examples: list[tuple[np.ndarray, np.ndarray]]) -> LossSum:
        total = torch.zeros(3, dtype=torch.float64)
        with self._evaluating(), torch.no_grad():
            for start in range(0, len(examples), WINDOW * self.world):
                window = examples[start : start + WINDOW * self.world]
                lengths = np.array([len(ids) for ids, _ in window])
                hands = deal(
                    lengths,
                    workers=self.world,
                    micro_batch_size=self.layout.micro_batch_size,
                    max_length=max(self.max_length, int(lengths.max())),
                    packed=self.layout.packing,
                )
                for hand in hands[self.rank]:
                    batch = collate([window[i] for i in hand] or [nothing(window[0][0])], hand, layout=self.layout)
                    tally = language.tally(self.model, batch)
                    total += torch.tensor([tally.nats, tally.correct, tally.tokens], dtype=torch.float64)
                self.beat()
        reduced = summed(total, self.layout.device)
        return LossSum(nll=float(reduced[0]), correct=int(reduced[1]), tokens=int(reduced[2]))

    def _answers(self) -> list[Answer]:
        questions = self.questions
        if not questions:
            return []
        mine = questions[self.rank :: self.world]
        attention = self.model.config._attn_implementation
        core = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        core.set_attn_implementation("sdpa")
        try:
            with self._evaluating(), torch.no_grad():
                given = answer_questions(
                    self.model,
                    self.tokenizer,
                    mine,
                    max_new_tokens=self.evaluate.max_new_tokens,
                    synced=self.layout.zero == 3,
                    on_progress=lambda done, total: self.beat(),
                )
        finally:
            core.set_attn_implementation(attention)
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, given)
        ordered = [""] * len(questions)
        for rank, texts in enumerate(gathered):
            ordered[rank :: self.world] = texts
        return [
            Answer(q.row, q.task, self.tokenizer.decode(q.prompt_ids, skip_special_tokens=True), q.answer, text)
            for q, text in zip(questions, ordered, strict=True)
        ]

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Inside, the model is in evaluation mode and computes as in training."""
        was_training = self.model.training
        self.model.eval()
        try:
            with self.computing():
                yield
        finally:
            self.model.train(was_training)


def spread(questions: Sequence[Question], count: int) -> list[Question]:
    """At most `count` of them, evenly over the list, so that every source is asked."""
    if len(questions) <= count:
        return list(questions)
    return [questions[int(i)] for i in np.linspace(0, len(questions) - 1, count)] if count else []


def collate(examples: list[tuple[np.ndarray, np.ndarray]], rows, *, layout: Layout) -> language.Batch:
    """A micro-batch in the run's layout."""
    ids, trained = [x for x, _ in examples], [t for _, t in examples]
    if layout.packing:
        return language.pack(ids, trained, rows)
    return language.pad(ids, trained, rows, pad_id=0)


def nothing(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two tokens that train nothing: what a worker without an example computes, so that collectives stay in step."""
    return ids[:2], np.zeros(len(ids[:2]), bool)


def summed(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """The sum over all workers, on the CPU."""
    tensor = tensor.to(device)
    dist.all_reduce(tensor)
    return tensor.cpu()
