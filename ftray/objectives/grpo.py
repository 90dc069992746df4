"""Group-relative policy optimisation (arXiv 2402.03300), with DAPO's (2503.14476) and Dr. GRPO's (2503.20783) changes.

    J = E[ min(rho_t A, clip(rho_t, 1 - low, 1 + high) A) - beta k3_t ],   rho_t = pi(a_t) / pi_old(a_t)

A is the answer's advantage in its group. The mean is over the tokens of all answers (`loss: token`), or over answers
of their own means (`sequence`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ftray.objectives import policy_losses
from ftray.objectives.reinforcement import Batch, Reinforcement, spread, weighted_tokens
from ftray.objectives.rollout import Rollout


class Grpo(Reinforcement):
    def weigh(self, rollout: Rollout) -> None:
        groups_GS = torch.from_numpy(rollout.scores).reshape(-1, self.section.samples)
        advantages_GS = policy_losses.group_advantages(groups_GS, scale=self.section.scale_rewards)
        rollout.columns["advantage"] = spread(advantages_GS.flatten(), rollout.mask_BT)

    def count(self, store: Any, rows: np.ndarray) -> int:
        return int(store.tokens[rows].sum()) if self.section.loss == "token" else len(rows)

    def loss_sum(self, model: Any, batch: Batch) -> torch.Tensor:
        section = self.section
        clips = {"low": section.clip, "high": section.clip if section.clip_high is None else section.clip_high}
        read = self.read(model, batch)
        columns = {name: column.to(read.logprobs_N.device) for name, column in batch.columns.items()}
        log_ratio_N, advantages_N = read.logprobs_N - columns["old"], columns["advantage"]
        loss_N = policy_losses.clipped_policy_loss(log_ratio_N, advantages_N, **clips)
        if section.beta:
            loss_N = loss_N + section.beta * policy_losses.k3(read.logprobs_N, columns["reference"])
        self.note(read, clip_fraction=policy_losses.is_clipped(log_ratio_N, advantages_N, **clips).sum())
        return (loss_N if section.loss == "token" else weighted_tokens(loss_N, batch)).sum()
