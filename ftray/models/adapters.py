"""PEFT's methods beside LoRA, and our bottleneck: a row a kind, with its configuration and what must fit the model.

`config(model, method, …)` is PEFT's configuration; `problems(model, method)` says what does not fit, a line a key.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ftray.config.methods import (
    AdaLora,
    Bottleneck,
    Ia3,
    LoHa,
    LoKr,
    MultitaskPrompt,
    Norms,
    Oft,
    Prefix,
    Prompt,
    PTuning,
    Tokens,
    Vera,
)
from ftray.models.heads import head_of
from ftray.models.layers import (
    MLP_OUT,
    adaptable,
    called_in,
    chosen,
    did_you_mean,
    is_attention_out,
    is_called,
    is_keys_or_values,
    is_mlp_out,
    linear_problems,
    short_names,
    sides,
)
from ftray.models.load import norm_layers

Served = Literal["adapter", "merge", "beside"]
TASK = "CAUSAL_LM"


@dataclass(frozen=True)
class Setting:
    """What a configuration may depend on beside the model: the run's seed, its steps, the base's tokenizer, the tasks
    of its rows, and the prompt of the version that it names to begin with, [virtual tokens, width]."""

    seed: int
    steps: int
    tokenizer: Callable[[], Any]
    tasks: Sequence[str] = ()
    prompt: Any = None


@dataclass(frozen=True)
class Kind:
    """`served`: "adapter" in the bank, "merge" beside it or merged, "beside" it only. `lr`: where a run says auto."""

    config: Callable[[Any, Any, Setting], Any]
    problems: Callable[[Any, Any], Iterable[str]]
    served: Served
    lr: float


def ada_lora_config(model: Any, method: AdaLora, setting: Setting) -> Any:
    """A tenth of the steps with every rank, then ranks fall for six tenths, and three tenths train what is left."""
    from peft import AdaLoraConfig

    steps = max(1, setting.steps)
    alpha = method.alpha if method.alpha is not None else 2 * method.first_rank
    return AdaLoraConfig(
        task_type=TASK,
        init_r=method.first_rank,
        target_r=method.rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=method.dropout,
        target_modules=short_names(chosen(model, method.targets), method.targets),
        orth_reg_weight=method.orthogonality,
        total_step=steps,
        tinit=steps // 10,
        tfinal=3 * steps // 10,
        deltaT=max(1, steps // 200),
        fan_in_fan_out=_is_conv1d(model, method.targets),
    )


def ada_lora_problems(model: Any, method: AdaLora) -> Iterable[str]:
    yield from linear_problems(model, method.targets, kind=method.kind, conv1d=True)
    yield from _too_large(model, method.targets, method.first_rank, "method.start_rank")


def lo_ha_config(model: Any, method: LoHa, setting: Setting) -> Any:
    from peft import LoHaConfig

    targets = short_names(chosen(model, method.targets), method.targets)
    alpha: Any = method.alpha if method.alpha is not None else method.rank
    return LoHaConfig(task_type=TASK, r=method.rank, alpha=alpha, target_modules=targets)


def lo_kr_config(model: Any, method: LoKr, setting: Setting) -> Any:
    from peft import LoKrConfig

    targets = short_names(chosen(model, method.targets), method.targets)
    alpha: Any = method.alpha if method.alpha is not None else method.rank
    factor = method.factor if method.factor is not None else -1
    return LoKrConfig(task_type=TASK, r=method.rank, alpha=alpha, decompose_factor=factor, target_modules=targets)


def linear_only_problems(model: Any, method: LoHa | LoKr) -> Iterable[str]:
    yield from linear_problems(model, method.targets, kind=method.kind, conv1d=False)


def ia3_config(model: Any, method: Ia3, setting: Setting) -> Any:
    from peft import IA3Config

    targets = method.targets
    if targets == "auto":
        targets = called_in(model, ia3_targets(model, method)[0])
    return IA3Config(
        task_type=TASK,
        target_modules=sorted(targets),
        feedforward_modules=[target for target in sorted(targets) if any(is_called(target, end) for end in MLP_OUT)],
        fan_in_fan_out=_is_conv1d(model, method.targets),
    )


def ia3_targets(model: Any, method: Ia3) -> tuple[dict[str, Any], dict[str, Any]]:
    """(all layers with a scale, those of them whose inputs are scaled: the MLP's last)."""
    if method.targets == "auto":
        linear = chosen(model, "auto")
        found = {name: module for name, module in linear.items() if is_keys_or_values(name) or is_mlp_out(name)}
    else:
        found = chosen(model, method.targets)
    return found, {name: m for name, m in found.items() if any(is_called(name, t) for t in MLP_OUT)}


def ia3_problems(model: Any, method: Ia3) -> Iterable[str]:
    yield from linear_problems(model, method.targets, kind=method.kind, conv1d=True)
    if not ia3_targets(model, method)[0]:
        yield f"method.targets: auto knows no keys and values in a {type(model).__name__}; name the layers"


def oft_config(model: Any, method: Oft, setting: Setting) -> Any:
    from peft import OFTConfig

    targets = short_names(chosen(model, method.targets), method.targets)
    return OFTConfig(task_type=TASK, r=0, oft_block_size=method.block, target_modules=targets)


def oft_problems(model: Any, method: Oft) -> Iterable[str]:
    yield from linear_problems(model, method.targets, kind=method.kind, conv1d=False)
    inputs = {sides(module)[0] for module in chosen(model, method.targets).values() if adaptable(module)}
    if odd := sorted(size for size in inputs if size % method.block):
        common = math.gcd(*inputs)
        fit = max((b for b in range(2, min(common, 2 * method.block) + 1) if common % b == 0), default=None)
        way = f"use {fit}" if fit else "name targets whose inputs have a common divisor"
        yield f"method.block: {method.block} does not divide inputs of {odd[0]}; {way}"


def vera_config(model: Any, method: Vera, setting: Setting) -> Any:
    from peft import VeraConfig

    return VeraConfig(
        task_type=TASK,
        r=method.rank,
        vera_dropout=method.dropout,
        target_modules=short_names(chosen(model, method.targets), method.targets),
        projection_prng_key=setting.seed,
        save_projection=True,
        fan_in_fan_out=_is_conv1d(model, method.targets),
    )


def vera_problems(model: Any, method: Vera) -> Iterable[str]:
    yield from linear_problems(model, method.targets, kind=method.kind, conv1d=True)


def norms_config(model: Any, method: Norms, setting: Setting) -> Any:
    from peft import LNTuningConfig

    return LNTuningConfig(task_type=TASK, target_modules=short_names(norm_layers(model), "auto"))


def norms_problems(model: Any, method: Norms) -> Iterable[str]:
    if not norm_layers(model):
        yield f"method.kind: a {type(model).__name__} has no normalisation layers with weights; use another method"


def tokens_config(model: Any, method: Tokens, setting: Setting) -> Any:
    from peft import TrainableTokensConfig

    ids = token_ids(method, setting.tokenizer())
    embeddings = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embeddings)
    return TrainableTokensConfig(task_type=TASK, token_indices=ids, target_modules=[name.rsplit(".", 1)[-1]])


def token_ids(method: Tokens, tokenizer: Any) -> list[int]:
    known = tokenizer.get_vocab()
    return sorted({known[token] if isinstance(token, str) else token for token in method.tokens})


def tokens_problems(model: Any, method: Tokens) -> Iterable[str]:
    size = model.config.get_text_config().vocab_size
    for token in method.tokens:
        if isinstance(token, int) and not 0 <= token < size:
            yield f"method.tokens: there is no token {token}; ids are 0 to {size - 1}"


def unknown_tokens(method: Tokens, tokenizer: Any) -> Iterable[str]:
    known = tokenizer.get_vocab()
    for token in method.tokens:
        if isinstance(token, str) and token not in known:
            pieces = tokenizer.tokenize(token)
            inside = f"; it is read as {pieces}, name those" if pieces else ""
            yield f"method.tokens: {token!r} is no token of the base{inside or did_you_mean(token, known)}"


def bottleneck_config(model: Any, method: Bottleneck, setting: Setting) -> Any:
    from ftray.models.bottleneck import BottleneckConfig

    targets = method.targets
    if targets == "auto":
        places = bottleneck_places(model, method)
        targets = short_names(places, "auto") if method.placement == "parallel" else called_in(model, places)
    return BottleneckConfig(
        task_type=TASK,
        target_modules=sorted(targets),
        size=method.size,
        width=model.config.get_text_config().hidden_size,
        parallel=method.placement == "parallel",
        activation=method.activation,
        scale=method.scale,
        dropout=method.dropout,
    )


def bottleneck_places(model: Any, method: Bottleneck) -> dict[str, Any]:
    if method.targets != "auto":
        return chosen(model, method.targets)
    linear = chosen(model, "auto")
    if method.placement != "parallel":
        both = method.placement == "houlsby"
        return {name: m for name, m in linear.items() if is_mlp_out(name) or (both and is_attention_out(name))}
    parents = Counter(name.rsplit(".", 1)[0] for name in linear)
    # what holds the MLP's last layer alone is not the MLP: BERT's blocks have its two halves apart
    inside = {parent for name in linear if is_mlp_out(name) and parents[parent := name.rsplit(".", 1)[0]] > 1}
    return {name: module for name, module in model.named_modules() if name in inside}


def bottleneck_problems(model: Any, method: Bottleneck) -> Iterable[str]:
    modules = [name for name, _ in model.named_modules() if name]
    for target in [] if method.targets == "auto" else method.targets:
        if not any(is_called(name, target) for name in modules):
            yield f"method.targets: no module is called {target!r}{did_you_mean(target, modules)}"
    places = bottleneck_places(model, method)
    if method.targets == "auto" and not places:
        yield f"method.targets: auto knows no {method.placement} places in a {type(model).__name__}; name the modules"
    hidden = model.config.get_text_config().hidden_size
    for name, module in places.items():
        if method.placement != "parallel" and adaptable(module) and sides(module)[1] != hidden:
            yield f"method.targets: {name} gives {sides(module)[1]} numbers and not the model's {hidden}; leave it out"
            return


def prefix_config(model: Any, method: Prefix, setting: Setting) -> Any:
    from peft import PrefixTuningConfig

    text = model.config.get_text_config()
    heads, width = kv_shape(model)
    return PrefixTuningConfig(
        task_type=TASK,
        num_virtual_tokens=method.tokens,
        prefix_projection=method.projection is not None,
        encoder_hidden_size=method.projection,  # type: ignore[arg-type]  # None is PEFT's default
        num_layers=text.num_hidden_layers,
        num_attention_heads=heads,
        token_dim=heads * width,
    )


def kv_shape(model: Any) -> tuple[int, int]:
    """(heads, width of a head) of the keys and values."""
    text = model.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return heads, getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def prompt_config(model: Any, method: Prompt, setting: Setting) -> Any:
    from peft import PromptTuningConfig

    # `begin_prompt` sets how it begins: PEFT would look for a tokenizer by the base's name wherever it is loaded
    return PromptTuningConfig(task_type=TASK, num_virtual_tokens=method.tokens)


def multitask_prompt_config(model: Any, method: MultitaskPrompt, setting: Setting) -> Any:
    from peft import MultitaskPromptTuningConfig

    return MultitaskPromptTuningConfig(
        task_type=TASK, num_virtual_tokens=method.tokens, num_ranks=method.rank, num_tasks=len(setting.tasks)
    )


def begin_prompt(adapted: Any, method: Prompt | MultitaskPrompt, setting: Setting) -> None:
    """Virtual tokens begin as a version's, as the text's embeddings, over again until there are enough, or as random
    tokens' ones."""
    import torch

    from ftray.models.task_prompts import TaskPrompts

    table = adapted.get_base_model().get_input_embeddings().weight
    if isinstance(method, MultitaskPrompt):
        adapted.prompt_encoder["default"] = TaskPrompts(
            setting.tasks, tokens=method.tokens, width=table.shape[1], rank=method.rank
        ).to(table.device)
    encoder = adapted.prompt_encoder["default"]
    if setting.prompt is not None:
        with torch.no_grad():
            encoder.embedding.weight.copy_(setting.prompt)
        return
    if method.text is not None:
        ids = setting.tokenizer()(method.text, add_special_tokens=False)["input_ids"]
        ids = (ids * -(-method.tokens // len(ids)))[: method.tokens]
    else:
        generator = torch.Generator().manual_seed(setting.seed)
        ids = torch.randint(len(setting.tokenizer()), (method.tokens,), generator=generator).tolist()
    with torch.no_grad():
        encoder.embedding.weight.copy_(table[torch.tensor(ids, device=table.device)])


def p_tuning_config(model: Any, method: PTuning, setting: Setting) -> Any:
    from peft import PromptEncoderConfig

    return PromptEncoderConfig(task_type=TASK, num_virtual_tokens=method.tokens, encoder_hidden_size=method.width)


def virtual_problems(model: Any, method: Prefix | Prompt | MultitaskPrompt | PTuning) -> Iterable[str]:
    if isinstance(method, Prefix) and head_of(model) is not None and not _takes_prefix(model):
        yield f"method.kind: a {type(model).__name__} takes no keys and values before the text; use prompt or p_tuning"
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest and method.tokens >= longest // 2:
        yield f"method.tokens: {method.tokens} leave little of the base's {longest} positions; use {longest // 16}"
    if isinstance(method, Prompt | MultitaskPrompt) and method.text is not None and not method.text:
        yield "method.text: is empty; leave it out, or write what the model should do"


def _takes_prefix(model: Any) -> bool:
    """PEFT gives a prefix to the model, or to the base inside, whose second output it then takes for the pooled one if
    the head is for a whole text."""
    if "past_key_values" in inspect.signature(model.forward).parameters:
        return True
    inside, head = model.base_model, head_of(model)
    pooled = bool(getattr(inside, "pooler", None)) or (head is not None and head.task == "TOKEN_CLS")
    return "past_key_values" in inspect.signature(inside.forward).parameters and pooled


KINDS: dict[str, Kind] = {
    "adalora": Kind(ada_lora_config, ada_lora_problems, "adapter", 5e-3),
    "loha": Kind(lo_ha_config, linear_only_problems, "merge", 2e-3),
    "lokr": Kind(lo_kr_config, linear_only_problems, "merge", 2e-3),
    "ia3": Kind(ia3_config, ia3_problems, "merge", 1e-2),
    "oft": Kind(oft_config, oft_problems, "merge", 1e-3),
    "vera": Kind(vera_config, vera_problems, "merge", 1e-2),
    "norms": Kind(norms_config, norms_problems, "merge", 3e-3),
    "tokens": Kind(tokens_config, tokens_problems, "merge", 5e-3),
    "bottleneck": Kind(bottleneck_config, bottleneck_problems, "beside", 1e-3),
    "prefix": Kind(prefix_config, virtual_problems, "beside", 1e-2),
    "prompt": Kind(prompt_config, virtual_problems, "beside", 2e-2),
    "multitask_prompt": Kind(multitask_prompt_config, virtual_problems, "beside", 2e-2),
    "p_tuning": Kind(p_tuning_config, virtual_problems, "beside", 3e-3),
}


def _too_large(model: Any, targets: Any, rank: int, key: str) -> Iterable[str]:
    small = {name: min(sides(m)) for name, m in chosen(model, targets).items() if adaptable(m) and min(sides(m)) < rank}
    if small:
        name = min(small, key=lambda one: small[one])
        yield f"{key}: {rank} is larger than the smaller side of {name} ({small[name]}); use at most {small[name]}"


def _is_conv1d(model: Any, targets: Any) -> bool:
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(module, Conv1D) for module in chosen(model, targets).values())
