"""Answers to questions, greedy or sampled, in batches, on whatever wraps the model while it trains.

Greedy tokens are those of `model.generate(do_sample=False)` on each row alone, which keeps finished rows to the end
and decides again about every setting at every step; this loop drops them and does only what decoding needs.
Axes: B rows, T prompt tokens (left-padded), S tokens so far, V vocabulary.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from ftray.models import virtual
from ftray.models.adapt import unwrap
from ftray.models.attention import NAME as PACKED_ATTENTION
from ftray.models.heads import inner
from ftray.models.load import cache_shape
from ftray.models.turns import stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

# 64 questions to a 5 M-parameter Llama on one core: 6.1 s with 8 rows at once, 4.1 with 16, 3.5 with 32, 3.1 with 64.
MAX_ROWS = 64
CPU_BYTES = 1 << 30
GPU_SHARE = 0.6
# Dropping rows copies the cache; below this share of live rows that costs less than carrying them.
KEPT_SHARE = 0.75


class Given(NamedTuple):
    """An answer: its ids, and the id that ended it, None where it was cut off."""

    ids: list[int]
    stop: int | None


Pick = Callable[[torch.Tensor, Sequence[int], int], torch.Tensor]
"""`(logits_BV, rows, at)` -> next_B: token number `at` of the answers to these rows."""


def greedy(logits_BV: torch.Tensor, rows: Sequence[int], at: int) -> torch.Tensor:
    return logits_BV.argmax(-1)


@dataclass(frozen=True)
class Sampler:
    """Draws each row's tokens by numbers of its own, so that an answer depends on no batch and no worker.

    `numbers_RS`: uniform in [0, 1), one a token of each row's answer. A number finds its token in the running sum of
    softmax(logits / temperature), cut to the smallest set of tokens that holds `top_p` of it (arXiv 1904.09751).
    """

    numbers_RS: np.ndarray
    temperature: float = 1.0
    top_p: float = 1.0

    def __call__(self, logits_BV: torch.Tensor, rows: Sequence[int], at: int) -> torch.Tensor:
        p_BV = (logits_BV.float() / self.temperature).softmax(-1)
        if self.top_p < 1:
            sorted_BV, order_BV = p_BV.sort(dim=-1, descending=True, stable=True)
            sorted_BV = sorted_BV.masked_fill(sorted_BV.cumsum(-1) - sorted_BV >= self.top_p, 0)
            p_BV = torch.zeros_like(p_BV).scatter(-1, order_BV, sorted_BV)
        total_BV = p_BV.double().cumsum(-1)
        numbers_B1 = torch.tensor(self.numbers_RS[list(rows), at], dtype=torch.float64, device=p_BV.device)[:, None]
        found_B1 = torch.searchsorted(total_BV, numbers_B1 * total_BV[:, -1:], right=True)
        return found_B1[:, 0].clamp(max=p_BV.shape[-1] - 1)


def text_of(tokenizer: PreTrainedTokenizerBase, given: Given) -> str:
    return str(tokenizer.decode(given.ids, skip_special_tokens=True)).strip()


def answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    pick: Pick = greedy,
    tasks: Sequence[str] = (),
    batch_size: int | Literal["auto"] = "auto",
    synced: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Given]:
    """One answer per prompt, in their order, each token chosen by `pick`, whose rows are places in `prompts`.

    An answer ends before EOS or the template's end of turn, at `max_new_tokens`, or where the model has no more
    positions. `tasks`: each prompt's, for a model that learns several. `model` may be a PEFT model or wrapped (DDP,
    DeepSpeed). With `synced` (ZeRO-3: a forward is a collective) every rank must call this, even with no prompts; ranks
    then make equally many forwards. `on_progress(answered, all)` is called as rows finish.
    """
    model = unwrap(model)
    answers = [Given([], None)] * len(prompts)
    done = 0
    with _answering(model):
        decoder = _Decoder(model, tokenizer, max_new_tokens=max_new_tokens, pick=pick, tasks=tasks, synced=synced)
        for row, given in decoder.answer([list(ids) for ids in prompts], batch_size):
            answers[row] = given
            done += 1
            if on_progress:
                on_progress(done, len(prompts))
        decoder.finish()
    return answers


class _Decoder:
    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_new_tokens: int,
        pick: Pick,
        tasks: Sequence[str],
        synced: bool,
    ):
        self.model, self.pick, self.tasks = model, pick, tasks
        self.synced = synced and dist.is_initialized()
        self.max_new_tokens = max_new_tokens
        self.device = next(model.parameters()).device
        self.stops = frozenset(stop_ids(model, tokenizer))
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(self.stops, default=0)
        self.config = model.config.get_text_config(decoder=True)
        self.virtual = virtual.count(model)
        self.positions = (getattr(self.config, "max_position_embeddings", None) or 1 << 30) - self.virtual
        base = inner(model)
        # virtual tokens are in the cache before the prompt; PEFT's own forward would put them there at every step
        self.forward = base if self.virtual else model
        self.accepts = frozenset(inspect.signature(base.forward).parameters)

    def answer(self, prompts: list[list[int]], batch_size: int | Literal["auto"]) -> Iterator[tuple[int, Given]]:
        """(row, its answer) as rows finish, longest prompts first: what does not fit in memory fails at once."""
        prompts = [ids or [self.pad] for ids in prompts]
        full = [row for row, ids in enumerate(prompts) if len(ids) >= self.positions]
        yield from ((row, Given([], None)) for row in full)
        waiting = sorted(set(range(len(prompts))) - set(full), key=lambda row: -len(prompts[row]))
        while waiting:
            rows = self._rows_that_fit(len(prompts[waiting[0]])) if batch_size == "auto" else batch_size
            batch = waiting[:rows]
            answered: set[int] = set()
            fits = True
            try:
                for row, given in self._decode([prompts[row] for row in batch], batch):
                    answered.add(row)
                    yield row, given
            except torch.OutOfMemoryError:
                # Under `synced` the other ranks are inside the same collective: they would hang if this one went on.
                if self.synced or len(batch) == 1:
                    raise
                fits = False
            if not fits:
                batch_size = len(batch) // 2
                log.warning("%d answers at once do not fit in memory; going on with %d", len(batch), batch_size)
                torch.cuda.empty_cache()
            waiting = [row for row in waiting if row not in answered]

    def finish(self) -> None:
        """Takes part in the other ranks' forwards until none has a question left."""
        idle_11 = torch.full((1, 1), self.pad, device=self.device)
        while self._any_busy(False):
            self.model(input_ids=idle_11, use_cache=False)

    def _decode(self, prompts: list[list[int]], rows: list[int]) -> Iterator[tuple[int, Given]]:
        """(row, its answer) as rows finish; `rows` are the prompts' own, in step with them."""
        from transformers import DynamicCache

        lengths = [len(ids) for ids in prompts]
        limits = [min(self.max_new_tokens, self.positions - length) for length in lengths]
        new: list[list[int]] = [[] for _ in prompts]
        ids_BT, mask_BS = self._padded(prompts)
        places_B1 = torch.tensor(lengths, device=self.device)[:, None] - 1
        positions_BT = (places_B1 - torch.arange(ids_BT.shape[1] - 1, -1, -1, device=self.device)).clamp(min=0)
        size = ids_BT.shape[1]
        cache: Any = DynamicCache(config=self.config)
        if self.virtual:
            with virtual.of_tasks(self.model, [self.tasks[row] for row in rows] if self.tasks else []):
                cache = virtual.cache(self.model, len(prompts))
            places_B1, positions_BT = places_B1 + self.virtual, positions_BT + self.virtual
            mask_BS = None if mask_BS is None else F.pad(mask_BS, (self.virtual, 0), value=1)
            size += self.virtual
        next_B = self.pick(self._logits(ids_BT, positions_BT, mask_BS, size, cache), rows, 0)
        alive: list[int | None] = list(range(len(prompts)))
        held = list(rows)  # by slot, finished ones too
        at = 0
        while True:
            for slot, token in enumerate(next_B.tolist()):
                row = alive[slot]
                if row is None:
                    continue
                stopped = token in self.stops
                if not stopped:
                    new[row].append(token)
                if stopped or len(new[row]) >= limits[row]:
                    alive[slot] = None
                    yield rows[row], Given(new[row], token if stopped else None)
            kept = [slot for slot, row in enumerate(alive) if row is not None]
            if not kept:
                return
            if len(kept) <= KEPT_SHARE * len(alive):
                kept_B = torch.tensor(kept, device=self.device)
                cache.reorder_cache(kept_B)
                next_B, places_B1 = next_B[kept_B], places_B1[kept_B]
                mask_BS = None if mask_BS is None else mask_BS[kept_B]
                alive, held = [alive[slot] for slot in kept], [held[slot] for slot in kept]
            size += 1
            at += 1
            places_B1 = places_B1 + 1
            next_B = self.pick(self._logits(next_B[:, None], places_B1, mask_BS, size, cache), held, at)

    def _padded(self, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """ids_BT, and the mask with room for every new token, or None where no row is padded."""
        longest = max(map(len, prompts))
        gaps = [longest - len(ids) for ids in prompts]
        padded = [[self.pad] * gap + ids for gap, ids in zip(gaps, prompts, strict=True)]
        ids_BT = torch.tensor(padded, device=self.device)
        if not any(gaps):
            return ids_BT, None
        places = torch.arange(longest + self.max_new_tokens, device=self.device)
        return ids_BT, (places >= torch.tensor(gaps, device=self.device)[:, None]).long()

    def _logits(self, ids: torch.Tensor, positions: torch.Tensor, mask_BS: torch.Tensor | None, size: int, cache: Any):
        self._any_busy(True)
        inputs: dict[str, Any] = {"input_ids": ids, "past_key_values": cache, "use_cache": True}
        if mask_BS is not None:
            inputs["attention_mask"] = mask_BS[:, :size]
        if "position_ids" in self.accepts:
            inputs["position_ids"] = positions
        if "logits_to_keep" in self.accepts:
            inputs["logits_to_keep"] = 1
        return self.forward(**inputs).logits[:, -1]

    def _any_busy(self, busy: bool) -> bool:
        """Whether any rank is about to do a forward; asked by every rank before each, so that all do equally many."""
        if not self.synced:
            return busy
        count = torch.tensor(int(busy), device=self.device)
        dist.all_reduce(count)
        return bool(count.item())

    def _rows_that_fit(self, prompt_length: int) -> int:
        """By the cache, and by what one layer holds while it reads the prompts: about 3 x intermediate + 6 x hidden."""
        config = self.config
        layers, heads, head_dim = cache_shape(config)
        between = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        kept = 2 * layers * heads * head_dim * (self.virtual + prompt_length + self.max_new_tokens)
        passing = (3 * between + 6 * config.hidden_size) * prompt_length
        width = torch.finfo(self.model.dtype).bits // 8
        if self.device.type == "cuda":
            room = GPU_SHARE * torch.cuda.mem_get_info(self.device)[0]
        else:
            room = CPU_BYTES
        return max(1, min(MAX_ROWS, int(room / (width * (kept + passing)))))


@contextmanager
def _answering(model: Any) -> Iterator[None]:
    """No gradients, no dropout, and an attention that knows padding; all put back at the end."""
    was_training, attention = model.training, model.config._attn_implementation
    packed_only = attention == PACKED_ATTENTION
    model.eval()
    if packed_only:
        model.set_attn_implementation("sdpa")
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
        if packed_only:
            model.set_attn_implementation(attention)
