"""What answers are worth to a reward model, and how far they are from the base."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ftray.data.encode import Question
from ftray.models.generate import Given
from ftray.objectives import labels, language, policy_losses


class Worth:
    """A reward model that scores texts as ids. `tokens`: about so many are read at once, padding among them."""

    def __init__(self, model: Any, *, dtype: torch.dtype, tokens: int, beat: Callable[[], None] = lambda: None):
        self.model, self.dtype, self.tokens, self.beat = model, dtype, tokens, beat

    @torch.no_grad()
    def __call__(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """[texts] float64."""
        found = np.zeros(len(texts))
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, dtype=self.dtype, enabled=self.dtype != torch.float32):
            for places in _hands([len(text) for text in texts], self.tokens):
                read = labels.read(self.model, labels.padded([np.asarray(texts[place]) for place in places]))
                found[places] = read[:, 0].double().cpu().numpy()
                self.beat()
        return found


def ids_of(question_ids: Sequence[int], given: Given) -> list[int]:
    """A prompt with its answer, and the token that ended it, if one did."""
    return [*question_ids, *given.ids, *([] if given.stop is None else [given.stop])]


@torch.no_grad()
def kl_to_base(
    model: Any, questions: Sequence[Question], given: Sequence[Given], *, beat: Callable[[], None] = lambda: None
) -> list[float]:
    """KL(policy || base) in nats, summed over each answer's tokens; the base is the model with its adapter off."""
    found = []
    for question, one in zip(questions, given, strict=True):
        ids = np.array(ids_of(question.prompt_ids, one), np.int64)
        trained = np.arange(len(ids)) >= len(question.prompt_ids)
        batch = language.collate([(ids, trained)], np.array([0]), packed=False)
        here_NV = language.trained_outputs(model, batch).logits
        with model.disable_adapter():
            there_NV = language.trained_outputs(model, batch).logits
        found.append(float(policy_losses.full_kl(here_NV, there_NV).sum()))
        beat()
    return found


def _hands(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Places of texts that are read together: neighbours in length, the longest first."""
    hand: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if hand and lengths[hand[0]] * (len(hand) + 1) > tokens:
            yield hand
            hand = []
        hand.append(place)
    if hand:
        yield hand
