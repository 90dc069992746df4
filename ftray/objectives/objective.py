"""What a run asks of its objective: micro-batches of a window, their loss, and scores of held-out rows.

One class a family, one row each in OBJECTIVES. The loop above knows nothing of what an example is: it deals the
positions of a window by their lengths, and adds up and divides sums.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from ftray.config.schema import Method, Model
from ftray.data.encode import Question
from ftray.data.prepare import Prepared
from ftray.data.tokens import TokenStore
from ftray.models.generate import Given
from ftray.models.heads import Head
from ftray.models.load import load_base

Observe = Callable[[Any, Any], np.ndarray]  # (model, batch) -> [rows of the batch, figures]
Figures = Callable[[TokenStore, Observe], np.ndarray]  # -> [rows of the store, figures], in its order


@dataclass(frozen=True)
class Stage:
    """Where a worker trains. `policy`: the adapted model; `whole`: what is trained, the policy inside.

    `deal(lengths)`: positions of this worker's micro-batches; `synced`: a forward is a collective (ZeRO 3);
    `another_base()`: the base once more, frozen, whole on every worker; `worth(version)`: what a reward version of the
    registry gives texts, as ids.
    """

    policy: Any
    whole: Any
    tokenizer: Any
    seed: int
    synced: bool
    deal: Callable[[np.ndarray], Sequence[np.ndarray]]
    computing: Callable[[], AbstractContextManager]
    another_base: Callable[[], Any]
    beat: Callable[[], None] = lambda: None
    worth: Callable[[str], Callable[[Sequence[Sequence[int]]], np.ndarray]] | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, the model only computes: no gradients, no dropout."""
        was_training = self.whole.training, self.policy.training
        self.whole.eval()
        try:
            with torch.no_grad(), self.computing():
                yield
        finally:
            self.whole.train(was_training[0])
            self.policy.train(was_training[1])


class Objective(ABC):
    """`section`: the run file's; `packed`: the examples of a micro-batch share a row; `data`: what the run reads."""

    writes: ClassVar[bool] = True
    """Versions write text: held-out prompts are answered, and general text is scored to see what was forgotten."""

    rolls_out: ClassVar[bool] = False
    """Learns from answers that the model samples as it trains (objectives/reinforcement.py)."""
    updates: int = 1
    """Optimiser updates of a step."""
    answer_tokens: int | None = None
    """Most tokens of an answer to a held-out prompt; None: what the run says."""

    def __init__(self, section: Any, *, packed: bool, data: Prepared):
        self.section, self.packed, self.data = section, packed, data

    @classmethod
    def beside(cls, section: Any) -> Model | None:
        """Another model that every worker holds frozen beside the one that learns, e.g. a teacher."""
        return None

    @classmethod
    def head(cls, section: Any, labels: Sequence[str]) -> Head | None:
        """The head that the base reads under, for data with these labels; None where it writes."""
        return None

    def load(self, model: Model, **options: Any) -> Any:
        """The base, as `load_base` does it, with what this objective reads from it on top."""
        return load_base(model, head=self.head(self.section, self.data.labels), **options)

    def begin(self, model: Any, *, method: Method, stores: Sequence[TokenStore], figures: Figures) -> None:
        """Called once the model is built and before its weights change, be it by learning or by a checkpoint.

        `figures(store, observe)` is `observe(model, batch)` over every row of a store, computed once in a run;
        `stores` are those that the run will read.
        """
        return

    def before_update(self, model: Any, micros: Sequence[Any], *, count: int) -> None:
        """Called before each update with this worker's micro-batches of the window: what their loss shares."""
        return

    @classmethod
    def check(cls, section: Any, data: Prepared) -> None:
        """What must be so before any worker is placed. Raises ConfigError or DataError."""
        return

    def around(self, model: Any) -> tuple[Any, dict[str, torch.nn.Parameter]]:
        """What is trained: the adapted model, or a module around it, and by name what learns there beside it."""
        return model, {}

    def stand(self, stage: Stage) -> None:
        """Told once where the worker trains, before anything else is asked."""
        return

    def lessons(self, step: int, rows: np.ndarray) -> tuple[Any, list[np.ndarray]]:
        """What a step's window teaches: a store of examples with their `lengths`, and the places of each update."""
        return self.data.train, [rows]

    def judge(self, questions: Sequence[Question], given: Sequence[Given]) -> np.ndarray:
        """Of one that rolls out, what the scores of held-out rows are made of, from all answers to them."""
        raise NotImplementedError

    def right(self, observed: np.ndarray) -> list[bool | None]:
        """Of one that rolls out, whether answers that were judged are right; None where nothing says so."""
        raise NotImplementedError

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

    def noted(self) -> list[float]:
        """Sums for the log that this worker's updates of a step left; the same number of them on every worker."""
        return []

    def told(self, sums: Sequence[float]) -> dict[str, float]:
        """What the log says of a step beside its loss, from the sums of `noted` over all workers."""
        return {}

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps of the objective itself."""
        return {}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Puts back what `tensors` gave, from all that a checkpoint holds."""
        return

    def details(self, observed: np.ndarray) -> dict[str, Any]:
        """More than scores, as plain data for the report: figures of each label, say."""
        return {}


def joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Observations one after the other; of nothing, nothing."""
    return np.concatenate([np.atleast_2d(part) for part in parts]) if parts else np.zeros((0, 0))
