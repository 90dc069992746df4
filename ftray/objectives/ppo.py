"""Proximal policy optimisation (arXiv 1707.06347) on language (1909.08593): a value head beside the policy's own head.

The reward of a token is -beta log(pi_old / pi_ref), and the answer's score is added at its last one, less the mean of
the first step's scores (as in 2203.02155, section 3.5): values begin at 0, and what every answer gets would otherwise
be credited to its last tokens, which teaches to stop early. One base serves policy, reference and value: the head reads
the last hidden state of the policy's trunk and is trained with the adapter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from transformers.utils import ModelOutput

from ftray.config.objectives import Ppo as Section
from ftray.data.prepare import Prepared
from ftray.objectives import policy_losses
from ftray.objectives.reinforcement import Batch, Reinforcement
from ftray.objectives.rollout import Rollout

BETA, USUAL = "ppo:beta", "ppo:usual"


@dataclass
class Valued(ModelOutput):
    logits: torch.Tensor | None = None
    token_values: torch.Tensor | None = None  # `values` is a method of every output


class WithValue(torch.nn.Module):
    """A policy and a value of each position it gives logits for: linear on what its output layer reads, 0 at first."""

    def __init__(self, policy: Any):
        super().__init__()
        self.module = policy  # the name by which wrappers are taken off
        weight = policy.get_output_embeddings().weight
        width = policy.config.get_text_config().hidden_size
        self.value_head = torch.nn.Linear(width, 1, device=weight.device, dtype=torch.float32)
        torch.nn.init.zeros_(self.value_head.weight)
        torch.nn.init.zeros_(self.value_head.bias)

    def forward(self, **inputs: Any) -> Valued:
        seen: list[torch.Tensor] = []
        head = self.module.get_output_embeddings()
        with head.register_forward_pre_hook(lambda module, args: seen.append(args[0])):
            logits = self.module(**inputs).logits
        return Valued(logits=logits, token_values=self.value_head(seen[0].to(self.value_head.weight.dtype)).squeeze(-1))


class Ppo(Reinforcement):
    noting: ClassVar[tuple[str, ...]] = ("entropy", "clip_fraction", "value_loss")
    section: Section

    def __init__(self, section: Any, *, packed: bool, data: Prepared):
        super().__init__(section, packed=packed, data=data)
        self.beta = float(section.beta)
        self.usual: float | None = None  # the mean score of the first step's answers

    def around(self, model: Any) -> tuple[Any, dict[str, torch.nn.Parameter]]:
        valued = WithValue(model)
        return valued, {f"value_head.{name}": one for name, one in valued.value_head.named_parameters()}

    def weigh(self, rollout: Rollout) -> None:
        section, columns, mask_BT = self.section, rollout.columns, rollout.mask_BT
        kl_BT = torch.zeros_like(mask_BT)
        if section.beta:
            kl_BT = policy_losses.k1(columns["old"], columns["reference"])
        if self.usual is None:
            self.usual = float(rollout.scores.mean())
        scores_B = torch.from_numpy(rollout.scores) - self.usual
        rewards_BT = policy_losses.token_rewards(scores_B, kl_BT, mask_BT, beta=self.beta)
        advantages_BT = policy_losses.gae(rewards_BT, columns["value"], mask_BT, gamma=section.gamma, lam=section.lam)
        columns["return"] = advantages_BT + columns["value"] * mask_BT
        columns["advantage"] = policy_losses.whiten(advantages_BT, mask_BT) if section.whiten else advantages_BT
        if section.kl_target is not None and section.beta:
            self.beta = policy_losses.adapted(self.beta, kl=self._figures["kl"], target=section.kl_target)

    def count(self, store: Any, rows: np.ndarray) -> int:
        return int(store.tokens[rows].sum())

    def loss_sum(self, model: Any, batch: Batch) -> torch.Tensor:
        section = self.section
        clips = {"low": section.clip, "high": section.clip}
        read = self.read(model, batch)
        assert read.values_N is not None
        columns = {name: column.to(read.logprobs_N.device) for name, column in batch.columns.items()}
        log_ratio_N, advantages_N = read.logprobs_N - columns["old"], columns["advantage"]
        policy_N = policy_losses.clipped_policy_loss(log_ratio_N, advantages_N, **clips)
        value_N = policy_losses.clipped_value_loss(
            read.values_N, columns["value"], columns["return"], clip=section.value_clip
        )
        clipped = policy_losses.is_clipped(log_ratio_N, advantages_N, **clips)
        self.note(read, clip_fraction=clipped.sum(), value_loss=value_N.sum())
        return (policy_N + section.value_weight * value_N).sum()

    def told(self, sums: Any) -> dict[str, float]:
        return {**super().told(sums), "beta": self.beta}

    def tensors(self) -> dict[str, torch.Tensor]:
        usual = math.nan if self.usual is None else self.usual
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in ((BETA, self.beta), (USUAL, usual))}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.beta = float(tensors[BETA])
        usual = float(tensors.get(USUAL, 0.0))  # a checkpoint without it is of a run that took scores as they are
        self.usual = None if math.isnan(usual) else usual
