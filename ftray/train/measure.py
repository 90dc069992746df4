"""Scores of the live model over held-out rows, shared out over the workers; every worker returns the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ftray.config.schema import Evaluate
from ftray.data.encode import Question
from ftray.data.numbers import same_number
from ftray.data.pack import deal
from ftray.data.tokens import TokenStore
from ftray.evaluate.compare import Scores, score
from ftray.evaluate.general import general_text
from ftray.evaluate.suites import answer_scores, numbered, numeric_tasks
from ftray.models import virtual
from ftray.models.generate import Given, answer, text_of
from ftray.models.heads import inner
from ftray.objectives import language
from ftray.objectives.objective import Objective, joined
from ftray.objectives.rollout import shared
from ftray.objectives.worth import ids_of, kl_to_base
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
    worth: float | None = None  # to evaluate.judge
    right: bool | None = None  # what pass_at_1 is the mean of; None does not count


@dataclass(frozen=True)
class Measured:
    """`details`: what the objective says beside the scores, plain data."""

    scores: Scores
    answers: list[Answer]
    baselines: dict[int, Scores] = field(default_factory=dict)
    """Of the base alone: what its answers score with so many training examples before each question."""
    details: dict[str, Any] = field(default_factory=dict)


class Meter:
    """Measures one model on one prepared data set, on this worker's share of it."""

    def __init__(
        self,
        model,
        tokenizer,
        *,
        objective: Objective,
        held_out: TokenStore,
        questions: Sequence[Question],
        baselines: Mapping[int, Sequence[Question]],
        evaluate: Evaluate,
        layout: Layout,
        max_length: int,
        computing: Callable[[], AbstractContextManager],
        beat: Callable[[], None] = lambda: None,
        judge: Callable[[Sequence[Sequence[int]]], np.ndarray] | None = None,
        switches_off: bool = False,
    ):
        """`judge`: what texts, as ids, are worth; `switches_off`: the model without its adapter is the base."""
        self.model, self.tokenizer, self.objective = model, tokenizer, objective
        self.held_out, self.questions = held_out, spread(questions, evaluate.generate_rows)
        self.baselines = {count: spread(asked, evaluate.generate_rows) for count, asked in baselines.items()}
        self.numeric = numeric_tasks([q.answer for q in questions], [q.task for q in questions], evaluate.numeric)
        self.evaluate, self.layout, self.max_length = evaluate, layout, max_length
        self.computing, self.beat = computing, beat
        self.judge, self.switches_off = judge, switches_off
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def quick(self) -> dict[str, float]:
        """The objective's scores over every held-out row."""
        given = self._given(self.questions) if self.objective.rolls_out else []
        return self.objective.scores(joined(list(self._by_task(given).values())))

    def full(self) -> Measured:
        """The objective's scores, and of one that writes: answers by generation, and the forgetting probe."""
        given = self._given(self.questions) if self.objective.writes else []
        by_task = self._by_task(given)
        answers = self._marked(self._answers(self.questions, given), by_task) if given else []
        expected = [answer for answer in answers if answer.expected]
        general = self._general() if self.objective.writes and self.evaluate.forgetting else {}
        observed = joined(list(by_task.values()))
        scores = score(
            self.objective.scores(observed),
            by_task={task: self.objective.scores(observed) for task, observed in by_task.items()},
            predictions=[a.given for a in expected],
            answers=[a.expected for a in expected],
            tasks=[a.task for a in expected],
            labels=self.evaluate.labels,
            numeric=self.numeric,
            general_loss=general.get("loss"),
        )
        if self.objective.writes and self.evaluate.lm_eval.tasks:
            scores = replace(scores, lm_eval=self._benchmarks())
        if self.judge is not None and given:
            scores, answers = self._judged(scores, answers, given)
        return Measured(scores, answers, details=self.objective.details(observed))

    def base(self) -> Measured:
        """`full`, and the rivals of training that `evaluate.baselines` names. For the model before it is trained."""
        measured = self.full()
        found = {}
        for count in self.evaluate.baselines:
            answers = measured.answers
            if asked := self.baselines.get(count):
                answers = self._answers(asked, self._given(asked))
            given, expected = [a.given for a in answers], [a.expected for a in answers]
            numbers = numbered(expected, [a.task for a in answers], self.numeric)
            found[count] = Scores.of(answer_scores(given, expected, self.evaluate.labels, numbers))
        return replace(measured, baselines=found)

    def _marked(self, answers: list[Answer], by_task: Mapping[str, np.ndarray]) -> list[Answer]:
        """Answers with whether they are right: by their number, or as rewards say where they decide."""
        numbers = numbered([a.expected for a in answers], [a.task for a in answers], self.numeric)
        right: dict[int, bool] = {i: same_number(answers[i].given, answers[i].expected) for i in numbers}
        if self.objective.rolls_out:
            for task, observed in by_task.items():
                rows = [i for i, answer in enumerate(answers) if answer.task == task]
                said = zip(rows, self.objective.right(observed), strict=True)
                right |= {i: one for i, one in said if one is not None}
        return [replace(answer, right=right.get(i)) for i, answer in enumerate(answers)]

    def _judged(self, scores: Scores, answers: list[Answer], given: Sequence[Given]) -> tuple[Scores, list[Answer]]:
        """What the judge gives each answer, and how far they are from the base: what the score was paid with."""
        assert self.judge is not None
        mine = slice(self.rank, None, self.world)
        asked, said = self.questions[mine], given[mine]
        worth = shared(list(self.judge([ids_of(q.prompt_ids, one) for q, one in zip(asked, said, strict=True)])))
        scores = replace(scores, judge_score=float(np.mean(worth)))
        if scores.kl is None and self.switches_off and self.layout.zero != 3:  # under which a forward is collective
            with self._evaluating():
                kl = shared(kl_to_base(self.model, asked, said, beat=self.beat))
            scores = replace(scores, kl=float(np.mean(kl)))
        return scores, [replace(answer, worth=float(one)) for answer, one in zip(answers, worth, strict=True)]

    def _by_task(self, given: Sequence[Given]) -> dict[str, np.ndarray]:
        """Observations of every held-out row, or of the answers to them, by the task it belongs to."""
        if self.objective.rolls_out:
            observed = self.objective.judge(self.questions, given)
            tasks = np.array([question.task for question in self.questions])
            return {task: observed[tasks == task] for task in dict.fromkeys(tasks.tolist())}
        rows = np.arange(len(self.held_out))
        mine = {task: rows[[self.held_out.task(int(i)) == task for i in rows]] for task in self.held_out.tasks}
        return {task: self._observed_rows(rows) for task, rows in mine.items() if len(rows)}

    def over(self, store: TokenStore, observe: Callable[[Any, Any], np.ndarray]) -> np.ndarray:
        """[rows, figures]: what `observe(model, batch)` gives for each row of a batch, of every row of a store."""

        def with_rows(model: Any, batch: Any) -> np.ndarray:
            with virtual.of_rows(model, store, batch.rows):
                return np.column_stack([np.array(batch.rows, np.float64), observe(model, batch)])

        def batch(hand: np.ndarray) -> Any:
            return self.objective.batch(store, hand, spare=0)

        found = self._observed(store.lengths, batch, with_rows)
        return found[np.argsort(found[:, 0]), 1:] if len(found) else found

    def _observed_rows(self, rows: np.ndarray) -> np.ndarray:
        def batch(hand: np.ndarray) -> Any:
            return self.objective.batch(self.held_out, rows[hand], spare=int(rows[0]))

        def observe(model: Any, batch: Any) -> np.ndarray:
            with virtual.of_rows(model, self.held_out, batch.rows):
                return self.objective.observe(model, batch)

        return self._observed(self.held_out.lengths[rows], batch, observe)

    def _benchmarks(self) -> dict[str, float]:
        """By lm_eval/<task>/<metric>."""
        from ftray.evaluate.benchmarks import benchmarks

        with self._padded(), self._evaluating(), torch.no_grad():
            return benchmarks(
                self.model,
                self.tokenizer,
                asked=self.evaluate.lm_eval,
                batch_size=self.layout.micro_batch_size,
                computing=self.computing,
                beat=self.beat,
            )

    def _general(self) -> dict[str, float]:
        """Loss on general text; what it rises by is what the model forgot (PEFT's method comparison defines it so)."""
        examples = []
        for text in general_text(self.evaluate.forgetting):
            ids = np.array(self.tokenizer(text, add_special_tokens=True)["input_ids"][: self.max_length], np.int64)
            if len(ids) > 1:
                examples.append((ids, np.ones(len(ids), bool)))
        observed = self._observed(
            np.array([len(ids) for ids, _ in examples]),
            lambda hand: language.collate(
                [examples[i] for i in hand] or [language.nothing(examples[0][0])], hand, packed=self.layout.packing
            ),
            language.observe,
        )
        return language.scores(observed)

    def _observed(
        self,
        lengths: np.ndarray,
        batch: Callable[[np.ndarray], Any],
        observe: Callable[[Any, Any], np.ndarray],
    ) -> np.ndarray:
        """What all workers observe on examples of these lengths; `batch(positions)` makes a micro-batch of them."""
        mine = []
        with self._evaluating(), torch.no_grad():
            for start in range(0, len(lengths), WINDOW * self.world):
                window = lengths[start : start + WINDOW * self.world]
                hands = deal(
                    window,
                    workers=self.world,
                    micro_batch_size=self.layout.micro_batch_size,
                    max_length=max(self.max_length, int(window.max())),
                    packed=self.layout.packing,
                )
                mine += [observe(self.model, batch(start + hand)) for hand in hands[self.rank]]
                self.beat()
        return joined([part for parts in gathered(joined(mine)) for part in parts if len(part)])

    def _given(self, questions: Sequence[Question]) -> list[Given]:
        """Greedy answers to the questions."""
        if not questions:
            return []
        mine = questions[self.rank :: self.world]
        with self._padded(), self._evaluating(), torch.no_grad():
            given = answer(
                self.model,
                self.tokenizer,
                [question.prompt_ids for question in mine],
                max_new_tokens=self.objective.answer_tokens or self.evaluate.max_new_tokens,
                tasks=[question.task for question in mine],
                synced=self.layout.zero == 3,
                on_progress=lambda done, total: self.beat(),
            )
        ordered = [Given([], None)] * len(questions)
        for rank, share in enumerate(gathered(given)):
            ordered[rank :: self.world] = share
        return ordered

    def _answers(self, questions: Sequence[Question], given: Sequence[Given]) -> list[Answer]:
        prompts = [str(self.tokenizer.decode(q.prompt_ids, skip_special_tokens=True)) for q in questions]
        return [
            Answer(q.row, q.task, prompt, q.answer, text_of(self.tokenizer, one))
            for q, prompt, one in zip(questions, prompts, given, strict=True)
        ]

    @contextmanager
    def _padded(self) -> Iterator[None]:
        """Inside, the model's attention knows padded rows."""
        attention = self.model.config._attn_implementation
        core = inner(self.model)
        core.set_attn_implementation("sdpa")
        try:
            yield
        finally:
            core.set_attn_implementation(attention)

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


def gathered(mine: Any) -> list[Any]:
    """What every worker has, in their order."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def summed(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """The sum over all workers, on the CPU."""
    if dist.get_world_size() == 1:
        return tensor
    tensor = tensor.to(device)
    dist.all_reduce(tensor)
    return tensor.cpu()
