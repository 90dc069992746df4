"""Many LoRA adapters learn in one pass over one frozen base: a layer adds to each adapter's tokens its own update.

For a token x of adapter s a layer gives y = W x + b + c_s B_s A_s x (LoRA, arXiv 2106.09685; several at once: mLoRA,
arXiv 2312.02515; PLoRA, arXiv 2508.02932; LoRAFusion, arXiv 2510.00206), as the serving bank does, with gradients.

Adapters that read the same rows share what the base computes of them before anything learns: blocks below the first
adapted layer, also from one pass to the next, and that layer's W x. Whatever needs no gradient there is the same for
all of them.

Axes: N tokens of a pass, I inputs and O outputs of a layer, R an adapter's rank.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ftray.errors import ModelError
from ftray.models.layers import blocks
from ftray.models.load import linear_modules

ADAPTER = "default"


@dataclass(frozen=True)
class Part:
    """An adapter's share of one layer: A [R, I], B [O, R], and c. `dropout`: of what A reads, while training."""

    A: torch.nn.Parameter
    B: torch.nn.Parameter
    scale: float
    dropout: float


@dataclass
class Adapter:
    """One trial's A and B, by the layers' names in the base. `draws`: where its dropout masks come from."""

    parts: dict[str, Part]
    draws: torch.Generator

    @classmethod
    def of(cls, adapted: Any, *, draws: torch.Generator) -> Adapter:
        """What PEFT has put beside a base's linear layers. ModelError where it is more than plain LoRA."""
        parts = {}
        for name, layer in adapted.get_base_model().named_modules():
            if ADAPTER not in getattr(layer, "lora_A", {}):
                continue
            if layer.lora_variant or layer.lora_B[ADAPTER].bias is not None:
                raise ModelError(f"{name} learns by a kind of LoRA that cannot share a pass; set fuse: off")
            dropout = getattr(layer.lora_dropout[ADAPTER], "p", 0.0)
            A, B = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            parts[name] = Part(A, B, layer.scaling[ADAPTER], dropout)
        return cls(parts, draws)


@dataclass(frozen=True)
class Rows:
    """One adapter's tokens of a pass, as they lie in its own batch: [rows, length], padded here to `width`.

    `same` is equal for batches of the same examples.
    """

    adapter: Adapter
    rows: int
    length: int
    width: int
    examples: int
    same: Any

    @property
    def tokens(self) -> int:
        return self.rows * self.width


@dataclass(frozen=True)
class _Share:
    """Tokens `begin`..`end` of a pass, all of one adapter."""

    begin: int
    end: int
    rows: Rows


class Mix:
    """How the tokens of one pass are spread over adapters, in order. Batches that others repeat must come first."""

    def __init__(self, batches: Sequence[Rows], *, packed: bool, device: Any = "cpu"):
        self.packed = packed
        self.shares: list[_Share] = []
        firsts: dict[Any, _Share] = {}
        begin = 0
        for batch in batches:
            self.shares.append(_Share(begin, begin + batch.tokens, batch))
            firsts.setdefault(batch.same, self.shares[-1])
            begin += batch.tokens
        self.size = begin
        self.once = sum(share.end - share.begin for share in firsts.values())
        """The first so many tokens; all later ones repeat some of them."""
        self.borders = sum(share.rows.examples for share in firsts.values())
        """Examples among these."""
        self.width = 1 if packed else batches[0].width
        self.source = tuple((share.rows.same, share.rows.width) for share in firsts.values())
        """Equal for passes whose first tokens are the same."""
        self.back: torch.Tensor | None = None
        """[N] which of the first tokens each one is; None where no batch repeats another."""
        if self.once < self.size:
            assert all(first.end <= self.once for first in firsts.values()), "batches that others repeat come first"
            begins = [firsts[share.rows.same].begin for share in self.shares]
            spans = zip(begins, self.shares, strict=True)
            self.back = torch.cat([torch.arange(at, at + one.end - one.begin) for at, one in spans]).to(device)

    def few_of(self, value: Any) -> Any:
        """What a block below all adapters is given of an argument: of a tensor over the whole pass, the first part.

        A packed pass is one row with tensors [1, N, ...], [N] and the borders of its examples; a padded one has
        tensors [rows, ...].
        """
        if isinstance(value, tuple | list):
            return type(value)(self.few_of(one) for one in value)
        if not isinstance(value, torch.Tensor) or value.dim() < 1 + (not self.packed):
            return value
        dim = 1 if self.packed and value.dim() > 1 else 0
        if value.shape[dim] == self.size // self.width:
            return value.narrow(dim, 0, self.once // self.width)
        return value[: self.borders + 1] if self.packed and value.dim() == 1 else value

    def again(self, value: torch.Tensor) -> torch.Tensor:
        """The whole pass, of what a block gave for its first part."""
        if self.back is None:
            return value
        if self.packed:
            return value.index_select(1, self.back)
        return value.index_select(0, self.back[:: self.width] // self.width)


class Mixed:
    """A frozen base whose layers read a Mix, while one is set; without one it is the base."""

    def __init__(self, model: Any):
        """`model` becomes this one's own: its layers are replaced."""
        self.model = model.requires_grad_(False)
        self.mix: Mix | None = None
        self._learns = 0  # the first block that this mix's adapters have parts in
        self.layers: dict[str, MixedLinear] = {}
        self._linear = linear_modules(model)
        self._read: tuple[Any, torch.Tensor] | None = None
        found, every = blocks(model) or ("", [])
        self._prefixes = [f"{found}.{number}." for number in range(len(every))]
        for number, block in enumerate(every):
            block.forward = functools.partial(self._block, number, block.forward)

    def admit(self, adapter: Adapter) -> None:
        """Make the layers ready that an adapter has parts of. ModelError where one is no linear layer of the base."""
        for name in adapter.parts.keys() - self.layers.keys():
            if name not in self._linear:
                raise ModelError(f"method.targets: {name} is no linear layer, which a shared pass needs; set fuse: off")
            parent, _, leaf = name.rpartition(".")
            self.layers[name] = MixedLinear(self._linear[name], self, name)
            setattr(self.model.get_submodule(parent), leaf, self.layers[name])

    @contextmanager
    def reading(self, mix: Mix) -> Iterator[Any]:
        """Inside, the model reads this mix."""
        self.mix, self._learns = mix, self._first_that_learns(mix)
        try:
            yield self.model
        finally:
            self.mix = None

    def forget(self) -> None:
        """What the last pass read, which a pass over the same rows would not read again."""
        self._read = None

    def _block(self, number: int, forward: Any, hidden: torch.Tensor, *args: Any, **more: Any) -> Any:
        """A block of the base: once for rows that several adapters read, where nothing below it or in it learns."""
        mix, last = self.mix, self._learns - 1
        if mix is None or hidden.requires_grad or number > last:
            return forward(hidden, *args, **more)
        if self._read and self._read[0] == (last, mix.source):
            return mix.again(self._read[1]) if number == last else hidden
        few = [mix.few_of(one) for one in (hidden, *args)]
        given = forward(*few, **{name: mix.few_of(one) for name, one in more.items()})
        if not isinstance(given, torch.Tensor):
            if mix.back is None:
                return given
            block = self._prefixes[number][:-1]
            raise ModelError(f"{block} gives more than its output, so trials cannot share it; set fuse: off")
        if number == last:
            self._read = (last, mix.source), given
        return mix.again(given)

    def _first_that_learns(self, mix: Mix) -> int:
        """Number of the first block with a part of an adapter of this pass; how many there are, where none has one."""
        names = {name for share in mix.shares for name in share.rows.adapter.parts}
        found = (n for n, prefix in enumerate(self._prefixes) if any(name.startswith(prefix) for name in names))
        return next(found, len(self._prefixes))


class MixedLinear(torch.nn.Module):
    """A linear layer of the base, quantised or not, with the parts of the adapters that read the pass."""

    def __init__(self, base: torch.nn.Module, mixed: Mixed, name: str):
        super().__init__()
        self.base, self.name = base, name
        self._mixed = (mixed,)  # in a tuple, so that it is no submodule

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mix = self._mixed[0].mix
        if mix is None:
            return self.base(x)
        x_NI = x.reshape(-1, x.shape[-1])
        if len(x_NI) != mix.size:
            raise ModelError(
                f"{self.name} sees {len(x_NI)} of {mix.size} tokens, as an expert does, so trials cannot share it; "
                "set fuse: off"
            )
        uses = [(s, s.rows.adapter.parts[self.name]) for s in mix.shares if self.name in s.rows.adapter.parts]
        if not uses:
            return self.base(x)
        y_NO = self._added(x_NI, mix, uses)
        return y_NO.view(*x.shape[:-1], -1)

    def _added(self, x_NI: torch.Tensor, mix: Mix, uses: Sequence[tuple[_Share, Part]]) -> torch.Tensor:
        back = mix.back if not x_NI.requires_grad else None
        weights = [weight for _, part in uses for weight in (part.A, part.B)]
        masks = [_mask(share, part, x_NI) for share, part in uses]
        plan = _Uses([share for share, _ in uses], [part.scale for _, part in uses], masks)
        if self._is_plain(x_NI, uses[0][1]):
            return _Plain.apply(x_NI, self.base.weight, self.base.bias, plan, (mix.once, back), *weights)
        y_NO = self.base(x_NI) if back is None else self.base(x_NI[: mix.once]).index_select(0, back)
        return _Over.apply(y_NO, x_NI, plan, *weights)

    def _is_plain(self, x: torch.Tensor, part: Part) -> bool:
        return (
            type(self.base) is torch.nn.Linear
            and x.dtype == self.base.weight.dtype == part.A.dtype
            and not torch.is_autocast_enabled(x.device.type)
        )


@dataclass(frozen=True)
class _Uses:
    """What the shares of one layer have beside A and B: c, and what x is multiplied by, if dropout is on."""

    shares: Sequence[_Share]
    scales: Sequence[float]
    masks: Sequence[torch.Tensor | None]


def _mask(share: _Share, part: Part, x_NI: torch.Tensor) -> torch.Tensor | None:
    """[tokens, I] zeros and 1 / (1 - p), drawn as torch's dropout would over the adapter's own batch."""
    if not part.dropout:
        return None
    own = share.rows
    drawn = torch.empty(own.rows, own.length, x_NI.shape[1], dtype=part.A.dtype, device=x_NI.device)
    drawn.bernoulli_(1 - part.dropout, generator=own.adapter.draws).div_(1 - part.dropout)
    return F.pad(drawn, (0, 0, 0, own.width - own.length)).view(-1, x_NI.shape[1])


def add_update(y_NO: torch.Tensor, x_NI: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float = 1.0):
    """y += c B A x for tokens of one adapter, in place; A x [N, R], which its gradient needs. A [R, I], B [O, R]."""
    inner_NR = x_NI @ A.t()
    y_NO.addmm_(inner_NR, B.t(), alpha=scale)
    return inner_NR


def _read(x_NI: torch.Tensor, share: _Share, mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    own = x_NI[share.begin : share.end].to(dtype)
    return own if mask is None else own * mask.to(dtype)


def _add_all(y_NO: torch.Tensor, x_NI: torch.Tensor, uses: _Uses, weights: Sequence[Any]) -> list[torch.Tensor]:
    inners = []
    for number, (share, scale, mask) in enumerate(zip(uses.shares, uses.scales, uses.masks, strict=True)):
        A, B = (weight.to(y_NO.dtype) for weight in weights[2 * number : 2 * number + 2])
        x = _read(x_NI, share, mask, y_NO.dtype)
        inners.append(add_update(y_NO[share.begin : share.end], x, A, B, scale))
    return inners


def _back_all(to_y_NO: torch.Tensor, to_x_NI: torch.Tensor | None, saved: Any, uses: _Uses) -> list[torch.Tensor]:
    """Gradients of A and B, in order; those of x are added to `to_x_NI`, where it is asked for."""
    x_NI, inners, weights = saved
    found = []
    for number, (share, scale, mask) in enumerate(zip(uses.shares, uses.scales, uses.masks, strict=True)):
        A, B = weights[2 * number : 2 * number + 2]
        to_y = to_y_NO[share.begin : share.end]
        to_inner_NR = (to_y @ B.to(to_y.dtype)).mul_(scale)
        to_B = (to_y.t() @ inners[number]).mul_(scale)
        to_A = to_inner_NR.t() @ _read(x_NI, share, mask, to_y.dtype)
        found += [to_A.to(A.dtype), to_B.to(B.dtype)]
        if to_x_NI is None:
            continue
        to_x = to_x_NI[share.begin : share.end]
        if mask is None and to_x.dtype == to_y.dtype:
            to_x.addmm_(to_inner_NR, A.to(to_y.dtype))
        else:
            own = to_inner_NR @ A.to(to_y.dtype)
            to_x.add_(own if mask is None else own * mask.to(own.dtype))
    return found


class _Plain(torch.autograd.Function):
    """x [N, I], weight [O, I], A's and B's of one dtype. With `back` [N], W x is that of the first `once` tokens."""

    @staticmethod
    def forward(ctx: Any, x_NI, weight, bias, uses: _Uses, repeats: tuple[int, Any], *weights):
        once, back = repeats
        y_NO = F.linear(x_NI if back is None else x_NI[:once], weight, bias)
        if back is not None:
            y_NO = y_NO.index_select(0, back)
        inners = _add_all(y_NO, x_NI, uses, weights)
        ctx.save_for_backward(x_NI, weight, *inners, *weights)
        ctx.uses = uses
        return y_NO

    @staticmethod
    def backward(ctx: Any, *gradients):
        x_NI, weight, *rest = ctx.saved_tensors
        count = len(ctx.uses.shares)
        to_y_NO = gradients[0].contiguous()
        to_x_NI = to_y_NO @ weight if ctx.needs_input_grad[0] else None
        found = _back_all(to_y_NO, to_x_NI, (x_NI, rest[:count], rest[count:]), ctx.uses)
        return to_x_NI, None, None, None, None, *found


class _Over(torch.autograd.Function):
    """y [N, O] as some layer of the base gave it for x [N, I]; computed in y's dtype."""

    @staticmethod
    def forward(ctx: Any, y_NO, x_NI, uses: _Uses, *weights):
        with torch.autocast(y_NO.device.type, enabled=False):
            y_NO = y_NO.clone()
            inners = _add_all(y_NO, x_NI, uses, weights)
        ctx.save_for_backward(x_NI, *inners, *weights)
        ctx.uses = uses
        return y_NO

    @staticmethod
    def backward(ctx: Any, *gradients):
        x_NI, *rest = ctx.saved_tensors
        count = len(ctx.uses.shares)
        to_y_NO = gradients[0].contiguous()
        with torch.autocast(to_y_NO.device.type, enabled=False):
            to_x_NI = torch.zeros_like(x_NI) if ctx.needs_input_grad[1] else None
            found = _back_all(to_y_NO, to_x_NI, (x_NI, rest[:count], rest[count:]), ctx.uses)
        return to_y_NO, to_x_NI, None, *found
