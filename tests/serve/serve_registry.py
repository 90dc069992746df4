"""Registries with tiny LoRA versions, for the tests of what serves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from ftray.serve.engine import VersionRef
from ftray.store.registry import Registry


def save_version(folder: Path, says: str, *, peft_type: str = "LORA") -> Path:
    """A folder that can be published; the fake engine answers with `says`."""
    folder.mkdir(parents=True, exist_ok=True)
    module = "base_model.model.layers.0.q_proj"
    tensors = {f"{module}.lora_A.weight": torch.ones(2, 8), f"{module}.lora_B.weight": torch.ones(8, 2)}
    safetensors.torch.save_file(tensors, str(folder / "adapter_model.safetensors"))
    config = {"peft_type": peft_type, "r": 2, "target_modules": ["q_proj"], "base_model_name_or_path": "builtin:tiny"}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "says": says}))
    return folder


def publish(
    registry: Registry, name: str, says: str, *, folder: Path, peft_type: str = "LORA", **card: Any
) -> VersionRef:
    """The next version of an adapter."""
    saved = save_version(folder / f"{name}-{says}", says, peft_type=peft_type)
    card = {"base": "builtin:tiny", "servability": "adapter", "method": {"kind": "lora"}, **card}
    return VersionRef.of(registry.publish(name, saved, card, key=f"{name}-{says}"))
