"""A version of an encoder base as files: what it is, whether it can be served, how its labels are called. No torch.

Labels stand in `labels.json` in the version's folder, or else in its `config.json`; both say them as transformers does,
`{"id2label": {"0": "refund", ...}, "problem_type": "multi_label_classification"}`, and labels.json may also be a plain
list of names. Without either they are LABEL_0, LABEL_1, …
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ftray.errors import AdapterError
from ftray.models.feature_files import HEAD, HEAD_CONFIG
from ftray.models.save import ADAPTER, ADAPTER_CONFIG

Task = Literal["embed", "classify", "classify_tokens"]
Scoring = Literal["one", "each", "value"]
"""One label is right (softmax), each is right or not (sigmoid), or the score is a number as it comes (regression)."""

_TASKS: dict[str, Task] = {"SEQ_CLS": "classify", "TOKEN_CLS": "classify_tokens", "FEATURE_EXTRACTION": "embed"}
_ARCHITECTURES: dict[str, Task] = {
    "ForSequenceClassification": "classify",
    "ForTokenClassification": "classify_tokens",
    "ForMaskedLM": "embed",
    "Model": "embed",
}
METHODS = ("LORA", "ADALORA", "LOHA", "LOKR", "IA3", "OFT", "HRA", "LN_TUNING", "MISS")
"""PEFT types whose whole state is in their file; the others draw some from a seed, or change the base or the input."""
_HARMLESS_INITS = (True, False, "gaussian", "orthogonal", "eva")
_UNSERVED = (
    "megatron_config",
    "layer_replication",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "use_bdlora",
    "use_qalora",
)


@dataclass(frozen=True)
class Labels:
    """In the order of the head's rows, and how its logits become scores; none for embeddings."""

    names: tuple[str, ...] = ()
    scoring: Scoring = "one"


@dataclass(frozen=True)
class VersionFiles:
    """What a folder holds, by its configuration and its weights' headers. `shapes`: of what is no model."""

    folder: Path
    kind: Literal["adapter", "model", "head"]
    task: Task
    shapes: Mapping[str, tuple[int, ...]]


def look_at(folder: Path) -> VersionFiles:
    """Reads no weights. AdapterError where the folder is no version that an encoder can serve."""
    if (folder / ADAPTER_CONFIG).is_file():
        config = _object(folder / ADAPTER_CONFIG)
        return VersionFiles(folder, "adapter", _adapter_task(config), _header(folder, ADAPTER))
    if (folder / HEAD_CONFIG).is_file():
        _object(folder / HEAD_CONFIG)
        return VersionFiles(folder, "head", "classify", _header(folder, HEAD))
    if not (folder / "config.json").is_file():
        raise AdapterError("no adapter_config.json, config.json or head.json; it is no PEFT adapter, model or head")
    config = _object(folder / "config.json")
    weights = sorted(path.name for path in folder.glob("*.safetensors"))
    for name in weights or ["model.safetensors"]:
        _header(folder, name)
    return VersionFiles(folder, "model", _model_task(config), {})


def read_labels(folder: Path, *, count: int) -> Labels:
    """What the folder says, for a head of `count` labels; AdapterError where that does not fit."""
    document = {**read_json(folder / "config.json"), **read_json(folder / "labels.json")}
    said = document.get("id2label", {str(number): f"LABEL_{number}" for number in range(count)})
    if not isinstance(said, Mapping) or set(said) != {str(number) for number in range(len(said))}:
        raise AdapterError("id2label must name the labels from 0 on, each once")
    names = tuple(str(said[str(number)]) for number in range(len(said)))
    if len(names) != count:
        raise AdapterError(f"{len(names)} labels are named, and the head has {count}")
    if len(set(names)) < count:
        raise AdapterError(f"two labels are called {next(name for name in names if names.count(name) > 1)!r}")
    problem = document.get("problem_type")
    if problem == "regression":
        return Labels(names, "value")
    # one label alone, as a reranker's, says how much and not which
    return Labels(names, "each" if problem == "multi_label_classification" or count == 1 else "one")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON document, empty where there is none; a list is taken for the labels in order."""
    return _object(path) if path.is_file() else {}


def _adapter_task(config: Mapping[str, Any]) -> Task:
    method, task = config.get("peft_type"), str(config.get("task_type") or "FEATURE_EXTRACTION")
    if method not in METHODS:
        raise AdapterError(f"peft_type {method!r} cannot be served on an encoder; {', '.join(METHODS)} can")
    if task not in _TASKS:
        raise AdapterError(f"task_type {task!r} is not for an encoder; SEQ_CLS, TOKEN_CLS and FEATURE_EXTRACTION are")
    init = config.get("init_lora_weights", True)
    if init not in _HARMLESS_INITS:
        raise AdapterError(
            f"init_lora_weights {init!r} goes with a changed base; save the adapter with "
            "path_initial_model_for_weight_conversion, which makes it one for the original"
        )
    unserved = [key for key in _UNSERVED if config.get(key)]
    if unserved:
        raise AdapterError(f"{unserved[0]} is not supported on an encoder")
    return _TASKS[task]


def _model_task(config: Mapping[str, Any]) -> Task:
    if config.get("quantization_config"):
        raise AdapterError("it is quantised; save it in 16 or 32 bits")
    names = config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else "Model"
    for suffix, task in _ARCHITECTURES.items():
        if name.endswith(suffix):
            return task
    raise AdapterError(f"a {name} is not served by an encoder; classifiers of texts or tokens and plain encoders are")


def _header(folder: Path, name: str) -> dict[str, tuple[int, ...]]:
    """The tensors' shapes in a safetensors file."""
    from safetensors import SafetensorError, safe_open

    if not (folder / name).is_file():
        raise AdapterError(f"no {name}; pickled weights are never read: save it again with save_pretrained")
    try:
        with safe_open(str(folder / name), framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{name} cannot be read: {error}") from error


def _object(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path.name} cannot be read: {error}") from error
    if isinstance(document, list):
        document = {"id2label": {str(number): name for number, name in enumerate(document)}}
    if not isinstance(document, dict):
        raise AdapterError(f"{path.name} holds a {type(document).__name__}, not an object")
    return document
