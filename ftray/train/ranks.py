"""AdaLoRA's budget in our loop: which directions keep their rank, decided after each step (arXiv 2303.10512).

PEFT's allocator does the arithmetic. Here it gets what it needs under every ZeRO stage: whole gradients, which are gone
after the optimiser's step, and masks that reach the fp32 values. Its averages are part of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ftray.train import state

AVERAGES = ("exp_avg_ipt", "exp_avg_unc")


class RankBudget:
    """The ranks of one run's AdaLoRA. Every worker holds the same, as gradients and weights are the same everywhere."""

    def __init__(self, model: Any, engine: Any, named: Mapping[str, torch.nn.Parameter], *, max_grad_norm: float):
        self.tuner, self.engine, self.named = model.base_model, engine, named
        self.max_grad_norm = max_grad_norm
        self.config = model.peft_config["default"]
        self.allocator = self.tuner.rankallocator
        self._gradients: dict[str, torch.Tensor] = {}

    def penalty(self) -> torch.Tensor:
        """Mean over A and B of |P P^T - I|, the Frobenius norm, times its weight: directions that overlap share a rank.

        Equation 4 of the paper; nats, added to the mean loss.
        """
        total = []
        for name, parameter in self.named.items():
            if ".lora_A." not in name and ".lora_B." not in name:
                continue
            gram = parameter @ parameter.T if ".lora_A." in name else parameter.T @ parameter
            total.append(torch.linalg.matrix_norm(gram.float() - torch.eye(len(gram), device=gram.device)))
        return self.config.orth_reg_weight * torch.stack(total).mean()

    def before_step(self) -> None:
        """Keep the whole gradients of the window, which the optimiser's step clears."""
        from deepspeed.utils import safe_get_full_grad

        plain = self.engine.zero_optimization_stage() == 0
        for name, parameter in self.named.items():
            gradient = parameter.grad if plain else safe_get_full_grad(parameter)
            assert gradient is not None, f"{name} has no gradient"
            self._gradients[name] = gradient.detach().float().clone()

    def after_step(self, step: int, *, grad_norm: float) -> None:
        """Weigh the directions and mask those that lose their rank. `step` counts updates made, from 1."""
        clipped = min(1.0, self.max_grad_norm / (grad_norm + 1e-6))
        for name, parameter in self.named.items():
            parameter.grad = (self._gradients[name] * clipped).to(parameter.dtype)
        try:
            self.tuner.update_and_allocate(step)
        finally:
            self._gradients = {}
            for parameter in self.named.values():
                parameter.grad = None
        self._mask_masters()

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps beside weights and moments: "<parameter>:<average>", and masks of what has rank."""
        found: dict[str, torch.Tensor] = {}
        for name, parameter in self._inside():
            for average in AVERAGES:
                kept = getattr(self.allocator, average).get(name)
                found[f"{self._outside(name)}:{average}"] = torch.zeros_like(parameter) if kept is None else kept
        for name, mask in (self.config.rank_pattern or {}).items():
            found[f"{self._outside(name)}:has_rank"] = torch.tensor(mask)
        return {name: tensor.detach().float().cpu() for name, tensor in found.items()}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self._inside():
            self.allocator.ipt[name] = torch.zeros_like(parameter)
            for average in AVERAGES:
                kept = tensors[f"{self._outside(name)}:{average}"]
                getattr(self.allocator, average)[name] = kept.to(parameter.device, parameter.dtype)
        masks = {
            name: tensors[f"{self._outside(name)}:has_rank"].bool().flatten().tolist()
            for name, _ in self._inside()
            if f"{self._outside(name)}:has_rank" in tensors
        }
        self.config.rank_pattern = masks or None

    def _inside(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Learnt parameters by the names that PEFT's allocator gives them."""
        return [(n, p) for n, p in self.tuner.model.named_parameters() if ".lora_" in n and p.requires_grad]

    def _outside(self, name: str) -> str:
        return f"base_model.model.{name}"

    def _mask_masters(self) -> None:
        """Under ZeRO the next step would bring masked directions back from the fp32 values: mask those too."""
        if self.engine.zero_optimization_stage() == 0:
            return
        for name, parameter in self.named.items():
            if ".lora_E." in name:
                value: torch.Tensor = parameter.get_full_hp_param()  # type: ignore[attr-defined]  # DeepSpeed's
                state.set_value(self.engine, parameter, value.masked_fill(parameter == 0, 0.0))
