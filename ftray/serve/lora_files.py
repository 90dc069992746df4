"""A LoRA version's folder as the bank wants it: for each layer an A and a B with the scale multiplied in."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftray.errors import AdapterError
from ftray.models.heads import LABELS

_TENSOR = re.compile(r"(?:base_model\.model\.)?(?P<layer>.+)\.(?P<half>lora_A|lora_B)\.weight")
_MORE = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "target_parameters",
)
"""Settings that make a LoRA more than a sum of A and B beside linear layers."""

_ON_ANOTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin that take A B out of the base's weights."""


@dataclass(frozen=True)
class LoraLayer:
    """A [r, inputs] and B [outputs, r] of one linear layer; y += scale * B A x."""

    a: Any
    b: Any
    scale: float


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json, or {} for a folder with a whole model. AdapterError when it cannot be read, or does not
    write text."""
    if (folder / LABELS).exists():
        raise AdapterError("it reads under a head and writes no text; one of an encoder needs engine: {kind: encoder}")
    path = folder / "adapter_config.json"
    if not path.exists():
        if (folder / "config.json").exists():
            return {}
        raise AdapterError(f"{folder} has neither adapter_config.json nor config.json; publish it again")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"adapter_config.json cannot be read: {error}; publish the version again") from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise AdapterError("adapter_config.json has no peft_type; publish a folder that PEFT saved")
    return config


def stackable_layers(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, int, int]] | None:
    """Layer -> (rank, inputs, outputs) of a version that is nothing but A and B beside linear layers; else None.

    By its configuration and its tensors' shapes. AdapterError when a half is missing.
    """
    if config.get("peft_type") != "LORA" or any(config.get(key) for key in _MORE):
        return None
    begun = config.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(_ON_ANOTHER_BASE):
        raise AdapterError(
            f"it was begun with {begun}, which changed its base; convert it to the original base when saving "
            "(PEFT: path_initial_model_for_weight_conversion)"
        )
    halves: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            return None
        halves.setdefault(match["layer"], {})[match["half"]] = shape
    layers = {}
    for layer, pair in halves.items():
        a, b = pair.get("lora_A", ()), pair.get("lora_B", ())
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise AdapterError(f"{layer}: lora_A {a} and lora_B {b} do not fit each other; publish the version again")
        layers[layer] = (a[0], a[1], b[0])
    return layers


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Of every tensor of a folder, by their files' headers. AdapterError when one is damaged or there is none."""
    from safetensors import SafetensorError, safe_open

    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise AdapterError(f"{folder} has no *.safetensors; pickled weights are never read")
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        try:
            with safe_open(str(path), framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (it is no mapping)
                    shapes[name] = tuple(file.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise AdapterError(f"{path.name} cannot be read: {error}; publish the version again") from error
    return shapes


def read_lora(folder: Path, config: Mapping[str, Any]) -> dict[str, LoraLayer]:
    """Layer -> its LoRA, as the files have it, of a version for which `stackable_layers` is not None."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    halves: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise AdapterError(f"{path.name} cannot be read: {error}; publish the version again") from error
        for name, tensor in tensors.items():
            if match := _TENSOR.fullmatch(name):
                halves.setdefault(match["layer"], {})[match["half"]] = tensor
    return {
        layer: LoraLayer(pair["lora_A"], pair["lora_B"], _scale(config, layer, pair["lora_A"].shape[0]))
        for layer, pair in halves.items()
    }


def _scale(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732), with PEFT's per-layer patterns."""
    alpha = _by_pattern(config.get("alpha_pattern"), layer, config.get("lora_alpha") or 8)
    named = _by_pattern(config.get("rank_pattern"), layer, config.get("r") or rank)
    return float(alpha) / (named**0.5 if config.get("use_rslora") else named)


def _by_pattern(patterns: Mapping[str, Any] | None, layer: str, otherwise: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", layer):
            return value
    return otherwise
