"""Heads: what stands on a base that reads, instead of the layer that writes. One number, or one a label, for a text or
for each of its tokens.

A headed model is transformers' own (`…ForSequenceClassification`, `…ForTokenClassification`), so a version loads with
plain transformers and PEFT. Its head always learns: the layers behind the base, and the pooler before them, which a
base may lack or may never have used. `ftray_head` on the model says what it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ftray.errors import ModelError

Task = Literal["SEQ_CLS", "TOKEN_CLS"]
"""A label of the whole text, or one of each token; PEFT's names."""
LABELS = "labels.json"
_CLASSES: dict[Task, str] = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}
_PROBLEMS = {"one": "single_label_classification", "each": "multi_label_classification", "value": "regression"}


@dataclass(frozen=True)
class Head:
    """`labels`: names, in the order of the head's rows. `scoring`: one of them is right (softmax), each is right or not
    (sigmoid), or the head says numbers as they come, such as rewards."""

    task: Task
    labels: tuple[str, ...]
    scoring: Literal["one", "each", "value"] = "one"

    @property
    def auto_class(self) -> Any:
        import transformers

        return getattr(transformers, _CLASSES[self.task])

    def settings(self) -> dict[str, Any]:
        """What transformers keeps of it in a configuration."""
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: number for number, label in enumerate(self.labels)},
            "problem_type": _PROBLEMS[self.scoring],
        }

    def document(self) -> dict[str, Any]:
        """labels.json of a version, as models/encoder_files.py reads it."""
        return {
            "id2label": {str(number): label for number, label in enumerate(self.labels)},
            "problem_type": _PROBLEMS[self.scoring],
        }


REWARD = Head("SEQ_CLS", ("reward",), "value")
"""What an answer is worth, read at its last token."""


def head_of(model: Any) -> Head | None:
    """The head of a loaded model, PEFT's wrapper or not; None where it writes."""
    return getattr(inner(model), "ftray_head", None)


def read_head(folder: Path) -> Head | None:
    """The head of a version, by its files; None where it has none."""
    if not (folder / LABELS).is_file():
        return None
    document = json.loads((folder / LABELS).read_text(encoding="utf-8"))
    scoring = next(name for name, problem in _PROBLEMS.items() if problem == document["problem_type"])
    says_task = [path for name in ("adapter_config.json", "head.json") if (path := folder / name).is_file()]
    if says_task:
        task = json.loads(says_task[0].read_text(encoding="utf-8"))["task_type"]
    else:
        architectures = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"]
        task = "TOKEN_CLS" if architectures[0].endswith("ForTokenClassification") else "SEQ_CLS"
    names = document["id2label"]
    return Head(task, tuple(names[str(number)] for number in range(len(names))), scoring)  # type: ignore[arg-type]


def write_head(folder: Path, head: Head) -> None:
    text = json.dumps(head.document(), ensure_ascii=False, indent=2)
    (folder / LABELS).write_text(text + "\n", encoding="utf-8")


def head_modules(model: Any) -> dict[str, Any]:
    """The head's modules by full name: those beside the base, and its pooler. Empty where the model writes."""
    if head_of(model) is None:
        return {}
    core = inner(model)
    prefix = core.base_model_prefix
    beside = {name: module for name, module in core.named_children() if name != prefix}
    pooler = getattr(getattr(core, prefix), "pooler", None)
    found = {f"{prefix}.pooler": pooler, **beside}
    return {name: module for name, module in found.items() if module is not None and list(module.parameters())}


def head_parameters(model: Any) -> set[str]:
    """Names of the head's parameters."""
    return {f"{name}.{leaf}" for name, module in head_modules(model).items() for leaf, _ in module.named_parameters()}


def begin_head(model: Any, *, seed: int) -> None:
    """Draws what the base's files did not have, from `seed`: matrices as the base's own began, biases 0, norms as they
    are. Every worker, and every run with this seed, begins with the same head."""
    import torch

    from ftray.models.sharded import whole

    generator = torch.Generator().manual_seed(seed)
    spread = getattr(model.config.get_text_config(), "initializer_range", None) or 0.02
    lacking: frozenset[str] = getattr(model, "ftray_lacking", frozenset())
    for name, parameter in model.named_parameters():
        if name not in lacking:
            continue
        with whole(parameter), torch.no_grad():
            if parameter.dim() > 1:
                parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
            elif name.endswith("bias"):
                parameter.zero_()


def mark(model: Any, head: Head, missing: Iterable[str]) -> None:
    """Notes the head on a model that was just loaded. ModelError where more is missing than a head."""
    model.ftray_head = head
    model.ftray_lacking = frozenset(map(str, missing))
    strange = sorted(model.ftray_lacking - head_parameters(model))
    if strange:
        raise ModelError(
            f"model.base: {model.config.name_or_path!r} lacks {len(strange)} weights of a {type(model).__name__}, e.g. "
            f"{strange[0]}; they would be random: take a complete base"
        )


def set_head(config: Any, head: Head) -> None:
    """Puts a head into a configuration, for a model that is built from it."""
    for key, value in head.settings().items():
        setattr(config, key, value)


def add_head(config: Any, model: Any) -> None:
    """Makes a PEFT configuration one for a headed model: its task, and its head among what is learnt whole."""
    head = head_of(model)
    if head is None:
        return
    config.task_type = head.task
    config.modules_to_save = [*(getattr(config, "modules_to_save", None) or []), *head_modules(model)]


def unwrap_heads(adapted: Any) -> None:
    """Puts the learnt heads where PEFT's wrappers of them are: not every method's merging looks for these."""
    from peft.utils.other import ModulesToSaveWrapper

    for name, module in list(adapted.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            parent, _, leaf = name.rpartition(".")
            setattr(adapted.get_submodule(parent), leaf, module.modules_to_save[module.active_adapters[0]])


def pool_where_texts_end(adapted: Any) -> None:
    """For virtual tokens before a causal base, which is given embeddings and no ids: transformers then takes the last
    position for the text's end, padding or not. Here it is the last that the mask attends to; the same for a text
    alone. Nothing is done to a model that writes or says something of each token, or that reads both ways and looks at
    the mask.
    """
    import torch
    from transformers.modeling_outputs import SequenceClassifierOutput

    base, config = adapted.get_base_model(), adapted.active_peft_config
    embedded = config.is_prompt_learning and config.peft_type != "PREFIX_TUNING"
    head = head_of(adapted)
    if not embedded or head is None or head.task == "TOKEN_CLS" or "score" not in head_modules(base):
        return
    as_before = base.forward

    def forward(input_ids: Any = None, attention_mask: Any = None, inputs_embeds: Any = None, **more: Any) -> Any:
        if input_ids is not None or attention_mask is None or more.get("labels") is not None:
            return as_before(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **more)
        more = {key: value for key, value in more.items() if key not in ("labels", "return_dict") and value is not None}
        states = base.base_model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **more).last_hidden_state
        positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        ends = (positions * attention_mask.to(positions.dtype)).argmax(-1)
        return SequenceClassifierOutput(logits=base.score(states[torch.arange(len(ends)), ends]))

    base.forward = forward


def inner(model: Any) -> Any:
    """The transformers model inside PEFT."""
    return model.get_base_model() if hasattr(model, "peft_config") else model
