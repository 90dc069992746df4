"""What a run asks of its objective: micro-batches of a window, their loss, and scores of held-out rows.

One class a family, one row each in OBJECTIVES. The loop above knows nothing of what an example is: it deals the
positions of a window by their lengths, and adds up and divides sums.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from ftray.config.schema import Model
from ftray.data.prepare import Prepared
from ftray.data.tokens import TokenStore
from ftray.models.heads import Head
from ftray.models.load import load_base


class Objective(ABC):
    """`section`: the run file's; `packed`: the examples of a micro-batch share a row; `data`: what the run reads."""

    writes: ClassVar[bool] = True
    """Versions write text: held-out prompts are answered, and general text is scored to see what was forgotten."""

    def __init__(self, section: Any, *, packed: bool, data: Prepared):
        self.section, self.packed, self.data = section, packed, data

    @classmethod
    def head(cls, section: Any, labels: Sequence[str]) -> Head | None:
        """The head that the base reads under, for data with these labels; None where it writes."""
        return None

    def load(self, model: Model, **options: Any) -> Any:
        """The base, as `load_base` does it, with what this objective reads from it on top."""
        return load_base(model, head=self.head(self.section, self.data.labels), **options)

    @abstractmethod
    def count(self, store: TokenStore, rows: np.ndarray) -> int:
        """What the loss sums of these rows are divided by, e.g. their trained tokens."""

    @abstractmethod
    def batch(self, store: TokenStore, rows: np.ndarray, *, spare: int) -> Any:
        """A micro-batch, with the `rows` it holds. Of no rows: one that trains nothing, in the shape of row `spare`,
        for a worker without an example, so that collectives stay in step."""

    @abstractmethod
    def loss_sum(self, model: Any, batch: Any) -> torch.Tensor:
        """The micro-batch's loss in fp32, as a sum: whoever calls divides by the count of the whole window."""

    @abstractmethod
    def observe(self, model: Any, batch: Any) -> np.ndarray:
        """What the scores of held-out rows are made of, float64 [observations, figures]. Without gradients."""

    @abstractmethod
    def scores(self, observed: np.ndarray) -> dict[str, float]:
        """Scores by the names of METRICS, from the observations of all workers, in any order; [0, figures] too."""

    def details(self, observed: np.ndarray) -> dict[str, Any]:
        """More than scores, as plain data for the report: figures of each label, say."""
        return {}


def joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Observations one after the other; of nothing, nothing."""
    return np.concatenate([np.atleast_2d(part) for part in parts]) if parts else np.zeros((0, 0))
