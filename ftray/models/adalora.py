"""AdaLoRA's versions are plain LoRA: for each layer the directions that kept their rank, with singular values and scale
multiplied into A, so that every engine serves them as it serves LoRA.

AdaLoRA (arXiv 2303.10512) computes s B (A * E) with s = alpha / first rank; a direction without rank has E = 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftray.errors import ModelError

_A = ".lora_A.default"
_SAVED = ".modules_to_save.default."


def ranks(learnt: Mapping[str, Any]) -> dict[str, int]:
    """Rank that each layer kept, by its name in the base. `learnt`: whole tensors by the names of `trainable`."""
    return {
        _layer(name): int((learnt[f"{name[: -len(_A)]}.lora_E.default"] != 0).sum())
        for name in learnt
        if name.endswith(_A)
    }


def as_lora(model: Any, learnt: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(PEFT's configuration, tensors by its names) of the LoRA that computes the same, without layers that lost all.

    Where no layer has any, the first keeps one direction that adds nothing: a LoRA must have a layer.
    """
    import torch
    from peft import LoraConfig

    kept = {layer: rank for layer, rank in ranks(learnt).items() if rank}
    tensors: dict[str, Any] = {}
    patterns: dict[str, int] = {}
    for name in [name for name in learnt if name.endswith(_A)]:
        layer, stem = _layer(name), name[: -len(_A)]
        if layer not in kept and (kept or patterns):
            continue
        rows = torch.nonzero(learnt[f"{stem}.lora_E.default"].flatten()).flatten()
        if not len(rows):
            rows = torch.zeros(1, dtype=torch.long)
        scaled = learnt[name] * learnt[f"{stem}.lora_E.default"] * _scale(model)
        tensors[f"{stem}.lora_A.weight"] = scaled[rows]
        tensors[f"{stem}.lora_B.weight"] = learnt[f"{stem}.lora_B.default"][:, rows]
        patterns[layer] = len(rows)
    ours = model.peft_config["default"]
    usual = max(patterns.values())
    others = {layer: rank for layer, rank in sorted(patterns.items()) if rank != usual}
    config = LoraConfig(
        task_type=ours.task_type,
        r=usual,
        lora_alpha=usual,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=sorted(patterns),
        lora_dropout=ours.lora_dropout,
        fan_in_fan_out=ours.fan_in_fan_out,
        modules_to_save=ours.modules_to_save,
    )
    tensors |= {name.replace(_SAVED, "."): tensor for name, tensor in learnt.items() if _SAVED in name}
    return config, tensors


def from_lora(model: Any, saved: Mapping[str, Any]) -> dict[str, Any]:
    """What `as_lora` wrote, as values for the live model, by the names of `trainable`."""
    import torch

    left = dict(saved)
    values: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        if _SAVED in name and (head := left.pop(name.replace(_SAVED, "."), None)) is not None:
            values[name] = head
        if not name.endswith(_A):
            continue
        stem = name[: -len(_A)]
        first, inputs = parameter.shape
        outputs = model.get_parameter(f"{stem}.lora_B.default").shape[0]
        a, e, b = torch.zeros(first, inputs), torch.zeros(first, 1), torch.zeros(outputs, first)
        low, high = left.pop(f"{stem}.lora_A.weight", None), left.pop(f"{stem}.lora_B.weight", None)
        if low is not None and high is not None:
            rank = low.shape[0]
            if rank > first or low.shape[1] != inputs or high.shape != (outputs, rank):
                raise ModelError(f"{stem}: {tuple(low.shape)} and {tuple(high.shape)} do not fit the model")
            a[:rank], b[:, :rank], e[:rank] = low, high, 1 / _scale(model)
        values |= {f"{stem}.lora_A.default": a, f"{stem}.lora_E.default": e, f"{stem}.lora_B.default": b}
    return values | left


def _scale(model: Any) -> float:
    """As PEFT computes it, with the small number that it adds to the rank."""
    config = model.peft_config["default"]
    return config.lora_alpha / (config.init_r + 1e-5)


def _layer(name: str) -> str:
    return name.removeprefix("base_model.model.").removesuffix(_A)
