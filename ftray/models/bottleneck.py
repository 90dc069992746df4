"""Bottleneck adapters, as a method of PEFT's: saved, loaded and switched like any other once this module is imported.

    houlsby    y + s U f(D y) after the attention's last layer and after the MLP's (arXiv 1902.00751)
    pfeiffer   the same after the MLP only (arXiv 2005.00052, without its extra norm)
    parallel   MLP(x) + s U f(D x), beside the MLP (arXiv 2110.04366)

D [size, hidden] and U [hidden, size] have biases; U begins at 0, so an adapter begins as the base.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType, register_peft_method
from torch import nn

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}
NAME = "BOTTLENECK"


def _add_peft_type() -> PeftType:
    """PEFT knows methods by members of an enum, which has to be given one more."""
    member = str.__new__(PeftType, NAME)
    member._name_, member._value_ = NAME, NAME  # type: ignore[misc]
    type.__setattr__(PeftType, NAME, member)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    PeftType._member_names_.append(NAME)
    return member


if NAME not in PeftType.__members__:
    _add_peft_type()


@dataclass
class BottleneckConfig(PeftConfig):
    target_modules: list[str] | str | None = field(default=None)
    size: int = field(default=64)
    width: int = field(default=0, metadata={"help": "of what goes through: the model's hidden size"})
    parallel: bool = field(default=False)
    activation: str = field(default="relu")
    scale: float = field(default=1.0)
    dropout: float = field(default=0.0)
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(NAME)
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # as PEFT keeps them


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A module of the base with a bottleneck after it, or beside it."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig):
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down, self.bottleneck_up = nn.ModuleDict({}), nn.ModuleDict({})
        self._settings: dict[str, BottleneckConfig] = {}
        self._active_adapter = adapter_name
        self.merged_adapters = []
        self.update_layer(adapter_name, config=config)

    def update_layer(self, adapter_name: str, config: BottleneckConfig, **kwargs: Any) -> None:
        down, up = nn.Linear(config.width, config.size), nn.Linear(config.size, config.width)
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)
        self._settings[adapter_name] = config
        self.bottleneck_down[adapter_name], self.bottleneck_up[adapter_name] = down, up
        weight = next(iter(self.base_layer.parameters()))
        for part in (down, up):
            part.to(weight.device, weight.dtype if weight.is_floating_point() else None)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        for name in self.active_adapters:
            if name not in self.bottleneck_down:
                continue
            config = self._settings[name]
            down: Any = self.bottleneck_down[name]
            up: Any = self.bottleneck_up[name]
            read = (x if config.parallel else result).to(down.weight.dtype)
            read = nn.functional.dropout(read, config.dropout, self.training)
            result = result + (config.scale * up(ACTIVATIONS[config.activation]()(down(read)))).to(result.dtype)
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError("a bottleneck adapter is no sum of weights, so it cannot be merged")

    def unmerge(self) -> None:
        raise NotImplementedError("a bottleneck adapter is never merged")


class BottleneckModel(BaseTuner):
    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}  # type: ignore[misc]  # PEFT declares it on instances

    def _create_and_replace(  # type: ignore[override]  # PEFT calls it with these
        self, peft_config: Any, adapter_name: str, target: Any, target_name: str, parent: Any, current_key: str
    ) -> None:
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, config=peft_config)
            return
        layer = BottleneckLayer(target, adapter_name, config=peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


def _register() -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if NAME not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=NAME.lower(), config_cls=BottleneckConfig, model_cls=BottleneckModel)


_register()
