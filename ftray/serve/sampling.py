"""The next token of each sequence from its logits. Axes: N sequences, V vocabulary.

What most requests do not ask for costs nothing: greedy rows are one argmax, and penalties, cuts and scores are computed
for the rows that want them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ftray.serve.engine import Sampling, Scored

COLDEST = 1e-5
"""Below it the most likely token is taken: logits divided by less overflow."""


@dataclass
class Chooser:
    """How one sequence's tokens are chosen, and what that depends on: its own random numbers, and its own tokens."""

    sampling: Sampling
    prompt_ids: Sequence[int]
    eos_ids: frozenset[int]
    answer: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = torch.Generator()
        if self.sampling.seed is None:
            self.random.seed()
        else:
            self.random.manual_seed(self.sampling.seed % 2**63)

    @property
    def edits(self) -> bool:
        """Whether logits are changed before the choice."""
        s = self.sampling
        return bool(
            s.logit_bias
            or s.presence_penalty
            or s.frequency_penalty
            or s.repetition_penalty != 1.0
            or (len(self.answer) < s.min_new_tokens and self.eos_ids)
        )


def choose(logits_NV: torch.Tensor, choosers: Sequence[Chooser]) -> tuple[list[int], list[Scored | None]]:
    """One token for each row, and its scores where they are asked for. Logits are in any float type; fp32 inside."""
    logits = logits_NV.float()
    scored = [number for number, chooser in enumerate(choosers) if chooser.sampling.logprobs is not None]
    raw = torch.log_softmax(logits[scored], -1) if scored else None
    edited = [number for number, chooser in enumerate(choosers) if chooser.edits]
    if edited:
        logits = logits.clone() if logits is logits_NV else logits
        for number in edited:
            edit(logits[number], choosers[number])
    tokens = logits.argmax(-1).tolist()
    drawn = [number for number, chooser in enumerate(choosers) if chooser.sampling.temperature >= COLDEST]
    if drawn:
        for number, token in zip(drawn, _draw(logits[drawn], [choosers[number] for number in drawn]), strict=True):
            tokens[number] = token
    scores: list[Scored | None] = [None] * len(choosers)
    for place, number in enumerate(scored):
        scores[number] = _scored(raw[place], tokens[number], choosers[number].sampling.logprobs or 0)  # type: ignore[index]
    return tokens, scores


def edit(logits_V: torch.Tensor, chooser: Chooser) -> None:
    """Applies bias and penalties to one row, in place.

    Repetition (CTRL, arXiv 1909.05858, section 4.1): l > 0 becomes l / p, else l * p, over prompt and answer. Then
    OpenAI's: l - frequency * count - presence * [count > 0], over the answer.
    """
    s = chooser.sampling
    if s.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*chooser.prompt_ids, *chooser.answer}), device=logits_V.device)
        there = logits_V[seen]
        logits_V[seen] = torch.where(there > 0, there / s.repetition_penalty, there * s.repetition_penalty)
    if (s.presence_penalty or s.frequency_penalty) and chooser.answer:
        tokens, counts = torch.tensor(chooser.answer, device=logits_V.device).unique(return_counts=True)
        logits_V[tokens] -= s.presence_penalty + s.frequency_penalty * counts
    for token, bias in s.logit_bias.items():
        logits_V[token] += bias
    if len(chooser.answer) < s.min_new_tokens and chooser.eos_ids:
        logits_V[list(chooser.eos_ids)] = float("-inf")


def _draw(logits_NV: torch.Tensor, choosers: Sequence[Chooser]) -> list[int]:
    """Draws by inverting the cumulative distribution at a number of the sequence's own, so that what is beside a
    sequence does not change its answer."""
    settings = [chooser.sampling for chooser in choosers]
    device = logits_NV.device

    def column(values: list[Any]) -> torch.Tensor:
        return torch.tensor(values, device=device)[:, None]

    logits = logits_NV / column([s.temperature for s in settings])
    points = column([float(torch.rand((), generator=chooser.random)) for chooser in choosers])
    if all(s.top_p >= 1 and not s.top_k and not s.min_p for s in settings):
        cumulative = torch.softmax(logits, -1).cumsum(-1)
        return _at(cumulative, points).tolist()
    # Sorted, so that each cut keeps a first part of the row.
    probs, order = torch.softmax(logits, -1).sort(-1, descending=True)
    place_V = torch.arange(probs.shape[-1], device=device)
    before = probs.cumsum(-1) - probs
    keep = before < column([s.top_p for s in settings])
    keep &= place_V < column([s.top_k or probs.shape[-1] for s in settings])
    keep &= probs >= probs[:, :1] * column([s.min_p for s in settings])
    keep[:, 0] = True
    places = _at(probs.masked_fill(~keep, 0).cumsum(-1), points)
    return order.gather(1, places[:, None])[:, 0].tolist()


def _at(cumulative_NV: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """The first place whose cumulative weight exceeds its share of the total; [N]."""
    wanted = points * cumulative_NV[:, -1:]
    return torch.searchsorted(cumulative_NV, wanted, right=True)[:, 0].clamp_(max=cumulative_NV.shape[-1] - 1)


def _scored(logprobs_V: torch.Tensor, token: int, alternatives: int) -> Scored:
    top: tuple[tuple[int, float], ...] = ()
    if alternatives:
        values, ids = logprobs_V.topk(min(alternatives, logprobs_V.shape[-1]))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Scored(token, float(logprobs_V[token]), top)
