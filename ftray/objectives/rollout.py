"""Sampling a step's answers: each worker answers its share of the prompts, and every worker gets all answers.

So that what is computed over a whole step (groups, whitening, minibatches) is computed alike everywhere and needs no
further word between workers. Axes: B answers of a step, by prompt and then by sample, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ftray.data.prompts import prompt_of, reference_of
from ftray.data.tokens import TokenStore
from ftray.models.generate import Given, Sampler, answer, text_of
from ftray.objectives.objective import Stage
from ftray.objectives.rewards import Answered, Rewards


@dataclass
class Rollout:
    """A step's answers, the same on every worker. `answers` hold the token that ended them, if one did.

    `columns` are values of each token, [B, T] fp32, such as `old`, the log-probabilities under the policy that sampled
    them.
    """

    rows: np.ndarray  # [B] rows of the store that were asked
    prompts: list[list[int]]
    answers: list[list[int]]
    rewards: np.ndarray  # [B, rewards] float64, not weighted
    scores: np.ndarray  # [B] float64, their weighted sum
    columns: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each prompt with its answer."""
        return np.array([len(p) + len(a) for p, a in zip(self.prompts, self.answers, strict=True)], np.int64)

    @property
    def tokens(self) -> np.ndarray:
        """Tokens of each answer."""
        return np.array([len(ids) for ids in self.answers], np.int64)

    @property
    def mask_BT(self) -> torch.Tensor:
        tokens = torch.from_numpy(self.tokens)
        return (torch.arange(max(1, int(tokens.max())))[None] < tokens[:, None]).float()

    def example(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, which of them the policy wrote)."""
        prompt, given = self.prompts[place], self.answers[place]
        ids = np.array([*prompt, *given], np.int64)
        return ids, np.arange(len(ids)) >= len(prompt)

    def of_tokens(self, name: str, places: np.ndarray) -> torch.Tensor:
        """A column's values at the tokens of these answers, one after the other, [N]."""
        column = self.columns[name]
        parts = [column[place, : len(self.answers[place])] for place in places]
        return torch.cat([column.new_zeros(0), *parts])


def roll_out(
    stage: Stage,
    store: TokenStore,
    rows: np.ndarray,
    rewards: Rewards,
    *,
    samples: int,
    step: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
) -> Rollout:
    """`samples` answers to each row's prompt, with what they are worth. Collective.

    The numbers by which an answer is drawn come from (seed, step, place of the row in the window, sample), so the
    outcome depends neither on workers nor on what was sampled before.
    """
    asked = [(place, sample) for place in range(len(rows)) for sample in range(samples)]
    mine = asked[dist.get_rank() :: dist.get_world_size()]
    prompts = [prompt_of(store, int(row)) for row in rows]
    numbers_RS = np.array(
        [np.random.default_rng((stage.seed, step, *which)).random(max_new_tokens) for which in mine]
    ).reshape(len(mine), max_new_tokens)
    with stage.computing():
        given = answer(
            stage.policy,
            stage.tokenizer,
            [prompts[place] for place, _ in mine],
            max_new_tokens=max_new_tokens,
            pick=Sampler(numbers_RS, temperature, top_p),
            synced=stage.synced,
            on_progress=lambda done, total: stage.beat(),
        )
    answered = [
        Answered(
            prompt=str(stage.tokenizer.decode(prompts[place], skip_special_tokens=True)),
            prompt_ids=prompts[place],
            answer=text_of(stage.tokenizer, one),
            tokens=len(one.ids),
            reference=reference_of(store, int(rows[place]), stage.tokenizer),
            row=store.row_name(int(rows[place])),
            ids=[*prompts[place], *whole(one)],
        )
        for (place, _), one in zip(mine, given, strict=True)
    ]
    answers = shared([whole(one) for one in given])
    found = np.stack(shared(list(rewards(answered))))
    return Rollout(
        rows=np.repeat(rows, samples),
        prompts=[prompts[place] for place, _ in asked],
        answers=answers,
        rewards=found,
        scores=found @ rewards.weights,
    )


def whole(given: Given) -> list[int]:
    """An answer's ids with the one that ended it: to stop is an action too."""
    return given.ids if given.stop is None else [*given.ids, given.stop]


def shared(mine: Sequence[Any]) -> list[Any]:
    """What all workers have of things that were dealt one after the other, each worker's share in order."""
    world = dist.get_world_size()
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, list(mine))
    together: list[Any] = [None] * sum(map(len, everyone))
    for rank, share in enumerate(everyone):
        together[rank::world] = share
    return together


def columns_of(rollout: Rollout, hands: Sequence[np.ndarray], found: Sequence[dict[str, torch.Tensor]]) -> None:
    """Fills the rollout's columns from what each worker found: values [N] by name for each of its hands. Collective."""
    mine = [
        (hand, {name: values.float().cpu().numpy() for name, values in values_by_name.items()})
        for hand, values_by_name in zip(hands, found, strict=True)
        if len(hand)
    ]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    shape = rollout.mask_BT.shape
    for hand, values_by_name in (pair for pairs in everyone for pair in pairs):
        for name, values in values_by_name.items():
            column = rollout.columns.setdefault(name, torch.zeros(shape))
            at = 0
            for place in hand:
                length = len(rollout.answers[place])
                column[place, :length] = torch.from_numpy(values[at : at + length])
                at += length


def parts_of(count: int, *, epochs: int, minibatches: int, seed: int, step: int) -> list[np.ndarray]:
    """The answers of each update: in every epoch all of them once, in another order, cut into minibatches.

    One minibatch keeps the order. Where there are fewer answers than minibatches, there are fewer updates.
    """
    parts = []
    for epoch in range(epochs):
        order = np.arange(count)
        if minibatches > 1:
            order = np.random.default_rng((seed, step, epoch, count)).permutation(count)
        parts += [np.sort(part) for part in np.array_split(order, minibatches) if len(part)]
    return parts
