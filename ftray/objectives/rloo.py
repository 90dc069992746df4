"""REINFORCE with a leave-one-out baseline (arXiv 2402.14740): an answer is one action.

    R_i = score_i - beta sum_t log(pi_old(a_t) / pi_ref(a_t)),   A_i = R_i - mean of the other answers' R
    J = E[ min(rho_i A_i, clip(rho_i, 1 - clip, 1 + clip) A_i) ],   rho_i = pi(answer) / pi_old(answer)

In the first update of a step rho is 1, and the gradient is A_i grad log pi(answer), the paper's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ftray.objectives import policy_losses
from ftray.objectives.reinforcement import Batch, Reinforcement, per_answer, spread
from ftray.objectives.rollout import Rollout


class Rloo(Reinforcement):
    def weigh(self, rollout: Rollout) -> None:
        worth_B = torch.from_numpy(rollout.scores)
        if self.section.beta:
            kl_BT = policy_losses.k1(rollout.columns["old"], rollout.columns["reference"])
            worth_B = worth_B - self.section.beta * (kl_BT * rollout.mask_BT).sum(-1)
        advantages_GS = policy_losses.leave_one_out(worth_B.reshape(-1, self.section.samples))
        rollout.columns["advantage"] = spread(advantages_GS.flatten(), rollout.mask_BT)

    def count(self, store: Any, rows: np.ndarray) -> int:
        return len(rows)

    def loss_sum(self, model: Any, batch: Batch) -> torch.Tensor:
        clips = {"low": self.section.clip, "high": self.section.clip}
        read = self.read(model, batch)
        device = read.logprobs_N.device
        log_ratio_B = per_answer(read.logprobs_N - batch.columns["old"].to(device), batch)
        tokens_B = torch.bincount(batch.owner_N, minlength=batch.answers).to(device)
        advantages_B = per_answer(batch.columns["advantage"].to(device), batch) / tokens_B.clamp(min=1)
        clipped_B = policy_losses.is_clipped(log_ratio_B, advantages_B, **clips)
        self.note(read, clip_fraction=(clipped_B * tokens_B).sum())
        return policy_losses.clipped_policy_loss(log_ratio_B, advantages_B, **clips).sum()
