"""DeepSpeed for one worker: its configuration, its engine, and one optimiser update over a window of micro-batches."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ftray.config.schema import Optim
from ftray.train.layout import Layout

if TYPE_CHECKING:
    from ftray.train.ranks import RankBudget

NO_DECAY = ("bias", "norm.weight", "layernorm.weight", "ln_f.weight", "ln_1.weight", "ln_2.weight")


def deepspeed_config(*, layout: Layout, optim: Optim, dtype: torch.dtype) -> dict[str, Any]:
    """The DeepSpeed configuration of a run, plain data.

    Accumulation is steered by us, window by window (`set_gradient_accumulation_boundary`), because windows differ in
    their number of micro-batches; DeepSpeed is told 2 so that it keeps the buffers that accumulation needs.
    """
    zero: dict[str, Any] = {"stage": layout.zero}
    if layout.zero >= 1:
        zero |= {"overlap_comm": layout.device == "cuda", "contiguous_gradients": True}
    if layout.zero == 3:
        zero |= {
            "stage3_gather_16bit_weights_on_model_save": False,
            "stage3_param_persistence_threshold": 100_000 if layout.device == "cuda" else 1_000,
        }
    if layout.offload != "none":
        device: dict[str, Any] = {"device": layout.offload}
        if layout.offload == "nvme":
            device |= {"nvme_path": layout.nvme_path, "buffer_count": 5}
        zero["offload_optimizer"] = {**device, "pin_memory": layout.device == "cuda"}
        if layout.zero == 3:
            zero["offload_param"] = {**device, "pin_memory": layout.device == "cuda"}
            if layout.offload == "nvme":
                share = -(-layout.largest_weight // layout.workers)
                zero["offload_param"] |= {"buffer_size": max(1_000_000, share), "max_in_cpu": 1_000_000_000}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": optim.max_grad_norm,
        "zero_optimization": zero,
        # Without ZeRO, learnt weights stay fp32 and autocast computes in 16 bits: DeepSpeed's own 16-bit modes keep
        # no fp32 copy there.
        "bf16": {"enabled": dtype == torch.bfloat16 and layout.zero > 0},
        "fp16": {"enabled": dtype == torch.float16 and layout.zero > 0, "initial_scale_power": 12},
        # Our optimiser is torch's fused AdamW (on CPU 7 ms a step, the plain one 27), not one of DeepSpeed's.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }


def init_distributed(device: str) -> None:
    """Let DeepSpeed adopt the process group that Ray Train has made.

    On CPU, DeepSpeed would first compile a shared-memory all-reduce (37 s on two cores) that training does not call.
    """
    import deepspeed

    os.environ.setdefault("DS_ACCELERATOR", device)
    if device == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if device == "cuda" else "gloo", verbose=False)


def build_optimizer(named: dict[str, torch.nn.Parameter], *, optim: Optim, lr: float, layout: Layout):
    """AdamW over the trained parameters; matrices are decayed, norms and biases are not."""
    decayed = [p for n, p in named.items() if not n.lower().endswith(NO_DECAY)]
    plain = [p for n, p in named.items() if n.lower().endswith(NO_DECAY)]
    if not optim.weight_decay:
        decayed, plain = decayed + plain, []
    groups = [{"params": decayed, "weight_decay": optim.weight_decay}]
    if plain:
        groups.append({"params": plain, "weight_decay": 0.0})
    if optim.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=optim.betas, fused=True)
    import bitsandbytes as bnb

    kinds = {
        "adamw_8bit": bnb.optim.AdamW8bit,
        "paged_adamw": bnb.optim.PagedAdamW32bit,
        "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
    }
    return kinds[optim.optimizer](groups, lr=lr, betas=optim.betas)


def build_engine(model, *, named: dict[str, torch.nn.Parameter], layout: Layout, optim: Optim, lr: float, dtype):
    """A DeepSpeed engine over `model` that trains the parameters in `named`."""
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=build_optimizer(named, optim=optim, lr=lr, layout=layout),
        config=deepspeed_config(layout=layout, optim=optim, dtype=dtype),
        dist_init_required=False,
    )
    return engine


@dataclass(frozen=True)
class Update:
    """What one update saw on this worker: each micro-batch's summed loss, and the gradient's norm before clipping."""

    sums: list[float]
    grad_norm: float


def update(
    engine,
    micros: Sequence[Any],
    loss: Callable[[Any, Any], torch.Tensor],
    *,
    count: int,
    lr: float,
    ranks: RankBudget | None = None,
) -> Update:
    """One optimiser update over a window. `ranks`: AdaLoRA's, which look at its gradients and pull directions apart.

    `loss(engine, micro)` is the micro-batch's summed loss in nats; `count` is what the sums of the whole window, over
    all workers, are divided by. DeepSpeed averages gradients over workers, so the sum is multiplied by their number:
    the gradient is that of one large batch, however it is cut.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    workers = torch.distributed.get_world_size()
    sums = []
    for position, micro in enumerate(micros):
        engine.set_gradient_accumulation_boundary(position == len(micros) - 1)
        total = loss(engine, micro)
        mean = total * (workers / count)
        if ranks is not None and position == 0:
            mean = mean + ranks.penalty()  # every worker adds it once, and DeepSpeed averages over them
        engine.backward(mean, scale_wrt_gas=False)
        sums.append(total.detach())
    norm = _plain_norm(engine)
    if ranks is not None:
        ranks.before_step()
    engine.step()
    if norm is None:
        norm = engine.get_global_grad_norm()
    return Update(torch.stack(sums).tolist(), float(norm))


def _plain_norm(engine) -> torch.Tensor | None:
    """Without ZeRO, DeepSpeed clips but does not say the norm; gradients are reduced and whole at this point."""
    if engine.zero_optimization_stage() > 0:
        return None
    grads = [p.grad for group in engine.optimizer.param_groups for p in group["params"] if p.grad is not None]
    return torch.nn.utils.get_total_norm(grads)
