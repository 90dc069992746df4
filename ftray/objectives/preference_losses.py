"""Losses over log-probabilities of whole answers: DPO and its kin, ORPO, KTO. Pure functions of tensors.

Axes: P pairs, B judged answers. Log-probabilities are in nats, summed over an answer's tokens unless said otherwise;
losses are one number each, so that a caller sums them and divides by the pairs or answers of a whole window.

    c, r        log p(chosen | prompt), log p(rejected | prompt) of the policy
    c0, r0      the same of the reference, the untouched base
    c - c0      a log-ratio; beta times it is the implicit reward (arXiv 2305.18290, equation 5 without its constant)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ftray.config.objectives import Dpo, Kto, Orpo


@dataclass(frozen=True)
class Ratios:
    """Log-ratios [P] of both answers of each pair, and their numbers of trained tokens [P]."""

    chosen: torch.Tensor
    rejected: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor

    @property
    def apart(self) -> torch.Tensor:
        """[P] nats: (c - c0) - (r - r0)."""
        return self.chosen - self.rejected

    @property
    def apart_per_token(self) -> torch.Tensor:
        """[P] the same of means over each answer's tokens."""
        return self.chosen / self.chosen_tokens.clamp(min=1) - self.rejected / self.rejected_tokens.clamp(min=1)


def dpo(ratios: Ratios, section: Dpo) -> torch.Tensor:
    """[P]. With d = (c - c0) - (r - r0), its mean-per-token form m, s(x) = log sigmoid(x) and e = label_smoothing:

    sigmoid     -(1 - e) s(beta d) - e s(-beta d)            arXiv 2305.18290 eq. 7; e > 0 is conservative DPO
    robust      (-(1 - e) s(beta d) + e s(-beta d)) / (1 - 2e)   arXiv 2403.00409: unbiased where labels are flipped
    hinge       max(0, 1 - beta d)                           arXiv 2305.10425
    ipo         (m - 1 / (2 beta))^2                         arXiv 2310.12036 eq. 17, per token as its authors run it
    normalised  as sigmoid, of m
    """
    beta, smoothing = section.beta, section.label_smoothing
    if section.loss == "hinge":
        return torch.relu(1 - beta * ratios.apart)
    if section.loss == "ipo":
        return (ratios.apart_per_token - 1 / (2 * beta)) ** 2
    apart = ratios.apart_per_token if section.loss == "normalised" else ratios.apart
    right, flipped = -F.logsigmoid(beta * apart), -F.logsigmoid(-beta * apart)
    if section.loss == "robust":
        return ((1 - smoothing) * right - smoothing * flipped) / (1 - 2 * smoothing)
    return (1 - smoothing) * right + smoothing * flipped


def orpo(chosen: torch.Tensor, rejected: torch.Tensor, section: Orpo) -> torch.Tensor:
    """[P], from mean log-probabilities per token of both answers (arXiv 2403.07691, equations 3, 4, 6 and 7).

    -c - beta log sigmoid(log odds(c) - log odds(r)), with log odds(x) = x - log(1 - exp x).
    """
    odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return -chosen - section.beta * F.logsigmoid(odds)


def kto(ratios: torch.Tensor, good: torch.Tensor, z0: torch.Tensor | float, section: Kto) -> torch.Tensor:
    """[B], from log-ratios [B], labels [B] (bool) and the shift z0 in nats (arXiv 2402.01306, section 4.1).

    desirable_weight (1 - sigmoid(beta (ratio - z0))) of good answers, undesirable_weight (1 - sigmoid(beta (z0 -
    ratio))) of bad ones.
    """
    towards = torch.where(good, ratios - z0, z0 - ratios)
    weights = torch.where(good, section.desirable_weight, section.undesirable_weight)
    return weights * (1 - torch.sigmoid(section.beta * towards))


def shift(ratios: torch.Tensor) -> torch.Tensor:
    """z0, the estimate of KL(policy || reference): the mean log-ratio of answers to other prompts, at least 0."""
    return ratios.mean().clamp(min=0) if len(ratios) else ratios.new_zeros(())


def auc(rewards: torch.Tensor, good: torch.Tensor) -> float | None:
    """The chance that a good answer is rewarded above a bad one, a tie counting half (Mann-Whitney); None without both.

    `rewards` [B], `good` [B] bool.
    """
    ups, downs = int(good.sum()), int((~good).sum())
    if not ups or not downs:
        return None
    _, places, counts = torch.unique(rewards, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0)
    ranks = (ends - (counts - 1) / 2).double()  # ranks from 1; equal rewards share their mean
    return float((ranks[places][good].sum() - ups * (ups + 1) / 2) / (ups * downs))


def _log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp x) for x < 0, by whichever of two forms keeps its digits (Mächler 2012); finite as x nears 0."""
    x = x.clamp(max=-1e-6)
    return torch.where(x < -0.6931471805599453, torch.log1p(-torch.exp(x)), torch.log(-torch.expm1(x)))
