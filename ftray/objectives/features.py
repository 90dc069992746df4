"""Labels told from vectors that a frozen base gave: `method: {kind: feature}`.

The losses and scores are those of `Labels`; a batch holds vectors where it holds tokens. Whoever trains hands over the
vectors of the rows (`vectors`), which the base gave before (train/features.py).

Axes: B examples, D width of a vector, L labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ftray.config.schema import Method, Model
from ftray.data.labelled import SECOND, TARGET
from ftray.data.tokens import TokenStore
from ftray.models.features import FeatureHead, head_for
from ftray.objectives.labels import Labels
from ftray.objectives.objective import Figures
from ftray.store.vectors import keys_of, text_key


@dataclass(frozen=True)
class Vectors:
    """A vector for each row of each store, by the store's folder. Rows with equal texts share one."""

    table: torch.Tensor  # [texts, D]
    places: Mapping[Any, np.ndarray]  # folder -> [rows] int64

    def of(self, store: TokenStore) -> torch.Tensor:
        """[rows, D]"""
        return self.table[torch.from_numpy(self.places[store.folder])]


@dataclass(frozen=True)
class Batch:
    vectors: torch.Tensor  # [B, D]; one row with weight 0 where there is no example
    targets: torch.Tensor  # [B] the label or number, [B, L] 0 or 1 for each of several labels
    weight: float
    rows: tuple[int, ...]


class FeatureLabels(Labels):
    """Counts, losses and observations as `Labels`."""

    vectors: Vectors

    def load(self, model: Model, **options: Any) -> FeatureHead:
        return head_for(model, options["method"], self._head)

    def begin(self, model: Any, *, method: Method, stores: Sequence[TokenStore], figures: Figures) -> None:
        model.centre(self.vectors.of(self.data.train))

    def batch(self, store: TokenStore, rows: np.ndarray, *, spare: int) -> Batch:  # type: ignore[override]
        chosen = rows if len(rows) else np.array([spare])
        return Batch(
            vectors=self.vectors.table[torch.from_numpy(self.vectors.places[store.folder][chosen])],
            targets=torch.from_numpy(np.array(store.column(TARGET)[chosen])),
            weight=float(len(rows) > 0),
            rows=tuple(rows.tolist()),
        )

    def logits(self, model: Any, batch: Any) -> torch.Tensor:
        device = next(model.parameters()).device
        with torch.autocast(device.type, enabled=False):  # a head is small: it learns and computes in fp32
            return model(batch.vectors.to(device, non_blocking=True)).float()


def texts_of(stores: Sequence[TokenStore]) -> tuple[list[tuple[TokenStore, int]], np.ndarray, dict[Any, np.ndarray]]:
    """The different texts of some stores: where each stands first, their keys [texts, 16], and for each store the
    text of each row."""
    first: dict[bytes, int] = {}
    stands: list[tuple[TokenStore, int]] = []
    places: dict[Any, np.ndarray] = {}
    for store in stores:
        second = store.column(SECOND)
        found = np.zeros(len(store), np.int64)
        for row in range(len(store)):
            key = text_key(store.ids(row), int(second[row]))
            found[row] = first.setdefault(key, len(first))
            if found[row] == len(stands):
                stands.append((store, row))
        places[store.folder] = found
    return stands, keys_of(list(first)), places
