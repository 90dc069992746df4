"""Training state that does not depend on the layout: for each trained parameter its fp32 value and its moments.

DeepSpeed's own checkpoints are pickles cut by ZeRO stage and worker count. Here every stage and every count read and
write the same tensors, named after parameters, so a run resumes on another number of workers and under another stage.
Only trained parameters are kept: an adapter's state is small, and a frozen base is loaded anew.

AdamW's moments are `<parameter>:exp_avg` and `<parameter>:exp_avg_sq`. The 8-bit and paged optimisers, which run
without ZeRO only, keep their own tensors under the same scheme.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist

MOMENTS = ("exp_avg", "exp_avg_sq")


def gather(
    engine, named: Mapping[str, torch.nn.Parameter], *, moments: bool = True
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield ("<parameter>" | "<parameter>:<moment>", whole tensor on the CPU), values in fp32.

    Collective: every worker must draw every item, even if it keeps only some, so that memory holds one parameter at a
    time and workers can share the writing.
    """
    if not _plain(engine):
        _make_moments(engine, steps=None)
    with _shards(engine, written=False) as shards:
        for name, parameter in named.items():
            yield name, _get(engine, shards, parameter)
            for moment in _moment_names(engine, parameter) if moments else ():
                yield f"{name}:{moment}", _get(engine, shards, parameter, moment)


def restore(
    engine, named: Mapping[str, torch.nn.Parameter], tensors: Mapping[str, torch.Tensor], *, steps: int
) -> None:
    """Put gathered `tensors` back, on any layout. `steps`: updates made so far, which Adam's bias correction counts."""
    _make_moments(engine, steps=steps)
    with _shards(engine, written=True) as shards:
        for name, parameter in named.items():
            _set(engine, shards, parameter, tensors[name])
            for moment in _moment_names(engine, parameter):
                if (value := tensors.get(f"{name}:{moment}")) is not None:  # none yet where no gradient came
                    _set(engine, shards, parameter, value, moment)
    load_weights(engine, named, tensors)


def load_weights(engine, named: Mapping[str, torch.nn.Parameter], tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy values into the weights that compute (bf16 under mixed precision), sharded or not."""
    import deepspeed

    sharded = engine.zero_optimization_stage() == 3
    with torch.no_grad():
        for name, parameter in named.items():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=sharded):
                parameter.copy_(tensors[name].to(parameter.device, parameter.dtype))


def set_value(engine, parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Put a whole fp32 value where the optimiser steps it (ZeRO 1 and 2); every worker calls it."""
    _set(engine, None, parameter, value)


def _plain(engine) -> bool:
    """No ZeRO: the optimiser is torch's or bitsandbytes' own, over the parameters themselves."""
    return isinstance(engine.optimizer, torch.optim.Optimizer)


def _base_optimizer(engine) -> torch.optim.Optimizer:
    return engine.optimizer if _plain(engine) else engine.optimizer.optimizer


def _flat_parameters(engine) -> list[torch.Tensor]:
    """What the base optimiser steps: flat fp32 pieces under ZeRO, the parameters themselves without."""
    optimizer = engine.optimizer
    if _plain(engine):
        return [p for group in optimizer.param_groups for p in group["params"]]
    if engine.zero_optimization_stage() == 3:
        return list(optimizer.fp32_partitioned_groups_flat)
    return list(optimizer.single_partition_of_fp32_groups)


def _make_moments(engine, *, steps: int | None) -> None:
    """Give the optimiser its state before its first step, as if `steps` had been made; None leaves what there is."""
    base = _base_optimizer(engine)
    if hasattr(base, "init_state"):  # bitsandbytes
        _make_bitsandbytes_state(base, steps)
        return
    with _shards(engine, written=True) as shards:
        for group, flat in enumerate(_flat_parameters(engine)):
            entry = base.state[flat]
            if steps is not None or "step" not in entry:
                device = flat.device if base.defaults.get("fused") else "cpu"
                entry["step"] = torch.tensor(float(steps or 0), dtype=torch.float32, device=device)
            if missing := [moment for moment in MOMENTS if moment not in entry]:
                if shards is not None:
                    shards.bring(group)
                for moment in missing:
                    entry[moment] = torch.zeros_like(flat)
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        # DeepSpeed links a parameter to its moments once, while the first group steps: with two groups the second has
        # none yet and stays unlinked.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _make_bitsandbytes_state(base, steps: int | None) -> None:
    if steps is None:
        return
    for g, group in enumerate(base.param_groups):
        for p, parameter in enumerate(group["params"]):
            base.init_state(group, parameter, g, p)
            base.state[parameter]["step"] = steps
    base.initialized = True


def _moment_names(engine, parameter) -> list[str]:
    if not _plain(engine):
        return list(MOMENTS)
    entry = engine.optimizer.state.get(parameter, {})
    return [name for name, value in entry.items() if isinstance(value, torch.Tensor) and name != "step"]


def _shape(parameter: torch.nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _get(engine, shards: _Shards | None, parameter, moment: str | None = None) -> torch.Tensor:
    """A whole value or moment on the CPU; fp32, but for what 8-bit optimisers keep."""
    if shards is not None:
        whole = shards.gathered(parameter, moment)
    elif not _plain(engine):
        whole = parameter.get_full_hp_param(moment)
    elif moment is None:
        whole = parameter.detach().float()
    else:
        whole = engine.optimizer.state[parameter][moment]
    return whole.detach().to("cpu", copy=True)


def _set(engine, shards: _Shards | None, parameter, value: torch.Tensor, moment: str | None = None) -> None:
    if shards is not None:
        shards.scatter(parameter, value, moment)
    elif not _plain(engine):
        parameter.set_full_hp_param(value, moment)
    elif moment is not None:
        engine.optimizer.state[parameter][moment].copy_(value)
    # without ZeRO a parameter is its own value, which `load_weights` sets


@contextmanager
def _shards(engine, *, written: bool) -> Iterator[_Shards | None]:
    if engine.zero_optimization_stage() < 3:
        yield None
        return
    shards = _Shards(engine, written)
    try:
        yield shards
    finally:
        shards.close()


class _Shards:
    """This worker's share of values and moments under ZeRO 3: each parameter is cut into equal pieces, the last padded.

    DeepSpeed's `safe_set_full_*` cannot pad (a parameter of 6565 weights on 3 workers ends past its end), and it reads
    and writes a whole sub-group from NVMe for each tensor. Here one sub-group is in memory until another is asked for.
    """

    def __init__(self, engine, written: bool):
        self.optimizer, self.device, self.written = engine.optimizer, engine.device, written
        self._resident: int | None = None

    def gathered(self, parameter, moment: str | None) -> torch.Tensor:
        shard = self._of(parameter, moment).to(self.device)
        group = parameter.ds_process_group
        whole = torch.empty(dist.get_world_size(group) * shard.numel(), dtype=shard.dtype, device=self.device)
        dist.all_gather_into_tensor(whole, shard.contiguous(), group=group)
        return whole[: parameter.ds_numel].view(parameter.ds_shape)

    def scatter(self, parameter, value: torch.Tensor, moment: str | None) -> None:
        shard = self._of(parameter, moment)
        start = dist.get_rank(parameter.ds_process_group) * shard.numel()
        piece = value.flatten()[start : start + shard.numel()]
        shard.zero_()
        shard[: piece.numel()].copy_(piece)

    def bring(self, group: int) -> None:
        """From here on the sub-group is in memory; the one before goes back to NVMe."""
        if group != self._resident and self.optimizer._swappable_optimizer_subgroup(group):
            self.close()
            self.optimizer._optimizer_states_and_gradient_swap_in(group)
            self._resident = group

    def close(self) -> None:
        group, self._resident = self._resident, None
        if group is None:
            return
        if self.written:
            self.optimizer._optimizer_states_and_gradient_swap_out(group)
        else:
            self.optimizer._release_swap_buffers(group)

    def _of(self, parameter, moment: str | None) -> torch.Tensor:
        group, start, length = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
        self.bring(group)
        flat = self.optimizer.fp32_partitioned_groups_flat[group]
        whole = flat if moment is None else self.optimizer.optimizer.state[flat][moment]
        return whole.data.narrow(0, start, length)


def numel(parameter: torch.nn.Parameter) -> int:
    """Number of weights of a parameter, sharded or not."""
    return _shape(parameter).numel()
