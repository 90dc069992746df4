"""Labels of texts, and numbers for them: classification and regression, over a base under a head that reads.

Axes: B examples, T tokens of the longest, L labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ftray.config.objectives import Classification
from ftray.data.labelled import SECOND, TARGET
from ftray.data.tokens import TokenStore
from ftray.models.adapt import unwrap
from ftray.models.heads import Head
from ftray.objectives import label_scores
from ftray.objectives.objective import Objective


@dataclass(frozen=True)
class Texts:
    """Texts padded on the right."""

    input_ids: torch.Tensor  # [B, T]; 0 where there is padding
    attention_mask: torch.Tensor  # [B, T]
    second: torch.Tensor  # [B] the token with which the second text begins; 0 where there is none


@dataclass(frozen=True)
class Batch:
    """A batch of no examples holds one text with weight 0, so that collectives stay in step."""

    texts: Texts
    targets: torch.Tensor  # [B] the label or number, [B, L] 0 or 1 for each of several labels
    weight: float
    rows: tuple[int, ...]


class Labels(Objective):
    """Counted in examples; observed: logits and the label [B, L + 1], logits and each label [B, 2 L], numbers [B, 2].

    The loss of an example, in nats: cross-entropy -log p(label) over the softmax; of several labels the mean over them
    of the binary cross-entropy; of a number the squared error. `class_weights: balanced` multiplies the first by
    n / (L n_c) for label c of n_c among n training rows, and in the second what a label's presence costs by
    (n - n_c) / n_c.
    """

    writes = False

    @classmethod
    def head(cls, section: Any, labels: Sequence[str]) -> Head:
        if not isinstance(section, Classification):
            return Head("SEQ_CLS", ("value",), "value")
        return Head("SEQ_CLS", tuple(labels), "each" if section.multi_label else "one")

    def count(self, store: TokenStore, rows: np.ndarray) -> int:
        return len(rows)

    def batch(self, store: TokenStore, rows: np.ndarray, *, spare: int) -> Batch:
        chosen = [int(row) for row in rows] or [spare]
        return Batch(
            texts=padded([store.ids(row) for row in chosen], store.column(SECOND)[chosen]),
            targets=torch.from_numpy(np.array(store.column(TARGET)[chosen])),
            weight=float(len(rows) > 0),
            rows=tuple(int(row) for row in rows),
        )

    def loss_sum(self, model: Any, batch: Batch) -> torch.Tensor:
        logits_BL = self.logits(model, batch)
        return batch.weight * losses(logits_BL, batch.targets, self._head.scoring, self._balance).sum()

    @torch.no_grad()
    def observe(self, model: Any, batch: Batch) -> np.ndarray:
        targets = batch.targets.reshape(len(batch.targets), -1).double()
        observed = torch.cat([self.logits(model, batch).double().cpu(), targets], 1).numpy()
        return observed[: len(batch.rows)]

    def logits(self, model: Any, batch: Any) -> torch.Tensor:
        """[B, L] in fp32."""
        return read(model, batch.texts)

    def scores(self, observed: np.ndarray) -> dict[str, float]:
        return label_scores.scores(observed, self._head.scoring)

    def details(self, observed: np.ndarray) -> dict[str, Any]:
        return label_scores.details(observed, self._head)

    @cached_property
    def _head(self) -> Head:
        return self.head(self.section, self.data.labels)

    @cached_property
    def _balance(self) -> torch.Tensor | None:
        """[L] weights; None where labels count as they come."""
        if getattr(self.section, "class_weights", "none") == "none":
            return None
        column = np.asarray(self.data.train.column(TARGET))
        number = len(column)
        if self._head.scoring == "each":
            counts = np.maximum(column.sum(0, dtype=np.float64), 1)
            return torch.from_numpy((number - counts).clip(1) / counts).float()
        counts = np.maximum(np.bincount(column, minlength=len(self.data.labels)), 1)
        return torch.from_numpy(number / (len(counts) * counts)).float()


def padded(ids: Sequence[np.ndarray], second: np.ndarray | None = None) -> Texts:
    input_ids = np.zeros((len(ids), max(map(len, ids))), np.int64)
    mask = np.zeros(input_ids.shape, np.int64)
    for b, text in enumerate(ids):
        input_ids[b, : len(text)], mask[b, : len(text)] = text, 1
    second = np.zeros(len(ids)) if second is None else second
    return Texts(torch.from_numpy(input_ids), torch.from_numpy(mask), torch.from_numpy(second.astype(np.int64)))


def read(model: Any, texts: Texts) -> torch.Tensor:
    """[B, L] what the head says of each text, in fp32."""
    device = next(model.parameters()).device
    more = {}
    if bool(texts.second.any()) and getattr(unwrap(model).config, "type_vocab_size", 0) > 1:
        positions_T = torch.arange(texts.input_ids.shape[1])
        in_second = (texts.second[:, None] > 0) & (positions_T >= texts.second[:, None])
        more["token_type_ids"] = (in_second & texts.attention_mask.bool()).long().to(device)
    mask = texts.attention_mask.to(device)
    # a causal base finds the text's end, and RoBERTa its positions, by this id and not by the mask
    padding = unwrap(model).config.get_text_config().pad_token_id or 0
    input_ids = texts.input_ids.to(device).masked_fill(mask == 0, padding)
    return model(input_ids=input_ids, attention_mask=mask, **more).logits.float()


def losses(
    logits_BL: torch.Tensor, targets: torch.Tensor, scoring: str, balance_L: torch.Tensor | None = None
) -> torch.Tensor:
    """[B] each example's loss."""
    targets = targets.to(logits_BL.device)
    balance_L = balance_L if balance_L is None else balance_L.to(logits_BL.device)
    if scoring == "value":
        return (logits_BL[:, 0] - targets.float()).square()
    if scoring == "each":
        each_BL = F.binary_cross_entropy_with_logits(logits_BL, targets.float(), pos_weight=balance_L, reduction="none")
        return each_BL.mean(1)
    nats_B = F.cross_entropy(logits_BL, targets.long(), reduction="none")
    return nats_B if balance_L is None else nats_B * balance_L[targets.long()]
