"""Language modelling: the next token's negative log-likelihood, on the tokens a row trains. Serves sft and pretrain.

Axes: B examples, T tokens of a packed row or of the longest example, N trained tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ftray.data.tokens import TokenStore
from ftray.models import virtual
from ftray.models.adapt import unwrap
from ftray.objectives.objective import Objective


@dataclass(frozen=True)
class Batch:
    """A micro-batch. Packed: one row holds all examples, `lengths` says where each ends. Padded: one row an example.

    Padding needs no attention mask: it stands on the right, where causal attention never looks, and is not trained.
    """

    input_ids: torch.Tensor  # [1, T] packed, [B, T] padded
    predicts: torch.Tensor  # bool, like input_ids: the position's next token is trained
    targets: torch.Tensor  # [N] the tokens to predict, in the order of `predicts`
    position_ids: torch.Tensor | None  # packed: restart at every example; padded: None
    lengths: tuple[int, ...]
    rows: tuple[int, ...]  # indices into the token store, to name rows in errors


class Language(Objective):
    """sft and pretrain. Counted in trained tokens; observed: (nats, right first choices, tokens) of each batch."""

    def count(self, store: TokenStore, rows: np.ndarray) -> int:
        return int(store.trained_counts[rows].sum())

    def batch(self, store: TokenStore, rows: np.ndarray, *, spare: int) -> Batch:
        examples = [(store.ids(i), store.trained(i)) for i in rows]
        return collate(examples or [nothing(store.ids(spare))], rows, packed=self.packed)

    def loss_sum(self, model, batch: Batch) -> torch.Tensor:
        return loss_sum(model, batch, label_smoothing=getattr(self.section, "label_smoothing", 0.0))

    def observe(self, model, batch: Batch) -> np.ndarray:
        return observe(model, batch)

    def scores(self, observed: np.ndarray) -> dict[str, float]:
        return scores(observed)

    def nats(self, logits_NV: torch.Tensor, batch: Batch) -> torch.Tensor:
        """`loss_sum` of logits that are there already."""
        return _nats(logits_NV, batch, label_smoothing=getattr(self.section, "label_smoothing", 0.0))


def collate(examples: Sequence[tuple[np.ndarray, np.ndarray]], rows: Iterable[int], *, packed: bool) -> Batch:
    """A micro-batch of (ids, trained) pairs, in one row or one row each."""
    ids, trained = [x for x, _ in examples], [t for _, t in examples]
    return pack(ids, trained, rows) if packed else pad(ids, trained, rows, pad_id=0)


def nothing(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two tokens that train nothing: what a worker without an example computes."""
    return ids[:2], np.zeros(len(ids[:2]), bool)


def pack(ids: Sequence[np.ndarray], trained: Sequence[np.ndarray], rows: Iterable[int]) -> Batch:
    """Lay examples one after the other in one row; positions restart, so nothing is spent on padding."""
    lengths = [len(x) for x in ids]
    return Batch(
        input_ids=_long(np.concatenate(ids))[None],
        predicts=torch.from_numpy(np.concatenate([_shift(t) for t in trained]))[None],
        targets=_targets(ids, trained),
        position_ids=_long(np.concatenate([np.arange(n) for n in lengths]))[None],
        lengths=tuple(lengths),
        rows=tuple(int(r) for r in rows),
    )


def pad(ids: Sequence[np.ndarray], trained: Sequence[np.ndarray], rows: Iterable[int], *, pad_id: int) -> Batch:
    """One example a row, padded on the right to the longest."""
    lengths = [len(x) for x in ids]
    shape = (len(ids), max(lengths))
    input_ids, predicts = np.full(shape, pad_id, np.int64), np.zeros(shape, bool)
    for b, (x, t) in enumerate(zip(ids, trained, strict=True)):
        input_ids[b, : len(x)], predicts[b, : len(x)] = x, _shift(t)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        predicts=torch.from_numpy(predicts),
        targets=_targets(ids, trained),
        position_ids=None,
        lengths=tuple(lengths),
        rows=tuple(int(r) for r in rows),
    )


def trained_logits(model, batch: Batch) -> torch.Tensor:
    """Logits [N, V] at the positions whose next token is trained; the others are never computed."""
    return trained_outputs(model, batch).logits


def trained_outputs(model, batch: Batch) -> Any:
    """All that the model gives at those positions."""
    device = next(model.parameters()).device
    packed = {}
    if batch.position_ids is not None:
        ends = torch.tensor([0, *np.cumsum(batch.lengths)], dtype=torch.int32, device=device)
        longest = max(batch.lengths)
        packed = {
            "position_ids": batch.position_ids.to(device),
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": longest,
            "max_length_k": longest,
        }
    predicts = batch.predicts.to(device)
    if before := virtual.embedded(unwrap(model)):
        assert batch.position_ids is None, "packed examples have no room for virtual tokens"
        predicts = F.pad(predicts, (before, 0), value=False)
    return model(
        input_ids=batch.input_ids.to(device), attention_mask=None, use_cache=False, logits_to_keep=predicts, **packed
    )


def loss_sum(model, batch: Batch, *, label_smoothing: float = 0.0) -> torch.Tensor:
    """Summed negative log-likelihood of the trained tokens, in nats, fp32: -sum_n log p(target_n | what came before).

    A sum, not a mean: the caller divides by the trained tokens of the whole window over all workers.
    """
    return _nats(trained_logits(model, batch), batch, label_smoothing=label_smoothing)


def _nats(logits_NV: torch.Tensor, batch: Batch, *, label_smoothing: float) -> torch.Tensor:
    logits_NV = logits_NV.float()
    targets_N = batch.targets.to(logits_NV.device)
    return F.cross_entropy(logits_NV, targets_N, reduction="sum", label_smoothing=label_smoothing)


def stacked(batches: Sequence[Batch]) -> Batch:
    """Batches one after the other, as one; padded ones to the longest of all. Positions that are trained keep order."""
    one = batches[0]
    joined: dict[str, Any] = {
        "targets": torch.cat([batch.targets for batch in batches]),
        "lengths": tuple(length for batch in batches for length in batch.lengths),
        "rows": tuple(row for batch in batches for row in batch.rows),
    }
    if one.position_ids is not None:
        for name in ("input_ids", "predicts", "position_ids"):
            joined[name] = torch.cat([getattr(batch, name) for batch in batches], 1)
        return Batch(**joined)
    width = max(batch.input_ids.shape[1] for batch in batches)
    for name in ("input_ids", "predicts"):
        joined[name] = torch.cat([F.pad(getattr(b, name), (0, width - b.input_ids.shape[1])) for b in batches])
    return Batch(position_ids=None, **joined)


@torch.no_grad()
def observe(model, batch: Batch) -> np.ndarray:
    """[1, 3]: nats, greedy hits and trained tokens of one micro-batch."""
    return tally(trained_logits(model, batch).float(), batch)


def tally(logits_NV: torch.Tensor, batch: Batch) -> np.ndarray:
    """The same of logits that are there already, fp32."""
    targets_N = batch.targets.to(logits_NV.device)
    nats = F.cross_entropy(logits_NV, targets_N, reduction="sum").item()
    return np.array([[nats, int((logits_NV.argmax(-1) == targets_N).sum()), len(targets_N)]], np.float64)


def scores(observed: np.ndarray) -> dict[str, float]:
    """Nats per token and the share of right first choices; sums are divided once, so long rows weigh more."""
    nats, correct, tokens = observed.sum(0) if len(observed) else (0.0, 0.0, 0.0)
    return {"loss": nats / tokens, "token_accuracy": correct / tokens} if tokens else {}


def _shift(trained: np.ndarray) -> np.ndarray:
    """Position t predicts t + 1: move the mask one to the left; an example's last position predicts nothing."""
    return np.append(np.asarray(trained[1:], bool), False)


def _targets(ids: Sequence[np.ndarray], trained: Sequence[np.ndarray]) -> torch.Tensor:
    return _long(np.concatenate([x[1:][np.asarray(t[1:], bool)] for x, t in zip(ids, trained, strict=True)]))


def _long(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.int64))
