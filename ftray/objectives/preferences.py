"""Answers that are compared: dpo and orpo learn from pairs, kto from answers that are good or bad.

The implicit reward of an answer is beta times the log-ratio of the model to its reference, the untouched base. Where an
adapter learns, the base is the model with the adapter switched off, computed in the same step; where the base's own
weights change, it reads every row once, before they do. There is never a second model in memory.

Axes: S texts (of a pair two, chosen before rejected), N trained tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from ftray.config.methods import Method
from ftray.data.encode_preferences import halves
from ftray.data.tokens import TokenStore
from ftray.models.adapt import switches_off, unwrap
from ftray.objectives import language, preference_losses
from ftray.objectives.objective import Figures, Objective
from ftray.objectives.preference_losses import Ratios

Text = tuple[np.ndarray, np.ndarray]  # ids, trained
LOOK_FOR_OTHER_PROMPTS = 100  # rows looked at, for one whose answer was given to another prompt


@dataclass(frozen=True)
class Answers:
    """Texts of a micro-batch. `reference` [S]: their log-probabilities under the base, where it has read them."""

    text: language.Batch
    tokens: tuple[int, ...]  # trained ones of each text
    rows: tuple[int, ...]
    reference: torch.Tensor | None = None


@dataclass(frozen=True)
class Judged:
    """Answers, whether they are good, and the same prompts with answers to other prompts."""

    answers: Answers
    good: torch.Tensor  # bool [S]
    mismatched: Answers

    @property
    def rows(self) -> tuple[int, ...]:
        return self.answers.rows


def logprobs(model: Any, answers: Answers) -> torch.Tensor:
    """[S] nats, fp32: log p of each text's trained tokens after what comes before them."""
    logits_NV = language.trained_logits(model, answers.text).float()
    targets_N = answers.text.targets.to(logits_NV.device)
    logprobs_N = -F.cross_entropy(logits_NV, targets_N, reduction="none")
    if not answers.tokens:
        return logprobs_N.sum()[None][:0]  # of nothing, with a gradient for workers that stay in step
    return torch.stack([part.sum() for part in logprobs_N.split(answers.tokens)])


@contextmanager
def as_base(model: Any) -> Iterator[Any]:
    """Inside, the model without its adapter and without dropout; nothing learns."""
    adapted = unwrap(model)
    was_training = adapted.training
    adapted.eval()
    try:
        with torch.no_grad(), adapted.disable_adapter():
            yield adapted
    finally:
        adapted.train(was_training)


def collate(texts: Sequence[Text], rows: np.ndarray, *, packed: bool, spare: np.ndarray, reference=None) -> Answers:
    """Texts in one row or one row each; of none, one that trains nothing."""
    batch = language.collate(texts or [language.nothing(spare)], rows, packed=packed)
    tokens = tuple(int(np.count_nonzero(trained[1:])) for _, trained in texts)
    known = None if reference is None else torch.from_numpy(np.asarray(reference, np.float32).reshape(-1))
    return Answers(batch, tokens, tuple(int(row) for row in rows), known)


class Preferences(Objective):
    """Counted in examples. `kept`: log-probabilities under the base, [rows, texts of a row], by store."""

    has_reference: ClassVar[bool] = True

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.kept: dict[Path, np.ndarray] = {}

    def begin(self, model: Any, *, method: Method, stores: Sequence[TokenStore], figures: Figures) -> None:
        if self.has_reference and not switches_off(method):
            self.kept = {store.folder: figures(store, self._read) for store in stores}

    def count(self, store: TokenStore, rows: np.ndarray) -> int:
        return len(rows)

    @torch.no_grad()
    def _read(self, model: Any, batch: Any) -> np.ndarray:
        """[rows, texts of a row]: log-probabilities under the model as it is."""
        return _table(logprobs(model, batch), batch)

    def _kept(self, store: TokenStore, rows: np.ndarray) -> np.ndarray | None:
        return self.kept[store.folder][rows] if store.folder in self.kept else None

    def _found(self, model: Any, answers: Answers) -> tuple[torch.Tensor, torch.Tensor]:
        """[S] log-probabilities, and [S] how far they are above those of the base; nats."""
        reference = answers.reference
        if reference is None:
            with as_base(model) as base:
                reference = logprobs(base, answers)
        found = logprobs(model, answers)
        return found, found - reference.to(found.device)


class Pairs(Preferences):
    """Observed: (loss, 1 where the chosen answer has the higher reward, its reward above the other's) of each pair."""

    def batch(self, store: TokenStore, rows: np.ndarray, *, spare: int) -> Answers:
        texts = [text for row in rows for text in halves(store, int(row))]
        return collate(texts, rows, packed=self.packed, spare=store.ids(spare), reference=self._kept(store, rows))

    def loss_sum(self, model: Any, batch: Answers) -> torch.Tensor:
        return self._losses(model, batch)[0].sum()

    @torch.no_grad()
    def observe(self, model: Any, batch: Answers) -> np.ndarray:
        losses, margins = self._losses(model, batch)
        preferred = (margins.sign() + 1) / 2
        return torch.stack([losses, preferred, margins], 1).double().cpu().numpy()

    def scores(self, observed: np.ndarray) -> dict[str, float]:
        if not len(observed):
            return {}
        loss, accuracy, margin = observed.mean(0).tolist()
        return {"loss": loss, "reward_accuracy": accuracy, "reward_margin": margin}

    def _losses(self, model: Any, batch: Answers) -> tuple[torch.Tensor, torch.Tensor]:
        """[P] losses and [P] rewards of the chosen answers above those of the rejected ones."""
        raise NotImplementedError


class Dpo(Pairs):
    """dpo, in the forms of `objective.loss`."""

    def _losses(self, model: Any, batch: Answers) -> tuple[torch.Tensor, torch.Tensor]:
        found_S, ratios_S = self._found(model, batch)
        ratios_P2 = ratios_S.view(-1, 2)
        tokens_P2 = torch.tensor(batch.tokens, device=ratios_P2.device).view(-1, 2)
        ratios = Ratios(ratios_P2[:, 0], ratios_P2[:, 1], tokens_P2[:, 0], tokens_P2[:, 1])
        losses = preference_losses.dpo(ratios, self.section)
        if self.section.sft_weight:
            losses = losses - self.section.sft_weight * found_S.view(-1, 2)[:, 0] / tokens_P2[:, 0]
        return losses, self.section.beta * ratios.apart.detach()


class Orpo(Pairs):
    """orpo; without a reference, the reward is beta times the mean log-probability per token."""

    has_reference = False

    def _losses(self, model: Any, batch: Answers) -> tuple[torch.Tensor, torch.Tensor]:
        found_S = logprobs(model, batch)
        means_P2 = (found_S / torch.tensor(batch.tokens, device=found_S.device)).view(-1, 2)
        chosen, rejected = means_P2[:, 0], means_P2[:, 1]
        return preference_losses.orpo(chosen, rejected, self.section), self.section.beta * (chosen - rejected).detach()


class Kto(Preferences):
    """kto. Observed: (log-ratio, that of the mismatched answer, 1 where good) of each answer."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.shift: torch.Tensor | float = 0.0  # z0 of the window, the same on all workers
        self._partners: dict[Path, np.ndarray] = {}

    def batch(self, store: TokenStore, rows: np.ndarray, *, spare: int) -> Judged:
        if store.folder not in self._partners:
            self._partners[store.folder] = partners(store)
        own, other = [], []
        longest = int(store.lengths.max())
        for row in rows:
            own.append((store.ids(row), store.trained(row)))
            other.append(mismatched(store, int(row), int(self._partners[store.folder][row]), longest=longest))
        kept = self._kept(store, rows)
        references = (None, None) if kept is None else (kept[:, 0], kept[:, 1])
        answers, others = (
            collate(texts, rows, packed=self.packed, spare=store.ids(spare), reference=reference)
            for texts, reference in zip((own, other), references, strict=True)
        )
        good = torch.from_numpy(np.array(store.column("good")[rows], bool))
        return Judged(answers, good, others)

    def before_update(self, model: Any, micros: Sequence[Judged], *, count: int) -> None:
        """z0 from the whole window, over all workers: the mean log-ratio of its mismatched answers."""
        core = unwrap(model)
        was_training = core.training
        core.eval()
        with torch.no_grad():
            total = torch.stack([self._found(core, micro.mismatched)[1].sum() for micro in micros]).sum()
        core.train(was_training)
        if dist.is_initialized():
            dist.all_reduce(total)
        self.shift = (total / count).clamp(min=0)

    def loss_sum(self, model: Any, batch: Judged) -> torch.Tensor:
        _, ratios = self._found(model, batch.answers)
        return preference_losses.kto(ratios, batch.good.to(ratios.device), self.shift, self.section).sum()

    @torch.no_grad()
    def observe(self, model: Any, batch: Judged) -> np.ndarray:
        own, other = (self._found(model, answers)[1] for answers in (batch.answers, batch.mismatched))
        return torch.stack([own, other, batch.good.to(own)], 1).double().cpu().numpy()

    def scores(self, observed: np.ndarray) -> dict[str, float]:
        if not len(observed):
            return {}
        ratios, others, good = torch.from_numpy(observed).unbind(1)
        good = good.bool()
        losses = preference_losses.kto(ratios, good, preference_losses.shift(others), self.section)
        found = {"loss": losses.mean().item()}
        rewards = self.section.beta * ratios
        if (auc := preference_losses.auc(rewards, good)) is not None:
            found |= {"reward_margin": (rewards[good].mean() - rewards[~good].mean()).item(), "reward_auc": auc}
        return found

    @torch.no_grad()
    def _read(self, model: Any, batch: Judged) -> np.ndarray:
        parts = [_table(logprobs(model, answers), answers) for answers in (batch.answers, batch.mismatched)]
        return np.concatenate(parts, 1)


def partners(store: TokenStore) -> np.ndarray:
    """For each row one whose answer was given to another prompt, int64 [rows]: the same in every window and epoch.

    Rows stand in a ring, shuffled once, since files may be sorted; a row's partner is the one before it, or where that
    has the same prompt the next before.
    """
    ring = np.random.default_rng(0).permutation(len(store))
    prompts = [store.ids(row)[: _answer_from(store, row)].tobytes() for row in ring]
    found = np.zeros(len(store), np.int64)
    for place, row in enumerate(ring):
        back = range(1, min(len(ring), LOOK_FOR_OTHER_PROMPTS + 1))
        step = next((n for n in back if prompts[place - n] != prompts[place]), 1)
        found[row] = ring[place - step]
    return found


def mismatched(store: TokenStore, row: int, partner: int, *, longest: int) -> Text:
    """The prompt of one row with the answer of another, in at most `longest` tokens."""
    end, start = _answer_from(store, row), _answer_from(store, partner)
    ids = np.concatenate([store.ids(row)[:end], store.ids(partner)[start:]])
    trained = np.concatenate([np.zeros(end, bool), store.trained(partner)[start:]])
    return ids[:longest], trained[:longest]


def _answer_from(store: TokenStore, row: int) -> int:
    return int(np.argmax(store.trained(row)))


def _table(logprobs_S: torch.Tensor, answers: Answers) -> np.ndarray:
    """[rows, texts of a row]"""
    rows = len(answers.rows)
    return logprobs_S.double().cpu().numpy().reshape(rows, len(answers.tokens) // rows if rows else 0)
