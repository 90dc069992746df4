"""What grpo, rloo and ppo share: a step samples answers, asks what they are worth, and learns from them.

Axes: B answers, T tokens of the longest, N tokens of a micro-batch's answers in a row, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from ftray.data.encode import Question
from ftray.data.prepare import Prepared
from ftray.errors import DataError
from ftray.models.adapt import is_adapted
from ftray.models.generate import Given, text_of
from ftray.objectives import language, policy_losses
from ftray.objectives.objective import Objective, Stage
from ftray.objectives.rewards import SHOWN, Answered, Rewards
from ftray.objectives.rollout import Rollout, columns_of, parts_of, roll_out, shared, whole


@dataclass(frozen=True)
class Batch:
    """A micro-batch of answers. `columns`: the rollout's, at each of its tokens, [N]; `owner_N`: whose they are."""

    tokens: language.Batch
    rows: tuple[int, ...]
    owner_N: torch.Tensor
    answers: int
    columns: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Read:
    """What the model says of a micro-batch's tokens. `values` where there is a value head."""

    logits_NV: torch.Tensor
    logprobs_N: torch.Tensor
    values_N: torch.Tensor | None


class Reinforcement(Objective):
    """Each subclass says what an answer's tokens are worth (`weigh`) and what is learnt from them (`loss_sum`)."""

    rolls_out: ClassVar[bool] = True
    noting: ClassVar[tuple[str, ...]] = ("entropy", "clip_fraction")
    """Means over tokens that updates note for the log."""

    def __init__(self, section: Any, *, packed: bool, data: Prepared):
        super().__init__(section, packed=packed, data=data)
        self.rewards = Rewards(section.rewards)
        self.updates, self.answer_tokens = section.updates, section.max_new_tokens
        self.stage: Stage
        self.frozen: Any = None
        self._sums: dict[str, torch.Tensor] = {}
        self._tokens = 0
        self._figures: dict[str, float] = {}

    @classmethod
    def check(cls, section: Any, data: Prepared) -> None:
        if not (comparing := Rewards(section.rewards).compares):
            return
        counts = ((data.train, data.train.trained_counts), (data.eval, data.eval.trained_counts))
        bare = [store.row_name(int(row)) for store, found in counts for row in np.flatnonzero(found == 0)]
        if bare:
            shown = ", ".join(bare[:SHOWN]) + (f" and {len(bare) - SHOWN:,} more" if len(bare) > SHOWN else "")
            raise DataError(
                f"{comparing[0]} compares with a reference, which {len(bare):,} rows lack: {shown}; "
                "give them an answer, or take the reward out"
            )

    def stand(self, stage: Stage) -> None:
        """A policy without an adapter to switch off is compared with a copy of the base."""
        self.stage = stage
        if stage.worth is not None:
            self.rewards.meet(stage.worth)
        if self.section.beta and not is_adapted(stage.policy):
            self.frozen = stage.another_base()

    # sampling

    def lessons(self, step: int, rows: np.ndarray) -> tuple[Rollout, list[np.ndarray]]:
        """Answers to the rows' prompts, the same on every worker, and those of each update."""
        section, stage = self.section, self.stage
        rollout = roll_out(
            stage,
            self.data.train,
            rows,
            self.rewards,
            samples=section.samples,
            step=step,
            max_new_tokens=section.max_new_tokens,
            temperature=section.temperature,
            top_p=section.top_p,
        )
        self._look(rollout)
        self._figures = {
            "reward": float(rollout.scores.mean()),
            "answer_tokens": float(rollout.tokens.mean()),
        }
        if "reference" in rollout.columns:
            kl_BT = policy_losses.k1(rollout.columns["old"], rollout.columns["reference"])
            self._figures["kl"] = float((kl_BT * rollout.mask_BT).sum(-1).mean())
        self.weigh(rollout)
        parts = parts_of(
            len(rollout.answers),
            epochs=section.epochs,
            minibatches=section.minibatches,
            seed=stage.seed,
            step=step,
        )
        return rollout, parts

    @abstractmethod
    def weigh(self, rollout: Rollout) -> None:
        """Adds the columns that `loss_sum` reads, e.g. `advantage`, from scores and what the models said."""

    def _look(self, rollout: Rollout) -> None:
        """Columns `old`, `value` with a value head, and `reference` where the base is asked: its log-probabilities."""
        hands = self.stage.deal(rollout.lengths)
        found: list[dict[str, torch.Tensor]] = []
        with self.stage.watching():
            for hand in hands:
                batch = self._batch(rollout, hand)
                seen = self.read(self.stage.whole, batch)
                columns = {"old": seen.logprobs_N}
                if seen.values_N is not None:
                    columns["value"] = seen.values_N
                if self.section.beta:
                    with self.reference() as base:
                        columns["reference"] = self.read(base, batch).logprobs_N
                found.append(columns)
                self.stage.beat()
        columns_of(rollout, hands, found)

    @contextmanager
    def reference(self) -> Iterator[Any]:
        """The base: the policy with its adapter switched off, or a frozen copy of it."""
        if self.frozen is not None:
            yield self.frozen
            return
        with self.stage.policy.disable_adapter():
            yield self.stage.policy

    # learning

    def batch(self, store: Any, rows: np.ndarray, *, spare: int) -> Batch:
        """Of a rollout, in which rows are places."""
        return self._batch(store, rows)

    def _batch(self, rollout: Rollout, places: np.ndarray) -> Batch:
        examples = [rollout.example(place) for place in places]
        empty = language.nothing(rollout.example(0)[0])
        rows = tuple(int(row) for row in rollout.rows[places])
        return Batch(
            tokens=language.collate(examples or [empty], rows, packed=self.packed),
            rows=rows,
            owner_N=torch.from_numpy(np.repeat(np.arange(len(places)), rollout.tokens[places])),
            answers=len(places),
            columns={name: rollout.of_tokens(name, places) for name in rollout.columns},
        )

    def read(self, model: Any, batch: Batch) -> Read:
        """Log-probabilities of the answers' tokens at the temperature they are sampled with, fp32."""
        output = language.trained_outputs(model, batch.tokens)
        logits_NV = output.logits.float()
        if self.section.temperature != 1:
            logits_NV = logits_NV / self.section.temperature
        targets_N = batch.tokens.targets.to(logits_NV.device)
        logprobs_N = -F.cross_entropy(logits_NV, targets_N, reduction="none")
        values = getattr(output, "token_values", None)
        return Read(logits_NV, logprobs_N, None if values is None else values.float())

    def note(self, read: Read, **sums: torch.Tensor) -> None:
        """Keeps sums over a micro-batch's tokens for the log, entropy among them."""
        sums["entropy"] = policy_losses.entropy(read.logits_NV.detach()).sum()
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().double()
        self._tokens += len(read.logprobs_N)

    def noted(self) -> list[float]:
        sums = [float(self._sums.get(name, 0.0)) for name in self.noting]
        tokens, self._sums, self._tokens = self._tokens, {}, 0
        return [*sums, float(tokens)]

    def told(self, sums: Sequence[float]) -> dict[str, float]:
        *totals, tokens = sums
        means = {name: total / max(1.0, tokens) for name, total in zip(self.noting, totals, strict=True)}
        return {**self._figures, **means}

    # held-out rows

    def judge(self, questions: Sequence[Question], given: Sequence[Given]) -> np.ndarray:
        """[questions, 3]: reward, KL to the base in nats, and whether it is right, of each answer; nan where unknown.

        Collective: all workers call it with all of them.
        """
        stage = self.stage
        mine = list(zip(questions, given, strict=True))[dist.get_rank() :: dist.get_world_size()]
        answered = [
            Answered(
                prompt=str(stage.tokenizer.decode(question.prompt_ids, skip_special_tokens=True)),
                prompt_ids=question.prompt_ids,
                answer=text_of(stage.tokenizer, one),
                tokens=len(one.ids),
                reference=question.answer,
                row=question.row,
                ids=[*question.prompt_ids, *whole(one)],
            )
            for question, one in mine
        ]
        found = np.array(shared(list(self.rewards(answered)))).reshape(len(questions), len(self.section.rewards))
        deciding = self.rewards.deciding
        right = np.full(len(questions), np.nan) if deciding is None else found[:, deciding]
        return np.stack([found @ self.rewards.weights, self._distances(questions, given), right], 1)

    def _distances(self, questions: Sequence[Question], given: Sequence[Given]) -> np.ndarray:
        """KL(policy || base) in nats, summed over each answer's tokens, [answers]; nan where no base can be asked."""
        asked = self.frozen is not None or is_adapted(self.stage.policy)
        if not asked or not questions:
            return np.full(len(questions), np.nan)
        rollout = Rollout(
            rows=np.arange(len(questions)),
            prompts=[list(question.prompt_ids) for question in questions],
            answers=[whole(one) for one in given],
            rewards=np.zeros((len(questions), 0)),
            scores=np.zeros(len(questions)),
        )
        hands = self.stage.deal(rollout.lengths)
        found = []
        with self.stage.watching():
            for hand in hands:
                batch = self._batch(rollout, hand)
                here_NV = language.trained_outputs(self.stage.policy, batch.tokens).logits
                with self.reference() as base:
                    there_NV = language.trained_outputs(base, batch.tokens).logits
                found.append({"kl": policy_losses.full_kl(here_NV, there_NV)})
                self.stage.beat()
        columns_of(rollout, hands, found)
        return (rollout.columns["kl"] * rollout.mask_BT).sum(-1).double().numpy()

    def right(self, observed: np.ndarray) -> list[bool | None]:
        return [None if np.isnan(one) else one == 1 for one in observed[:, 2].tolist()]

    def observe(self, model: Any, batch: Any) -> np.ndarray:
        raise AssertionError("held-out rows are judged by their answers")

    def scores(self, observed: np.ndarray) -> dict[str, float]:
        if not len(observed):
            return {}
        means = zip(("reward", "kl", "pass_at_1"), observed.mean(0), strict=True)
        return {name: float(mean) for name, mean in means if not np.isnan(mean)}


def weighted_tokens(values_N: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Values divided by the tokens of the answer they belong to, so that an answer's sum is its mean."""
    tokens_B = torch.bincount(batch.owner_N, minlength=batch.answers)
    return values_N / tokens_B[batch.owner_N].to(values_N.device)


def per_answer(values_N: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Sums over each answer's tokens, [B]."""
    return values_N.new_zeros(batch.answers).index_add(0, batch.owner_N.to(values_N.device), values_N)


def spread(values_B: np.ndarray | torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """A value of each answer at all of its tokens."""
    return torch.as_tensor(values_B).float()[:, None] * mask_BT
