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
from ftray.models.mixed import add_update
from ftray.serve import native
from ftray.serve.lora_files import LoraLayer

Tables = list[tuple[torch.Tensor, torch.Tensor]]
"""A [S, r, I] and B [S, r, O] of each layer."""
MANY = 112
"""From so many tokens on, a slot has products of its own: 128 tokens take about as long either way."""
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


@dataclass(frozen=True)
class Compiled:
    """What native.c needs of a bank: each slot's rank, and the largest I + r of a layer."""

    native: native.Native
    ranks: Any
    widest: int


class Mix:
    """How the tokens of one step are spread over the slots; made once, used by every layer."""

    def __init__(
        self,
        counts: Mapping[int, int],
        pieces: Sequence[tuple[int, int, int]] = (),
        *,
        rank: int,
        size: int,
        device: Any = "cpu",
        compiled: Compiled | None = None,
    ):
        """`counts`: tokens by slot, ascending, as they lie in the step from its first token on. `pieces`: further
        (slot, begin, end) of the step's tokens, each of one slot. `rank`: the largest of all slots. `size`: all tokens
        of the step, the base's too."""
        self.rank, self.size = rank, size
        self.native: native.Native | None = None
        self.tokens: native.Tokens | None = None
        begin = 0
        begins: dict[int, int] = {}
        self.alone: list[Alone] = []
        few: dict[int, int] = {}
        for slot, count in counts.items():
            begins[slot] = begin
            if count >= MANY:
                self.alone.append(Alone(slot, begin, begin + count))
            elif count:
                few[slot] = count
            begin += count
        self.shared: list[Shared] = []
        segments = [(slot, begins[slot], begins[slot] + few[slot]) for slot in few]
        for slot, first, last in pieces:
            if compiled is not None and last - first < MANY:
                segments.append((slot, first, last))
            else:
                self.alone.append(Alone(slot, first, last))
        if compiled is None:
            self.shared = [_shared(group, few, begins, device) for group in _ranges(sorted(few))]
        elif segments:
            self.native = compiled.native
            self.tokens = native.Tokens(segments, ranks=compiled.ranks, widest=compiled.widest)


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

    def __init__(self, base: torch.nn.Module, bank: Bank, *, number: int, inputs: int, outputs: int):
        super().__init__()
        self.base, self.bank = base, bank
        self.number, self.inputs, self.outputs = number, inputs, outputs
        self.sees_all = True
        """Whether every token of a step comes here, in order; an expert of a mixture sees a part."""
        self.together: Together | None = Together([self])
        """None where the base's layer is a part of several, which add the bank's update themselves."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        if self.bank.trial is not None:
            self.sees_all = x.shape[-2] == self.bank.trial
        if self.together is not None and self.bank.mix is not None:
            self.together.add(y, x, self.bank.mix)
        return y


class Together:
    """Layers of the bank over the same input, whose outputs lie beside each other."""

    def __init__(self, layers: Sequence[BankLinear]):
        self.layers = layers
        self._numbers = [layer.number for layer in layers]
        self._known: tuple[Any, native.Layers | None] = (None, None)

    def add(self, y: torch.Tensor, x: torch.Tensor, mix: Mix) -> None:
        """y [1, N, O] += B_s A_s x [1, N, I] for each token's slot s, in place; or [N, O] and [N, I]."""
        if x.dim() == 2:
            x, y = x[None], y[None]
        if x.shape[:2] != (1, mix.size):
            raise RuntimeError(f"a layer of the bank sees {tuple(x.shape[:2])} of {mix.size} tokens")
        tables = self.layers[0].bank.tables
        if mix.native is not None and mix.tokens is not None:
            mix.native.lora(y, x, layers=self._compiled(tables), tokens=mix.tokens)
        if mix.shared or mix.alone:
            begin = 0
            for layer in self.layers:
                add(y[0, :, begin : begin + layer.outputs], x[0], mix, *tables[layer.number])
                begin += layer.outputs

    def _compiled(self, tables: Tables) -> native.Layers:
        """What native.c is given, made anew when the bank has grown."""
        known, layers = self._known
        if known is not tables or layers is None:
            layers = native.Layers([tables[number] for number in self._numbers])
            self._known = (tables, layers)
        return layers


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
        tokens = slice(one.begin, one.end)
        add_update(y_NO[tokens], x_NI[tokens], a_SrI[one.slot, :rank], b_SrO[one.slot, :rank].t())


class Bank:
    """The slots of one model's bank. Loading copies into a free slot, beside the thread that generates."""

    def __init__(self, model: Any, *, slots: int, max_rank: int, dtype: Any, device: Any):
        self.slots, self.max_rank = slots, max_rank
        self.dtype, self.device = dtype, device
        self.rank = 0
        """The largest rank loaded, to which the others are padded."""
        self.head = next((name for name, one in model.named_modules() if one is model.get_output_embeddings()), None)
        """The output layer's name; adapters of it are held beside the bank."""
        self.trial: int | None = None
        """So many tokens go through the model to see which layers get them all."""
        self.mix: Mix | None = None
        """Of the step that is being computed; only the generating thread sets it."""
        self._lock = threading.Lock()
        self._slot_of: dict[str, int] = {}
        self._ranks: dict[str, int] = {}
        self._slot_ranks = torch.zeros(slots, dtype=torch.long)
        self.tables: Tables = []
        """Replaced whole when the bank grows; a step in work goes on with the one that it has."""
        self.layers: dict[str, BankLinear] = {}
        for name, module in linear_modules(model).items():
            inputs, outputs = linear_shape(module)
            parent, _, leaf = name.rpartition(".")
            self.layers[name] = BankLinear(module, self, number=len(self.tables), inputs=inputs, outputs=outputs)
            self.tables.append((self._zeros(inputs, 0), self._zeros(outputs, 0)))
            setattr(model.get_submodule(parent), leaf, self.layers[name])
        usable = torch.device(device).type == "cpu" and dtype in native.NAMES and torch.get_num_threads() == 1
        loops = native.load() if usable else None
        widest = max(layer.inputs for layer in self.layers.values()) + max_rank
        self.compiled = Compiled(loops, self._slot_ranks, widest) if loops else None

    def mixed(self, counts: Mapping[int, int], pieces: Sequence[tuple[int, int, int]] = (), *, size: int) -> Mix:
        """The mix of a step; see Mix."""
        return Mix(counts, pieces, rank=self.rank, size=size, device=self.device, compiled=self.compiled)

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
                a, b = (table[slot] for table in self.tables[layer.number])
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
            elif not layer.sees_all:
                problems.append(f"{name} sees only the tokens that are routed to it; merge the adapter, or use vLLM")
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
        """Grows every layer's slots to a rank."""
        have = self.tables[0][0].shape[1]
        if rank <= have:
            return
        rank = min(-(-rank // RANK_STEP) * RANK_STEP, self.max_rank)
        self.tables = [(self._grown(a, rank), self._grown(b, rank)) for a, b in self.tables]

    def _grown(self, old: torch.Tensor, rank: int) -> torch.Tensor:
        new = self._zeros(old.shape[2], rank)
        new[:, : old.shape[1]] = old
        return new

    def _zeros(self, width: int, rank: int) -> torch.Tensor:
        return torch.zeros(self.slots, rank, width, dtype=self.dtype, device=self.device)
