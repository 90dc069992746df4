"""Training state that does not depend on the layout: for each trained parameter its fp32 value and its moments.

DeepSpeed's own checkpoints are pickles cut by ZeRO stage and worker count. Here every stage and every count read and
write the same tensors, named after parameters, so a run resumes on another number of workers and under another stage.
Only trained parameters are kept: an adapter's state is small, and a frozen base is loaded anew.

AdamW's moments are `<parameter>:exp_avg` and `<parameter>:exp_avg_sq`. The 8-bit and paged optimisers, which run
without ZeRO only, keep their own tensors under the same scheme.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

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
    for name, parameter in named.items():
        yield name, _value(engine, parameter)
        for moment in _moment_names(engine, parameter) if moments else ():
            yield f"{name}:{moment}", _moment(engine, parameter, moment)


def restore(
    engine, named: Mapping[str, torch.nn.Parameter], tensors: Mapping[str, torch.Tensor], *, steps: int
) -> None:
    """Put gathered `tensors` back, on any layout. `steps`: updates made so far, which Adam's bias correction counts."""
    _make_moments(engine, steps=steps)
    for name, parameter in named.items():
        _set_value(engine, parameter, tensors[name])
        for moment in _moment_names(engine, parameter):
            if (value := tensors.get(f"{name}:{moment}")) is not None:
                _set_moment(engine, parameter, moment, value)
    load_weights(engine, named, tensors)


def load_weights(engine, named: Mapping[str, torch.nn.Parameter], tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy values into the weights that compute (bf16 under mixed precision), sharded or not."""
    import deepspeed

    sharded = engine.zero_optimization_stage() == 3
    with torch.no_grad():
        for name, parameter in named.items():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=sharded):
                if parameter.numel() == tensors[name].numel():
                    parameter.copy_(tensors[name].to(parameter.device, parameter.dtype))


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
    for flat in _flat_parameters(engine):
        entry = base.state[flat]
        if steps is not None or "step" not in entry:
            device = flat.device if base.defaults.get("fused") else "cpu"
            entry["step"] = torch.tensor(float(steps or 0), dtype=torch.float32, device=device)
        for moment in MOMENTS:
            if moment not in entry:
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


def _value(engine, parameter) -> torch.Tensor:
    if _plain(engine):
        return parameter.detach().to("cpu", torch.float32, copy=True)
    from deepspeed.utils import safe_get_full_fp32_param

    return _whole(safe_get_full_fp32_param(parameter), parameter)


def _moment(engine, parameter, name: str) -> torch.Tensor:
    if _plain(engine):
        return engine.optimizer.state[parameter][name].detach().to("cpu", copy=True)
    from deepspeed.utils import safe_get_full_optimizer_state

    return _whole(safe_get_full_optimizer_state(parameter, name), parameter)


def _whole(tensor: torch.Tensor, parameter) -> torch.Tensor:
    return (
        tensor.detach()
        .flatten()[: _shape(parameter).numel()]
        .view(_shape(parameter))
        .to("cpu", torch.float32, copy=True)
    )


def _set_value(engine, parameter, value: torch.Tensor) -> None:
    if not _plain(engine):
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, value.float())


def _set_moment(engine, parameter, name: str, value: torch.Tensor) -> None:
    if _plain(engine):
        engine.optimizer.state[parameter][name].copy_(value)
        return
    from deepspeed.utils import safe_set_full_optimizer_state

    safe_set_full_optimizer_state(parameter, value.float(), name)


def numel(parameter: torch.nn.Parameter) -> int:
    """Number of weights of a parameter, sharded or not."""
    return _shape(parameter).numel()
