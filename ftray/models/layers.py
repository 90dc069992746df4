"""The layers of a model by the names that run files use for them, and what is wrong with such names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ftray.models.heads import head_modules
from ftray.models.load import linear_modules, linear_shape

# What architectures call them; a name with a dot says in which module.
KEYS_AND_VALUES = (
    "k_proj",
    "v_proj",
    "key",
    "value",
    "key_proj",
    "value_proj",
    "c_attn",
    "query_key_value",
    "qkv_proj",
    "k_lin",
    "v_lin",
    "Wqkv",
)
ATTENTION_OUT = (
    "o_proj",
    "out_proj",
    "attn.c_proj",
    "self_attention.dense",
    "self_attn.dense",
    "attention.dense",
    "wo",
    "attention.output.dense",
    "out_lin",
    "attn.Wo",
)
MLP_OUT = (
    "down_proj",
    "fc2",
    "mlp.c_proj",
    "dense_4h_to_h",
    "fc_out",
    "w2",
    "output.dense",
    "lin2",
    "mlp.Wo",
    "ffn_output",
)


def is_called(name: str, target: str) -> bool:
    """Whether a module with this full name is what a run file calls `target`: its whole name, or the end of it."""
    return name == target or name.endswith(f".{target}")


def chosen(model: Any, targets: str | Sequence[str]) -> dict[str, Any]:
    """The modules that `targets` names, by full name; "auto" is every linear layer but the head.

    A head that reads learns whole, so nothing in it is ever chosen.
    """
    if targets == "auto":
        return linear_modules(model)
    heads = tuple(head_modules(model))
    return {
        name: module
        for name, module in model.named_modules()
        if any(is_called(name, target) for target in targets)
        and not any(name == head or name.startswith(f"{head}.") for head in heads)
    }


def is_attention_out(name: str) -> bool:
    return any(is_called(name, end) for end in ATTENTION_OUT)


def is_mlp_out(name: str) -> bool:
    """BERT calls the last layers of both parts `output.dense`."""
    return not is_attention_out(name) and any(is_called(name, end) for end in MLP_OUT)


def is_keys_or_values(name: str) -> bool:
    return any(is_called(name, end) for end in KEYS_AND_VALUES)


def called_in(model: Any, places: dict[str, Any]) -> list[str]:
    """The places as an adapter's configuration lists them: by the tables' names where these name nothing else."""
    ends = (*KEYS_AND_VALUES, *ATTENTION_OUT, *MLP_OUT)
    short = sorted({end for end in ends if any(is_called(name, end) for name in places)})
    return short if chosen(model, short).keys() == places.keys() else sorted(places)


def short_names(modules: dict[str, Any], targets: str | Sequence[str]) -> list[str]:
    """What an adapter's configuration lists for `targets`, sorted, so that equal runs write equal files."""
    return sorted({name.rsplit(".", 1)[-1] for name in modules} if targets == "auto" else set(targets))


def adaptable(module: Any) -> bool:
    import torch
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (torch.nn.Linear, torch.nn.Embedding, Conv1D))


def sides(module: Any) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer, (rows, width) of an embedding."""
    if hasattr(module, "num_embeddings"):
        return module.num_embeddings, module.embedding_dim
    return linear_shape(module)


def leaves(model: Any) -> dict[str, Any]:
    """Modules with weights of their own and none inside."""
    named = {name: module for name, module in model.named_modules() if name}
    return {n: module for n, module in named.items() if not list(module.children()) and list(module.parameters())}


def linear_problems(model: Any, targets: str | Sequence[str], *, kind: str, conv1d: bool) -> Iterator[str]:
    """What keeps a method that adapts linear layers only from these targets. `conv1d`: it takes GPT-2's layers too."""
    from transformers.pytorch_utils import Conv1D

    modules = {name: module for name, module in model.named_modules() if name}
    linear = linear_modules(model)
    for target in [] if targets == "auto" else targets:
        found = [name for name in modules if is_called(name, target)]
        if not found:
            yield f"method.targets: no layer is called {target!r}{did_you_mean(target, linear)}"
        elif not any(adaptable(modules[name]) and not hasattr(modules[name], "num_embeddings") for name in found):
            yield f"method.targets: {target!r} is a {type(modules[found[0]]).__name__}; {kind} adapts linear layers"
    if not conv1d and any(isinstance(module, Conv1D) for module in chosen(model, targets).values()):
        yield f"method.kind: {kind} cannot adapt the Conv1D layers of a {type(model).__name__}; use kind: lora"


def did_you_mean(word: str, names: Iterable[str]) -> str:
    names = list(names)
    known = sorted({name.rsplit(".", 1)[-1] for name in names})
    close = difflib.get_close_matches(word, known, n=1) or difflib.get_close_matches(word, names, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    shown = ", ".join(known[:12])
    return f"; there are {shown}{', ...' if len(known) > 12 else ''}"


def blocks(model: Any) -> tuple[str, Sequence[Any]] | None:
    """Name and blocks of the model, where they lie in a list."""
    import torch

    depth = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth:
            return name, list(module)
    return None
