"""Virtual tokens: what prompt methods put before a text, in training, answers and files.

A version holds what comes of the learning, one tensor: the embeddings, or for prefix tuning keys and values. An MLP
that made them while training is not needed afterwards. Where several tasks learn together, the version's own tensor is
what they share, and a file beside it has each task's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ftray.errors import ModelError
from ftray.models.heads import head_of

if TYPE_CHECKING:  # torch
    from ftray.models.task_prompts import TaskPrompts

TENSOR = "prompt_embeddings"
TASKS = "tasks.safetensors"


class Tasked(Protocol):
    def task(self, i: int) -> str: ...


def count(model: Any) -> int:
    """Virtual tokens that the model puts before a text; 0 for another method, or while they are left away."""
    config = _prompt_config(model)
    return 0 if config is None or getattr(model, "_adapters_disabled", False) else config.num_virtual_tokens


def embedded(model: Any) -> int:
    """Those of them that are computed with the text, so that the model gives outputs for them too."""
    config = _prompt_config(model)
    return 0 if config is None or config.peft_type == "PREFIX_TUNING" else count(model)


def cache(model: Any, rows: int) -> Any:
    """A cache that holds the virtual tokens for so many rows: what an answer goes on from."""
    from transformers import DynamicCache

    config = _prompt_config(model)
    assert config is not None
    if config.peft_type == "PREFIX_TUNING":
        return model.get_prompt(batch_size=rows)
    base = model.get_base_model()
    filled = DynamicCache(config=base.config.get_text_config(decoder=True))
    embeds = model.get_prompt(batch_size=rows).to(base.get_input_embeddings().weight.dtype)
    base(inputs_embeds=embeds, past_key_values=filled, use_cache=True)
    return filled


@contextmanager
def left_away(model: Any) -> Iterator[None]:
    """Inside, the model is its base: virtual tokens change it from the first step, other adapters begin as the base."""
    if _prompt_config(model) is None:
        yield
        return
    if head_of(model) is None:
        with model.disable_adapter():
            yield
        return
    as_before = model.forward  # PEFT's own way asks for what only models that write have
    model.forward, model._adapters_disabled = model.base_model.forward, True
    try:
        yield
    finally:
        model.forward, model._adapters_disabled = as_before, False


def of_tasks(model: Any, tasks: Sequence[str]) -> AbstractContextManager[None]:
    """Inside, row i of what the model reads is of tasks[i]; of none, and for any other method, no row has one."""
    encoder = _task_prompts(model)
    return nullcontext() if encoder is None else encoder.asked(tasks)


def of_rows(model: Any, store: Tasked, rows: Sequence[int]) -> AbstractContextManager[None]:
    """`of_tasks`, for a batch of these rows of a store."""
    return of_tasks(model, [store.task(row) for row in rows]) if _task_prompts(model) is not None else nullcontext()


def task_embeddings(model: Any, learnt: Mapping[str, Any]) -> dict[str, Any]:
    """`embeddings` of each task, by its name; {} where there are no tasks."""
    encoder = _task_prompts(model)
    found = {}
    for task in encoder.tasks if encoder is not None else ():
        with of_tasks(model, [task]):
            found[task] = embeddings(model, learnt)
    return found


def as_prompt(config: Any) -> Any:
    """PEFT's configuration of prompt tuning with what one of several tasks holds: both compute the same."""
    from peft import PromptTuningConfig

    return PromptTuningConfig(
        task_type=config.task_type,
        num_virtual_tokens=config.num_virtual_tokens,
        token_dim=config.token_dim,
        num_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        num_transformer_submodules=config.num_transformer_submodules,
    )


def embeddings(model: Any, learnt: Mapping[str, Any]) -> Any:
    """[virtual tokens, width]: what a version holds, computed in fp32 from what was learnt (names of `trainable`)."""
    import torch

    prefix = "prompt_encoder.default."
    values = {name.removeprefix(prefix): tensor for name, tensor in learnt.items() if name.startswith(prefix)}
    tokens = torch.arange(model.peft_config["default"].num_virtual_tokens)
    with torch.no_grad():
        return torch.func.functional_call(model.prompt_encoder["default"], values, (tokens[None],))[0]


def read_back(model: Any, path: Path) -> dict[str, Any]:
    """Puts a version's virtual tokens in place of what made them; what its file holds beside them, such as a head.

    ModelError where they do not fit.
    """
    import torch
    from safetensors.torch import load_file

    found = load_file(path)
    config, encoder = model.peft_config["default"], model.prompt_encoder["default"]
    layers = 2 * config.num_layers if config.peft_type == "PREFIX_TUNING" else 1
    wanted = (config.num_virtual_tokens, layers * config.token_dim)
    tensor = found.pop(TENSOR, None)
    if tensor is None or (found and head_of(model) is None) or tuple(tensor.shape) != wanted:
        shapes = {name: tuple(one.shape) for name, one in load_file(path).items()}
        raise ModelError(f"{path.parent}: holds {shapes} where {TENSOR} {wanted} belongs; it comes from another method")
    if (tasks := _task_prompts(model)) is not None:
        tasks.read(torch.stack([*_read_tasks(path.parent / TASKS, tasks.tasks), tensor]))
        return found
    weight = encoder.embedding.weight
    encoder.embedding = torch.nn.Embedding.from_pretrained(tensor.to(weight.device, weight.dtype))
    config.inference_mode = True
    return found


def _read_tasks(path: Path, tasks: Sequence[str]) -> list[Any]:
    """Each task's tensor. ModelError where the version is of other tasks."""
    from safetensors.torch import load_file

    found = load_file(path) if path.exists() else {}
    if found.keys() != set(tasks):
        raise ModelError(f"{path.parent}: has prompts for {sorted(found)}, and the run's tasks are {sorted(tasks)}")
    return [found[task] for task in tasks]


def _task_prompts(model: Any) -> TaskPrompts | None:
    from ftray.models.task_prompts import TaskPrompts

    encoders = getattr(model, "prompt_encoder", {})  # a ModuleDict has no get
    found = encoders["default"] if "default" in encoders else None  # noqa: SIM401
    return found if isinstance(found, TaskPrompts) else None


def _prompt_config(model: Any) -> Any:
    config = getattr(model, "active_peft_config", None)
    return config if config is not None and config.is_prompt_learning else None
