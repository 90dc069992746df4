"""Distillation: the next token as a frozen teacher would choose it, mixed with the one that the row has.

Axes: N trained tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ftray.config.schema import Model
from ftray.models.adapt import unwrap
from ftray.models.heads import inner
from ftray.models.load import load_frozen
from ftray.objectives import language
from ftray.objectives.language import Batch, Language, trained_logits
from ftray.objectives.policy_losses import full_kl


class Distill(Language):
    """The teacher is loaded at the first batch, whole in every worker; it computes as the model that learns does."""

    teacher: Any = None

    @classmethod
    def beside(cls, section: Any) -> Model:
        return Model(base=section.teacher)

    def loss_sum(self, model, batch: Batch) -> torch.Tensor:
        share, targets_N = self.section.weight, batch.targets
        student_NV = trained_logits(model, batch).float()
        divergence = divergence_sum(
            student_NV,
            self._teacher_logits(model, batch),
            temperature=self.section.temperature,
            reverse=self.section.divergence == "reverse",
        )
        own = F.cross_entropy(student_NV, targets_N.to(student_NV.device), reduction="sum")
        return share * divergence + (1 - share) * own

    @torch.no_grad()
    def observe(self, model, batch: Batch) -> np.ndarray:
        """Language modelling's figures, and the teacher's divergence (forward, as it stands) in nats."""
        student_NV = trained_logits(model, batch).float()
        nats = full_kl(self._teacher_logits(model, batch), student_NV).sum()
        return np.concatenate([language.tally(student_NV, batch), [[nats.item()]]], axis=1)

    def scores(self, observed: np.ndarray) -> dict[str, float]:
        found = language.scores(observed[:, :3])
        return found | ({"teacher_kl": observed[:, 3].sum() / observed[:, 2].sum()} if found else {})

    @torch.no_grad()
    def _teacher_logits(self, model, batch: Batch) -> torch.Tensor:
        if self.teacher is None:
            self.teacher = self._load(unwrap(model))
        return trained_logits(self.teacher, batch).float()

    def _load(self, student: Any) -> Any:
        device = next(student.parameters()).device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else next(student.parameters()).dtype
        attention = inner(student).config._attn_implementation
        return load_frozen(self.beside(self.section), dtype=dtype, attention=attention).to(device)


def divergence_sum(
    student_NV: torch.Tensor, teacher_NV: torch.Tensor, *, temperature: float, reverse: bool
) -> torch.Tensor:
    """Summed KL divergence of the distributions at a temperature T, times T^2, in nats.

    Forward: sum_n sum_v p_T(v) log p_T(v)/p_S(v), the loss of Hinton et al. (arXiv 1503.02531, section 2), whose T^2
    keeps its gradient as large as at T = 1. Reverse: the two change places (MiniLLM, arXiv 2306.08543, equation 1).
    """
    student = F.log_softmax(student_NV / temperature, -1)
    teacher = F.log_softmax(teacher_NV / temperature, -1)
    first, second = (student, teacher) if reverse else (teacher, student)
    return temperature**2 * (first.exp() * (first - second)).sum()
