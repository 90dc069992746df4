"""Greedy answers to held-out questions, in batches, on whatever wraps the model while it trains.

The tokens are those of `model.generate(do_sample=False)` on each row alone. `generate` keeps finished rows to the end
and decides again about every setting at every step; this loop drops them and does only what greedy decoding needs.
Axes: B rows, T prompt tokens (left-padded), S tokens so far.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import PeftModel
from transformers import DynamicCache, PreTrainedModel

from ftray.models import virtual
from ftray.models.attention import NAME as PACKED_ATTENTION
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


class Asked(Protocol):
    """What is read of a `ftray.data` Question."""

    @property
    def prompt_ids(self) -> Sequence[int]: ...


def answer_questions(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Asked],
    *,
    max_new_tokens: int,
    batch_size: int | Literal["auto"] = "auto",
    synced: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """One greedy answer per question, in their order, without special tokens and outer white space.

    An answer ends before EOS or the template's end of turn, at `max_new_tokens`, or where the model has no more
    positions. `model` may be a PEFT model or wrapped (DDP, DeepSpeed). With `synced` (ZeRO-3: a forward is a
    collective) every rank must call this, even with no questions; ranks then make equally many forwards.
    `on_progress(answered, all)` is called as rows finish.
    """
    model = _unwrapped(model)
    answers = [""] * len(questions)
    done = 0
    with _answering(model):
        decoder = _Decoder(model, tokenizer, max_new_tokens=max_new_tokens, synced=synced)
        for row, ids in decoder.answer([list(question.prompt_ids) for question in questions], batch_size):
            answers[row] = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
            done += 1
            if on_progress:
                on_progress(done, len(questions))
        decoder.finish()
    return answers


class _Decoder:
    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, *, max_new_tokens: int, synced: bool):
        self.model = model
        self.synced = synced and dist.is_initialized()
        self.max_new_tokens = max_new_tokens
        self.device = next(model.parameters()).device
        self.stops = frozenset(stop_ids(model, tokenizer))
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(self.stops, default=0)
        self.config = model.config.get_text_config(decoder=True)
        self.virtual = virtual.count(model)
        self.positions = (getattr(self.config, "max_position_embeddings", None) or 1 << 30) - self.virtual
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        # virtual tokens are in the cache before the prompt; PEFT's own forward would put them there at every step
        self.forward = base if self.virtual else model
        self.accepts = frozenset(inspect.signature(base.forward).parameters)

    def answer(self, prompts: list[list[int]], batch_size: int | Literal["auto"]) -> Iterator[tuple[int, list[int]]]:
        """(row, new ids) as rows finish, longest prompts first: what does not fit in memory fails at once."""
        prompts = [ids or [self.pad] for ids in prompts]
        full = [row for row, ids in enumerate(prompts) if len(ids) >= self.positions]
        yield from ((row, []) for row in full)
        waiting = sorted(set(range(len(prompts))) - set(full), key=lambda row: -len(prompts[row]))
        while waiting:
            rows = self._rows_that_fit(len(prompts[waiting[0]])) if batch_size == "auto" else batch_size
            batch = waiting[:rows]
            answered: set[int] = set()
            fits = True
            try:
                for slot, ids in self._decode([prompts[row] for row in batch]):
                    answered.add(batch[slot])
                    yield batch[slot], ids
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

    def _decode(self, prompts: list[list[int]]) -> Iterator[tuple[int, list[int]]]:
        """(index into `prompts`, new ids) as rows finish."""
        lengths = [len(ids) for ids in prompts]
        limits = [min(self.max_new_tokens, self.positions - length) for length in lengths]
        new: list[list[int]] = [[] for _ in prompts]
        ids_BT, mask_BS = self._padded(prompts)
        places_B1 = torch.tensor(lengths, device=self.device)[:, None] - 1
        positions_BT = (places_B1 - torch.arange(ids_BT.shape[1] - 1, -1, -1, device=self.device)).clamp(min=0)
        size = ids_BT.shape[1]
        cache: Any = DynamicCache(config=self.config)
        if self.virtual:
            cache = virtual.cache(self.model, len(prompts))
            places_B1, positions_BT = places_B1 + self.virtual, positions_BT + self.virtual
            mask_BS = None if mask_BS is None else F.pad(mask_BS, (self.virtual, 0), value=1)
            size += self.virtual
        next_B = self._next(ids_BT, positions_BT, mask_BS, size, cache)
        alive: list[int | None] = list(range(len(prompts)))
        while True:
            for slot, token in enumerate(next_B.tolist()):
                row = alive[slot]
                if row is None:
                    continue
                if token not in self.stops:
                    new[row].append(token)
                if token in self.stops or len(new[row]) >= limits[row]:
                    alive[slot] = None
                    yield row, new[row]
            kept = [slot for slot, row in enumerate(alive) if row is not None]
            if not kept:
                return
            if len(kept) <= KEPT_SHARE * len(alive):
                kept_B = torch.tensor(kept, device=self.device)
                cache.reorder_cache(kept_B)
                next_B, places_B1 = next_B[kept_B], places_B1[kept_B]
                mask_BS = None if mask_BS is None else mask_BS[kept_B]
                alive = [alive[slot] for slot in kept]
            size += 1
            places_B1 = places_B1 + 1
            next_B = self._next(next_B[:, None], places_B1, mask_BS, size, cache)

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

    def _next(self, ids: torch.Tensor, positions: torch.Tensor, mask_BS: torch.Tensor | None, size: int, cache: Any):
        self._any_busy(True)
        inputs: dict[str, Any] = {"input_ids": ids, "past_key_values": cache, "use_cache": True}
        if mask_BS is not None:
            inputs["attention_mask"] = mask_BS[:, :size]
        if "position_ids" in self.accepts:
            inputs["position_ids"] = positions
        if "logits_to_keep" in self.accepts:
            inputs["logits_to_keep"] = 1
        return self.forward(**inputs).logits[:, -1].argmax(-1)

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
        inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        kept = 2 * layers * heads * head_dim * (self.virtual + prompt_length + self.max_new_tokens)
        passing = (3 * inner + 6 * config.hidden_size) * prompt_length
        width = torch.finfo(self.model.dtype).bits // 8
        if self.device.type == "cuda":
            room = GPU_SHARE * torch.cuda.mem_get_info(self.device)[0]
        else:
            room = CPU_BYTES
        return max(1, min(MAX_ROWS, int(room / (width * (kept + passing)))))


def _unwrapped(model: Any) -> Any:
    while not isinstance(model, PreTrainedModel | PeftModel):
        model = model.module
    return model


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
