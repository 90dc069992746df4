"""LoRA layers in one step of autograd: y = x W' + b + s (x A') B', without a pass over y for the sum and the scale.

PEFT computes the same in five operations, each of which reads or writes the whole output again, forward and backward.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear

ADAPTER = "default"


class _LoraLinear(torch.autograd.Function):
    """x [..., I], weight [O, I], A [R, I], B [O, R] of one dtype; weight and bias get no gradient."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias, A, B, scale: float):
        x_I = x.reshape(-1, x.shape[-1])
        inner_R = x_I @ A.t()
        y_O = F.linear(x_I, weight, bias).addmm_(inner_R, B.t(), alpha=scale)
        ctx.save_for_backward(x_I, inner_R, weight, A, B)
        ctx.scale, ctx.shape = scale, x.shape
        return y_O.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients):
        x_I, inner_R, weight, A, B = ctx.saved_tensors
        y_O = gradients[0].reshape(-1, gradients[0].shape[-1])
        to_inner_R = (y_O @ B).mul_(ctx.scale)
        to_B = (y_O.t() @ inner_R).mul_(ctx.scale)
        to_A = to_inner_R.t() @ x_I
        to_x = (y_O @ weight).addmm_(to_inner_R, A).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return to_x, None, None, to_A, to_B, None


def fuse(model: torch.nn.Module) -> int:
    """Let the model's plain LoRA layers compute in one step; how many. Weights, names and files stay as they are.

    What a layer cannot do this way (dropout while training, DoRA, quantised weights, autocast, an adapter that is
    switched off or merged) it does as before. Not for ZeRO 3, which gathers A and B when their own modules run.
    """
    count = 0
    for layer in model.modules():
        if type(layer) is Linear and type(layer.get_base_layer()) is torch.nn.Linear and not layer.use_dora[ADAPTER]:
            layer.forward = functools.partial(_forward, layer, layer.forward)  # type: ignore[method-assign]
            count += 1
    return count


def _forward(layer: Linear, otherwise, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    base, A, B = layer.get_base_layer(), layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    plain = (
        not (args or kwargs)
        and not layer.disable_adapters
        and not layer.merged
        and layer.active_adapters == [ADAPTER]
        and not (layer.training and isinstance(layer.lora_dropout[ADAPTER], torch.nn.Dropout))
        and not base.weight.requires_grad
        and B.bias is None
        and x.dtype == base.weight.dtype == A.weight.dtype
        and not torch.is_autocast_enabled(x.device.type)
    )
    if not plain:
        return otherwise(x, *args, **kwargs)
    return _LoraLinear.apply(x, base.weight, base.bias, A.weight, B.weight, layer.scaling[ADAPTER])
