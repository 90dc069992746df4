"""Reward models: one number for an answer, learnt from pairs of a better and a worse one, and from good and bad ones.

A causal base under a head of one row reads the prompt with its answer, up to the answer's last token, and says there
what the answer is worth.

Axes: S texts, P pairs, J judged answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ftray.data.encode_preferences import Side, halves
from ftray.data.tokens import TokenStore
from ftray.models.heads import REWARD, Head
from ftray.objectives import labels, preference_losses
from ftray.objectives.objective import Objective


@dataclass(frozen=True)
class Batch:
    """Texts, and which of them are compared. Of no examples it holds one text that is not."""

    texts: labels.Texts
    pairs_P2: torch.Tensor  # places of the chosen and the rejected text
    margins_P: torch.Tensor
    judged_J: torch.Tensor  # places
    good_J: torch.Tensor  # 1 or 0
    rows: tuple[int, ...]


class RewardModel(Objective):
    """Counted in examples. Observed: (loss, reward of the chosen answer or the only one, reward of the rejected one or
    nan, 1 or 0 for a good or a bad answer or nan)."""

    writes = False

    @classmethod
    def head(cls, section: Any, names: Any) -> Head:
        return REWARD

    def count(self, store: TokenStore, rows: np.ndarray) -> int:
        return len(rows)

    def batch(self, store: TokenStore, rows: np.ndarray, *, spare: int) -> Batch:
        ids: list[np.ndarray] = []
        pairs: list[tuple[int, int]] = []
        judged: list[int] = []
        margins: list[float] = []
        good: list[int] = []
        for row in map(int, rows):
            texts = texts_of(store, row)
            if len(texts) == 2:
                pairs.append((len(ids), len(ids) + 1))
                margins.append(float(store.column("margin")[row]))
            else:
                judged.append(len(ids))
                good.append(int(store.column("good")[row]))
            ids += texts
        return Batch(
            texts=labels.padded(ids or [store.ids(spare)]),
            pairs_P2=torch.tensor(pairs, dtype=torch.long).view(-1, 2),
            margins_P=torch.tensor(margins),
            judged_J=torch.tensor(judged, dtype=torch.long),
            good_J=torch.tensor(good, dtype=torch.float32),
            rows=tuple(map(int, rows)),
        )

    def loss_sum(self, model: Any, batch: Batch) -> torch.Tensor:
        rewards_S = labels.read(model, batch.texts)[:, 0]
        of_pairs, of_judged = self._losses(rewards_S, batch)
        return of_pairs.sum() + of_judged.sum()

    @torch.no_grad()
    def observe(self, model: Any, batch: Batch) -> np.ndarray:
        rewards_S = labels.read(model, batch.texts)[:, 0].cpu()
        of_pairs, of_judged = self._losses(rewards_S, batch)
        unknown_P, unknown_J = torch.full_like(of_pairs, torch.nan), torch.full_like(of_judged, torch.nan)
        pairs = torch.stack([of_pairs, *rewards_S[batch.pairs_P2].unbind(1), unknown_P], 1)
        judged = torch.stack([of_judged, rewards_S[batch.judged_J], unknown_J, batch.good_J], 1)
        return torch.cat([pairs, judged]).double().numpy()

    def scores(self, observed: np.ndarray) -> dict[str, float]:
        """A tie counts half. `accuracy`: good answers with a reward above 0, and bad ones with one below.

        Where rows are of both kinds, `reward_margin` is that of the pairs.
        """
        if not len(observed):
            return {}
        losses, first, second, good = observed.T
        pairs, found = np.isnan(good), {"loss": float(losses.mean())}
        if not pairs.all():
            found |= judged_scores(first[~pairs], good[~pairs] > 0.5)
        if pairs.any():
            apart = first[pairs] - second[pairs]
            found |= {"reward_accuracy": right_share(apart), "reward_margin": float(apart.mean())}
        return found

    def details(self, observed: np.ndarray) -> dict[str, Any]:
        """`rewards`: mean and deviation over every held-out answer, by which they may be normalised later."""
        if not len(observed):
            return {}
        rewards = observed[:, 1:3][~np.isnan(observed[:, 1:3])]
        return {"rewards": {"mean": float(rewards.mean()), "std": float(rewards.std())}}

    def _losses(self, rewards_S: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """[P], [J]"""
        device = rewards_S.device
        chosen_P, rejected_P = rewards_S[batch.pairs_P2.to(device)].unbind(1)
        of_pairs = bradley_terry(chosen_P, rejected_P, batch.margins_P.to(device), center=self.section.center)
        return of_pairs, good_or_bad(rewards_S[batch.judged_J.to(device)], batch.good_J.to(device))


def bradley_terry(
    chosen_P: torch.Tensor, rejected_P: torch.Tensor, margins_P: torch.Tensor, *, center: float = 0.0
) -> torch.Tensor:
    """[P] nats: -log sigmoid(r_c - r_r - m), InstructGPT's equation 1 (arXiv 2203.02155) with Llama 2's margin (arXiv
    2307.09288, equation 2); plus center (r_c + r_r)^2, which keeps rewards near 0 (arXiv 2312.09244, section 2)."""
    losses = -F.logsigmoid(chosen_P - rejected_P - margins_P)
    return losses + center * (chosen_P + rejected_P).square() if center else losses


def good_or_bad(rewards_J: torch.Tensor, good_J: torch.Tensor) -> torch.Tensor:
    """[J] nats: binary cross-entropy, the reward being the log-odds of a good answer."""
    return F.binary_cross_entropy_with_logits(rewards_J, good_J, reduction="none")


def judged_scores(rewards: np.ndarray, good: np.ndarray) -> dict[str, float]:
    found = {"accuracy": right_share(np.where(good, rewards, -rewards))}
    auc = preference_losses.auc(torch.from_numpy(rewards), torch.from_numpy(good))
    if auc is not None:
        found |= {"reward_auc": auc, "reward_margin": float(rewards[good].mean() - rewards[~good].mean())}
    return found


def right_share(apart: np.ndarray) -> float:
    return float((np.sign(apart) + 1).mean() / 2)


def texts_of(store: TokenStore, row: int) -> list[np.ndarray]:
    """The chosen and the rejected text of a pair, or the only one, each up to the last token of its answer: what a
    template puts behind it, a policy does not write."""
    sides = halves(store, row) if store.column("cut")[row] else [Side(store.ids(row), store.trained(row))]
    return [side.ids[: int(np.flatnonzero(side.trained)[-1]) + 1] for side in sides]
