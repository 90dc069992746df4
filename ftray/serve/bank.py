"""The bank: A and B of many LoRA versions stacked in slots, so that one batch serves all of them and the base.

For a token x of the version in slot s, a layer gives y = W x + B_s A_s x (LoRA, arXiv 2106.09685). Axes: S slots, r the
bank's rank, N tokens of a step, m tokens a slot, I inputs and O outputs of a layer.

How tokens meet their slot decides the speed (S-LoRA, arXiv 2311.03285; Punica, arXiv 2310.18547). Here the tokens of a
step are sorted by slot. Slots with a few tokens go through two batched products, [S, m, I] x [S, I, r] x [S, r, O],
over a range of slots as they lie in the bank; a slot with many goes through two plain products of its own. On one
core, 32 tokens over 8 slots of rank 16, I = O = 512: 11 + 12 us, where a product over all slots with a mask took
49 + 48 us, and gathering A and B for each token 3 to 6 times as long.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ftray.errors import AdapterError
from ftray.models.load import linear_modules, linear_shape
from ftray.serve import native
from ftray.serve.lora_files import LoraLayer
from ftray.serve.native import Native

MANY = 48
"""From so many tokens on, a slot has products of its own."""
RANK_STEP = 8


@dataclass(frozen=True)
class Shared:
    """Slots `low`..`high`, `each` tokens for each slot. `tokens` [(high - low) * each]: which tokens, padded with any;
    None: they are the step's tokens `begin`.. as they lie. `real`: the places that are no padding; None: all."""

    low: int
    high: int
    each: int
    begin: int
    tokens: Any = None
    real: Any = None
    targets: Any = None


@dataclass(frozen=True)
class Alone:
    """Tokens `begin`..`end` of the step, all of one slot."""

    slot: int
    begin: int
    end: int


class Mix:
    """How the tokens of one step are spread over the slots; made once, used by every layer."""

    def __init__(
        self,
        counts: Mapping[int, int],
        pieces: Sequence[tuple[int, int, int]] = (),
        *,
        rank: int,
        device: Any = "cpu",
        native: Native | None = None,
        ranks: Any = None,
        room: Any = None,
    ):
        """`counts`: tokens by slot, ascending, as they lie in the step from its first token on. `pieces`: further
        (slot, begin, end) of the step's tokens, each of one slot. `rank`: the largest of all slots."""
        self.rank = rank
        self.native, self.ranks, self.room, self.segments = native, ranks, room, None
        begin = 0
        begins: dict[int, int] = {}
        self.alone: list[Alone] = [Alone(*piece) for piece in pieces]
        few: dict[int, int] = {}
        for slot, count in counts.items():
            begins[slot] = begin
            if count >= MANY:
                self.alone.append(Alone(slot, begin, begin + count))
            elif count:
                few[slot] = count
            begin += count
        self.shared: list[Shared] = []
        if native is None:
            self.shared = [_shared(group, few, begins, device) for group in _ranges(sorted(few))]
        elif few:
            self.segments = torch.tensor([(slot, begins[slot], begins[slot] + few[slot]) for slot in few])


def _ranges(slots: Sequence[int]) -> list[list[int]]:
    """Slots in groups that lie close together: at most half of a group's range is empty."""
    groups: list[list[int]] = []
    for slot in slots:
        if groups and slot - groups[-1][0] < 2 * (len(groups[-1]) + 1):
            groups[-1].append(slot)
        else:
            groups.append([slot])
    return groups


def _shared(group: list[int], counts: Mapping[int, int], begins: Mapping[int, int], device: Any) -> Shared:
    low, high = group[0], group[-1] + 1
    each = max(counts[slot] for slot in group)
    begin = begins[low]
    aligned = all(counts.get(slot) == each and begins[slot] == begin + (slot - low) * each for slot in range(low, high))
    if aligned:
        return Shared(low, high, each, begin)
    places: list[int] = []
    real: list[int] = []
    targets: list[int] = []
    for slot in range(low, high):
        for number in range(each):
            there = slot in group and number < counts[slot]
            if there:
                real.append(len(places))
                targets.append(begins[slot] + number)
            places.append(begins[slot] + number if there else begin)
    tensors = (torch.tensor(values, device=device) for values in (places, real, targets))
    return Shared(low, high, each, begin, *tensors)


class BankLinear(torch.nn.Module):
    """A linear layer of the base with its part of the bank. Without a mix it is the base's layer."""

    def __init__(self, base: torch.nn.Module, bank: Bank, inputs: int, outputs: int):
        super().__init__()
        self.base, self.bank = base, bank
        self.inputs, self.outputs = inputs, outputs
        self.halves = (
            torch.zeros(bank.slots, 0, inputs, dtype=bank.dtype, device=bank.device),
            torch.zeros(bank.slots, 0, outputs, dtype=bank.dtype, device=bank.device),
        )
        """A [S, r, I] and B [S, r, O]; replaced together when the bank grows."""
        self.together: Together | None = Together([self])
        """None where the base's layer is a part of several, which add the bank's update themselves."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        if self.together is not None and self.bank.mix is not None:
            self.together.add(y[0], x[0], self.bank.mix)
        return y


class Together:
    """Layers of the bank over the same input, whose outputs lie beside each other."""

    def __init__(self, layers: Sequence[BankLinear]):
        self.layers = layers
        self._known: tuple[Any, Any] = (None, None)

    def add(self, y_NO: torch.Tensor, x_NI: torch.Tensor, mix: Mix) -> None:
        """y += B_s A_s x for each token's slot s, in place."""
        if mix.segments is not None:
            assert mix.native is not None
            layout = self._layout()
            rank = self.layers[0].halves[0].shape[1]
            mix.native.lora(y_NO, x_NI, layout=layout, rank=rank, ranks=mix.ranks, segments=mix.segments, room=mix.room)
        if mix.shared or mix.alone:
            begin = 0
            for layer in self.layers:
                add(y_NO[:, begin : begin + layer.outputs], x_NI, mix, *layer.halves)
                begin += layer.outputs

    def _layout(self) -> torch.Tensor:
        """See native.Native.lora; the same until the bank grows."""
        halves = [layer.halves for layer in self.layers]
        known, layout = self._known
        if known is None or any(one is not other for one, other in zip(known, halves, strict=True)):
            rows, begin = [], 0
            for layer, (a, b) in zip(self.layers, halves, strict=True):
                rows.append((a.data_ptr(), b.data_ptr(), begin, layer.outputs))
                begin += layer.outputs
            layout = torch.tensor(rows)
            self._known = (halves, layout)
        return layout


def add(y_NO: torch.Tensor, x_NI: torch.Tensor, mix: Mix, a_SrI: torch.Tensor, b_SrO: torch.Tensor) -> None:
    """y += B_s A_s x for the slots that go through torch's products, in place."""
    rank = mix.rank
    for part in mix.shared:
        a, b = a_SrI[part.low : part.high, :rank], b_SrO[part.low : part.high, :rank]
        size = (part.high - part.low) * part.each
        x = x_NI[part.begin : part.begin + size] if part.tokens is None else x_NI.index_select(0, part.tokens)
        inner = torch.bmm(x.view(part.high - part.low, part.each, -1), a.transpose(1, 2))
        if part.tokens is None:
            y_NO[part.begin : part.begin + size].add_(torch.bmm(inner, b).view(size, -1))
        else:
            update = torch.bmm(inner, b).view(size, -1)
            y_NO.index_add_(0, part.targets, update.index_select(0, part.real))
    for one in mix.alone:
        inner = x_NI[one.begin : one.end] @ a_SrI[one.slot, :rank].t()
        y_NO[one.begin : one.end].addmm_(inner, b_SrO[one.slot, :rank])


class Bank:
    """The slots of one model's bank. Loading copies into a free slot, beside the thread that generates."""

    def __init__(self, model: Any, *, slots: int, max_rank: int, dtype: Any, device: Any):
        self.slots, self.max_rank = slots, max_rank
        self.dtype, self.device = dtype, device
        self.rank = 0
        """The largest rank loaded, to which the others are padded."""
        self.mix: Mix | None = None
        """Of the step that is being computed; only the generating thread sets it."""
        self._lock = threading.Lock()
        self._slot_of: dict[str, int] = {}
        self._ranks: dict[str, int] = {}
        usable = torch.device(device).type == "cpu" and dtype in native.NAMES and torch.get_num_threads() == 1
        self.native = native.load() if usable else None
        self._slot_ranks = torch.zeros(slots, dtype=torch.long)
        self.layers: dict[str, BankLinear] = {}
        for name, module in linear_modules(model).items():
            inputs, outputs = linear_shape(module)
            parent, _, leaf = name.rpartition(".")
            self.layers[name] = BankLinear(module, self, inputs, outputs)
            setattr(model.get_submodule(parent), leaf, self.layers[name])
        self._widest = max(layer.inputs for layer in self.layers.values())

    def mixed(self, counts: Mapping[int, int], pieces: Sequence[tuple[int, int, int]] = ()) -> Mix:
        """The mix of a step; see Mix."""
        room = torch.empty(native.TOKENS * (self._widest + self.max_rank)) if self.native else None
        return Mix(
            counts,
            pieces,
            rank=self.rank,
            device=self.device,
            native=self.native,
            ranks=self._slot_ranks,
            room=room,
        )

    def slot(self, key: str) -> int:
        return self._slot_of[key]

    def __contains__(self, key: str) -> bool:
        return key in self._slot_of

    def load(self, key: str, lora: Mapping[str, LoraLayer]) -> None:
        """Copies a version into a free slot. AdapterError, before anything is copied, when it does not fit."""
        self._check(lora)
        rank = max(layer.a.shape[0] for layer in lora.values())
        with self._lock:
            slot = min(set(range(self.slots)) - set(self._slot_of.values()))
            self._make_wide_enough(rank)
            for name, layer in self.layers.items():
                one = lora.get(name)
                width = one.a.shape[0] if one else 0
                a, b = layer.halves[0][slot], layer.halves[1][slot]
                if one is not None:
                    a[:width].copy_(one.a)
                    b[:width].copy_(one.b.t()).mul_(one.scale)
                a[width:].zero_()
                b[width:].zero_()
            self._slot_of[key] = slot
            self._ranks[key] = rank
            self._slot_ranks[slot] = rank
            self.rank = max(self._ranks.values())

    def unload(self, key: str) -> None:
        with self._lock:
            if self._slot_of.pop(key, None) is not None:
                del self._ranks[key]
                self.rank = max(self._ranks.values(), default=0)

    def check(self, lora: Mapping[str, tuple[int, int, int]]) -> None:
        """Layer -> (rank, inputs, outputs) of a version. AdapterError when the bank cannot hold it."""
        problems = []
        for name, (rank, inputs, outputs) in lora.items():
            layer = self.layers.get(name)
            if layer is None:
                problems.append(f"{name} is no linear layer of the base")
            elif (layer.inputs, layer.outputs) != (inputs, outputs):
                problems.append(f"{name} is {inputs} -> {outputs}, the base's is {layer.inputs} -> {layer.outputs}")
            elif rank > self.max_rank:
                problems.append(f"rank {rank} is over adapters.max_rank = {self.max_rank}; raise it")
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise AdapterError(f"does not fit this base: {problems[0]}{more}")

    def _check(self, lora: Mapping[str, LoraLayer]) -> None:
        self.check({name: (one.a.shape[0], one.a.shape[1], one.b.shape[0]) for name, one in lora.items()})
        for name, one in lora.items():
            if not (torch.isfinite(one.a).all() and torch.isfinite(one.b).all()):
                raise AdapterError(f"{name} holds NaN or infinite numbers; publish a version that did not diverge")

    def _make_wide_enough(self, rank: int) -> None:
        """Grows every layer's slots to a rank. A step in work goes on with the tensors that it has."""
        have = next(iter(self.layers.values())).halves[0].shape[1]
        if rank <= have:
            return
        rank = min(-(-rank // RANK_STEP) * RANK_STEP, self.max_rank)
        for layer in self.layers.values():
            old_a, old_b = layer.halves
            a, b = (
                old_a.new_zeros(self.slots, rank, layer.inputs),
                old_b.new_zeros(self.slots, rank, layer.outputs),
            )
            a[:, :have], b[:, :have] = old_a, old_b
            layer.halves = (a, b)
