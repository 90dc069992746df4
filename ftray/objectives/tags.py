"""A tag for each word: token classification, over a base under a head that reads every token.

Axes: B examples, T tokens of the longest, N trained tokens (the first of each word) of all of them, L labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ftray.data.tagged import TAG
from ftray.data.tokens import TokenStore
from ftray.models import virtual
from ftray.models.adapt import unwrap
from ftray.models.heads import Head
from ftray.objectives import tag_scores
from ftray.objectives.objective import Objective


@dataclass(frozen=True)
class Batch:
    """Examples padded on the right. A batch of none holds one text with weight 0, so that collectives stay in step."""

    input_ids: torch.Tensor  # [B, T]; 0 where there is padding
    attention_mask: torch.Tensor  # [B, T]
    trained: torch.Tensor  # [B, T] bool
    targets: torch.Tensor  # [N] tags
    weight: float
    rows: tuple[int, ...]


class Tags(Objective):
    """Counted in words, each by its first token; observed: figures of each text (tag_scores.figures).

    The loss of a word, in nats: cross-entropy -log p(tag) over the softmax of its first token.
    """

    writes = False

    @classmethod
    def head(cls, section: Any, labels: Sequence[str]) -> Head:
        return Head("TOKEN_CLS", tuple(labels))

    def count(self, store: TokenStore, rows: np.ndarray) -> int:
        return int(store.trained_counts[rows].sum())

    def batch(self, store: TokenStore, rows: np.ndarray, *, spare: int) -> Batch:
        chosen = [int(row) for row in rows] or [spare]
        ids = [store.ids(row) for row in chosen]
        input_ids = np.zeros((len(ids), max(map(len, ids))), np.int64)
        mask, trained = np.zeros(input_ids.shape, np.int64), np.zeros(input_ids.shape, np.bool_)
        for b, (row, example) in enumerate(zip(chosen, ids, strict=True)):
            input_ids[b, : len(example)], mask[b, : len(example)] = example, 1
            trained[b, : len(example)] = store.trained(row)
        targets = np.concatenate([store.stream_of(TAG, row) for row in chosen]).astype(np.int64)
        return Batch(
            input_ids=torch.from_numpy(input_ids),
            attention_mask=torch.from_numpy(mask),
            trained=torch.from_numpy(trained),
            targets=torch.from_numpy(targets),
            weight=float(len(rows) > 0),
            rows=tuple(int(row) for row in rows),
        )

    def loss_sum(self, model: Any, batch: Batch) -> torch.Tensor:
        logits_NL = logits(model, batch)
        return batch.weight * F.cross_entropy(logits_NL, batch.targets.to(logits_NL.device), reduction="sum")

    @torch.no_grad()
    def observe(self, model: Any, batch: Batch) -> np.ndarray:
        logits_NL = logits(model, batch).double().cpu().numpy()
        ends = np.cumsum(batch.trained.sum(1).numpy())
        texts = zip(batch.rows, np.split(logits_NL, ends), np.split(batch.targets.numpy(), ends), strict=False)
        found = [tag_scores.figures(text_NL, right_N, self._labels) for _, text_NL, right_N in texts]
        return np.stack(found) if found else np.zeros((0, 0))

    def scores(self, observed: np.ndarray) -> dict[str, float]:
        return tag_scores.scores(observed, self._labels)

    def details(self, observed: np.ndarray) -> dict[str, Any]:
        return tag_scores.details(observed, self._labels)

    @cached_property
    def _labels(self) -> tuple[str, ...]:
        return tuple(self.data.labels)


def logits(model: Any, batch: Batch) -> torch.Tensor:
    """[N, L] in fp32, of the trained tokens."""
    inner = unwrap(model)
    device = next(model.parameters()).device
    mask = batch.attention_mask.to(device)
    # RoBERTa finds its positions by this id and not by the mask
    padding = inner.config.get_text_config().pad_token_id or 0
    input_ids = batch.input_ids.to(device).masked_fill(mask == 0, padding)
    logits_BTL = model(input_ids=input_ids, attention_mask=mask).logits
    return logits_BTL[:, virtual.embedded(inner) :][batch.trained.to(device)].float()
