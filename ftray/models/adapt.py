"""The methods: which weights of a base learn. Full, freeze (parts of the base), LoRA, and those of adapters.py."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from ftray.config.methods import Feature, Freeze, Full, Lora, Method, MultitaskPrompt, Prompt, Tokens, is_adapter
from ftray.errors import ModelError
from ftray.models.adapters import KINDS, Setting, begin_prompt, unknown_tokens
from ftray.models.heads import Head, add_head, begin_head, head_parameters, pool_where_texts_end
from ftray.models.layers import adaptable, blocks, chosen, did_you_mean, is_called, leaves, short_names, sides
from ftray.models.load import load_tokenizer, meta_model, origin


def adapt(
    model: Any,
    method: Method,
    *,
    seed: int,
    fp32: bool = True,
    steps: int = 1,
    tasks: Sequence[str] = (),
    prompt: Any = None,
) -> Any:
    """Marks what learns; wraps the model with PEFT for adapters. Checks the method against it first (ModelError).

    `fp32` keeps learning weights in fp32 (autocast brings them down); under ZeRO, DeepSpeed keeps its own fp32 copy,
    so False saves memory there. Adapters begin the same on every worker: they are drawn from `seed`. `steps`: updates
    of the whole run, over which AdaLoRA spreads its budget. `tasks`: names of those whose rows a multitask prompt will
    read; `prompt`: [virtual tokens, width], of the version that a prompt begins as. A head that the base lacks begins
    here, and learns with every method.
    """
    import torch

    _check(model, method)
    if isinstance(method, Feature):
        model.begin(seed=seed)
        return model
    begin_head(model, seed=seed)
    if is_adapter(method):
        setting = Setting(seed, steps, lambda: load_tokenizer(origin(model).model), tasks, prompt)
        model = _add_adapter(model, method, setting, fp32=fp32)
    elif isinstance(method, Freeze):
        wanted = frozen_choice(model, method)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in wanted)
    else:
        model.requires_grad_(True)
    if fp32:
        for parameter in trainable(model).values():
            if parameter.dtype != torch.float32 and not hasattr(parameter, "ds_id"):
                parameter.data = parameter.data.float()
    return model


def trainable(model: Any) -> dict[str, Any]:
    """The parameters that learn, by name, in the model's order; the same names inside DeepSpeed or DDP."""
    return {name: parameter for name, parameter in unwrap(model).named_parameters() if parameter.requires_grad}


def switches_off(method: Method) -> bool:
    """Whether the model without its adapter is the base: PiSSA takes its start out of the base's weights."""
    return is_adapter(method) and not (isinstance(method, Lora) and method.init == "pissa")


def unwrap(model: Any) -> Any:
    """The model inside DeepSpeed's or DDP's wrapper."""
    import torch

    while isinstance(getattr(model, "module", None), torch.nn.Module):
        model = model.module
    return model


def is_adapted(model: Any) -> bool:
    """Whether it is a base under a PEFT adapter, which can be switched off."""
    from peft import PeftModel

    return isinstance(model, PeftModel)


def check_method(model_config: Any, method: Method, tokenizer: Any = None, *, head: Head | None = None) -> None:
    """Checks a method against a base by its configuration alone, no weights read. ModelError names every problem."""
    _check(meta_model(model_config, head=head), method, tokenizer)


def servability(method: Method) -> str:
    """How a version that writes is served: "adapter" (many in one batch), "merge" (beside those, or merged into the
    base), "beside" (beside those only), or "model" (its own model)."""
    if not is_adapter(method):
        return "model"
    if isinstance(method, Lora):
        return "merge" if method.dora or method.modules_to_save else "adapter"
    if isinstance(method, Feature):
        return "none"
    return KINDS[method.kind].served


READ_BY_ENCODERS = ("lora", "adalora", "loha", "lokr", "ia3", "oft", "norms", "feature")
"""What has its whole state in its file, so that the encoder engine takes it (models/encoder_files.py)."""


def reader_servability(method: Method, *, encoder: bool) -> str:
    """The same of a version under a head, on the encoder engine: "adapter", "model", "merge" (as a model, once it is
    merged), or "none". A causal base's head is not served."""
    if not encoder:
        return "none"
    if not is_adapter(method):
        return "model"
    if method.kind in READ_BY_ENCODERS:
        return "adapter"
    return "merge" if KINDS[method.kind].served == "merge" else "none"


def default_lr(method: Method, parameters: int, *, head: bool = False, tags: bool = False) -> float:
    """Peak learning rate where the run says auto; `parameters` is the size of the base.

    Full rates fall with size as in the model reports (1e-3 at 5 M, 2e-5 from 1 B on); LoRA takes about ten times the
    full rate (LoRA Without Regret, Thinking Machines 2025), at most 2e-3. Smaller methods have a rate of their own.

    Under a `head`, which learns at the same rate, all are lower: full a third (1e-4 for a MiniLM of 23 M, 3e-5 for a
    BERT of 110 M), LoRA five times the full rate above, at most 1e-3, and none more than 5e-3. Over `tags` of words,
    most of which are no entity, LoRA takes that full rate itself: at three times of it a MiniLM calls every word so.

    A head alone over a frozen base takes 3e-3, with a hidden layer 1e-3: its vectors are of one size, whatever the
    base's is.
    """
    if isinstance(method, Feature):
        return 1e-3 if method.hidden else 3e-3
    if method.kind in KINDS:
        return min(KINDS[method.kind].lr, 5e-3) if head else KINDS[method.kind].lr
    full = min(1e-3, max(2e-5, 1e-3 * math.sqrt(5e6 / max(parameters, 1)) ** 1.5))
    if head:
        rates = {"full": full / 3, "freeze": full}
        return round(rates.get(method.kind, full if tags else min(1e-3, 5 * full)), 7)
    if isinstance(method, Full):
        return round(full, 7)
    if isinstance(method, Freeze):
        return round(min(1e-3, 2 * full), 7)
    return round(min(2e-3, 10 * full), 7)


def lora_targets(model: Any, method: Lora) -> dict[str, Any]:
    """The layers a LoRA method adapts, by full name. ModelError when a target names none."""
    return chosen(model, method.targets)


def frozen_choice(model: Any, method: Freeze) -> set[str]:
    """Names of the parameters that a freeze method trains."""
    names = [name for name, _ in model.named_parameters()]
    wanted: set[str] = set()
    if method.last_layers:
        prefix, count = _blocks(model)
        last = range(count - method.last_layers, count)
        wanted.update(name for i in last for name in names if name.startswith(f"{prefix}.{i}."))
    for pattern in method.train:
        wanted.update(name for name in names if matches(name, pattern))
    if method.embeddings:
        wanted.update(_parameters_of(model, [model.get_input_embeddings()]))
    if method.head:
        wanted.update(_parameters_of(model, [model.get_output_embeddings()]))
    wanted.update(head_parameters(model))
    if method.norms:
        wanted.update(_parameters_of(model, (m for m in model.modules() if "norm" in type(m).__name__.lower())))
    return wanted


def matches(name: str, pattern: str) -> bool:
    """Whether whole dotted parts of a parameter's name fit a glob: "layers.1" fits layers.1.x and not layers.10.x."""
    return fnmatchcase(name, pattern) or fnmatchcase(f".{name}.", f"*.{pattern}.*")


def _parameters_of(model: Any, modules: Iterable[Any]) -> set[str]:
    ids = {id(parameter) for module in modules if module is not None for parameter in module.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in ids}


def _blocks(model: Any) -> tuple[str, int]:
    """Name and number of the model's blocks."""
    depth = model.config.get_text_config().num_hidden_layers
    if (found := blocks(model)) is not None:
        return found[0], depth
    raise ModelError(
        f"method.last_layers: {type(model).__name__} has no list of {depth} blocks; name patterns in train"
    )


def _add_adapter(model: Any, method: Any, setting: Setting, *, fp32: bool) -> Any:
    import torch
    from peft import get_peft_model

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unsupported layer type")  # norms
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")  # tokens, which reach the head too
        torch.manual_seed(setting.seed)
        lora = isinstance(method, Lora)
        config = lora_config(model, method) if lora else KINDS[method.kind].config(model, method, setting)
        add_head(config, model)
        adapted = get_peft_model(model, config, autocast_adapter_dtype=fp32)
        if isinstance(method, Prompt | MultitaskPrompt):
            begin_prompt(adapted, method, setting)
        pool_where_texts_end(adapted)
    if lora and method.init == "pissa":
        adapted.ftray_pissa_start = {
            name: parameter.detach().float().cpu().clone()
            for name, parameter in trainable(adapted).items()
            if ".lora_A." in name or ".lora_B." in name
        }
    return adapted


def pissa_start(adapted: Any) -> dict[str, Any]:
    """A and B as PiSSA began them (fp32, CPU), by the names of `trainable`: their product was taken from the base."""
    return adapted.ftray_pissa_start


def lora_config(model: Any, method: Lora) -> Any:
    """PEFT's configuration for a LoRA method on this model; names are sorted, so that equal runs write equal files."""
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    layers = lora_targets(model, method)
    alpha = method.alpha if method.alpha is not None else 2 * method.rank
    saved = _saved_modules(model, method)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=method.rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # type: ignore[arg-type]
        lora_dropout=method.dropout,
        target_modules=short_names(layers, method.targets),
        use_rslora=method.rslora,
        use_dora=method.dora,
        init_lora_weights=True if method.init == "default" else method.init,  # type: ignore[arg-type]
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in layers.values()),
        modules_to_save=saved or None,
        ensure_weight_tying=_touches_tied(model, saved),
    )


def _saved_modules(model: Any, method: Lora) -> list[str]:
    """Full names: PEFT takes "norm" for every module whose name ends in norm, we for those called norm."""
    return [
        name for name, _ in model.named_modules() if any(is_called(name, saved) for saved in method.modules_to_save)
    ]


def _touches_tied(model: Any, names: list[str]) -> bool:
    """Whether one of the modules is tied to another: then both must learn the same, or merging loses one."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or not model.config.get_text_config().tie_word_embeddings:
        return False
    return any(module is head or module is embeddings for name, module in model.named_modules() if name in names)


def _check(model: Any, method: Method, tokenizer: Any = None) -> None:
    problems: list[str] = []
    if isinstance(method, Freeze):
        problems += _freeze_problems(model, method)
    elif isinstance(method, Lora):
        problems += _lora_problems(model, method)
    elif method.kind in KINDS:
        problems += KINDS[method.kind].problems(model, method)
    if isinstance(method, Tokens) and tokenizer is not None:
        problems += unknown_tokens(method, tokenizer)
    if problems:
        raise ModelError("\n".join(problems))


def _freeze_problems(model: Any, method: Freeze) -> Iterable[str]:
    if method.last_layers and method.last_layers > (count := _blocks(model)[1]):
        yield f"method.last_layers: {method.last_layers} is more than the model's {count} blocks; for all: kind: full"
    names = [name for name, _ in model.named_parameters()]
    for pattern in method.train:
        if not any(matches(name, pattern) for name in names):
            parts = {part for name in names for part in name.split(".") if not part.isdigit()}
            yield f"method.train: {pattern!r} fits no parameter{did_you_mean(pattern, parts)}"


def _lora_problems(model: Any, method: Lora) -> Iterable[str]:
    modules = {name: module for name, module in model.named_modules() if name}
    own = leaves(model)
    linear = [name for name, module in own.items() if adaptable(module)]
    for target in [] if method.targets == "auto" else method.targets:
        found = [name for name in modules if is_called(name, target)]
        if not found:
            yield f"method.targets: no layer is called {target!r}{did_you_mean(target, linear)}"
        elif not any(adaptable(modules[name]) for name in found):
            kind = type(modules[found[0]]).__name__
            yield f"method.targets: {target!r} is a {kind}; LoRA adapts linear layers and embeddings"
    for saved in method.modules_to_save:
        if not any(is_called(name, saved) for name in modules):
            yield f"method.modules_to_save: no module is called {saved!r}{did_you_mean(saved, own)}"
    if method.init == "orthogonal" and method.rank % 2:
        yield f"method.rank: orthogonal init needs an even rank, not {method.rank}; use {method.rank + 1}"
    small = {
        name: min(sides(module))
        for name, module in lora_targets(model, method).items()
        if adaptable(module) and min(sides(module)) < method.rank
    }
    if small:
        name = min(small, key=lambda key: small[key])
        yield (
            f"method.rank: {method.rank} is larger than the smaller side of {name} ({small[name]}); "
            f"use at most {small[name]}, or leave {name.rsplit('.', 1)[-1]} out of targets"
        )
