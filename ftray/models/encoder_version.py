"""Versions of an encoder base: PEFT adapters and whole fine-tunes that give embeddings, or label texts or tokens.

An adapter version lies on the base's own weights: its skeleton is built without memory, and the base's tensors are
put into it, not copied. Nothing of a version is put into the base.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ftray.errors import AdapterError, ModelError
from ftray.models.encoder import Encoder, Pooling, pooling_of
from ftray.models.encoder_files import Labels, Task, VersionFiles, read_json, read_labels
from ftray.models.feature_files import HEAD
from ftray.models.save import ADAPTER

_AUTO_CLASSES = {
    "embed": "AutoModel",
    "classify": "AutoModelForSequenceClassification",
    "classify_tokens": "AutoModelForTokenClassification",
}


@dataclass(frozen=True)
class EncoderVersion:
    """A version ready to read. `module` gives vectors for "embed", and logits for the rest."""

    module: Any
    task: Task
    pooling: Pooling
    labels: Labels


def load_version(base: Encoder, files: VersionFiles, *, trust_remote_code: bool = False) -> EncoderVersion:
    """AdapterError where it does not fit the base; the base is as it was, whatever happens."""
    try:
        if files.kind == "adapter":
            return _load_adapter(base, files, trust_remote_code)
        if files.kind == "head":
            return _load_head(base, files)
        return _load_model(base, files, trust_remote_code)
    except AdapterError:
        raise
    except Exception as error:  # there is no end to what a broken folder makes PEFT and transformers raise
        text = " ".join(str(error).split())
        raise AdapterError(f"it does not fit the base: {type(error).__name__}: {text[:500]}") from error


def _load_adapter(base: Encoder, files: VersionFiles, trust: bool) -> EncoderVersion:
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict

    skeleton = _skeleton(base, files.task, 2, trust)
    labels = Labels()
    if files.task != "embed":
        labels = read_labels(files.folder, count=_head_rows(skeleton, files.shapes))
        skeleton = _skeleton(base, files.task, len(labels.names), trust)
    # PEFT meets the skeleton before the base's tensors do, so that nothing it does at the start can change them
    slots = _slots(base, skeleton)
    config: Any = PeftConfig.from_pretrained(str(files.folder))
    config.inference_mode = True
    config.base_model_name_or_path = None  # PEFT warns where the base is called otherwise here
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # the file has them
    adapted = get_peft_model(skeleton, config, low_cpu_mem_usage=True, autocast_adapter_dtype=False)
    for (module, leaf), tensor in slots:
        _put(module, leaf, tensor)
    if config.peft_type == "ADALORA":
        _fill_adalora(adapted, rank=config.init_r)
    try:
        result: Any = set_peft_model_state_dict(adapted, _tensors(base, files), low_cpu_mem_usage=True)
    except KeyError as error:
        raise AdapterError(f"{ADAPTER} lacks {error.args[0]}, which modules_to_save names") from error
    if result.unexpected_keys:
        count, first = len(result.unexpected_keys), sorted(result.unexpected_keys)[0]
        raise AdapterError(f"{ADAPTER} has {count} tensors that the base has no place for, e.g. {first}")
    _refuse_holes(adapted, result.missing_keys)
    module = skeleton.eval().requires_grad_(False)
    return EncoderVersion(module, files.task, base.pooling, labels)


def _load_head(base: Encoder, files: VersionFiles) -> EncoderVersion:
    """A head over the base's own vectors; it computes in fp32, whatever the base does."""
    from ftray.models.features import ReadingHead, load_head

    config = base.module.config
    try:
        head, pooling = load_head(files.folder, width=config.get_text_config().hidden_size)
    except ModelError as error:
        raise AdapterError(str(error)) from error
    if not all(bool(tensor.isfinite().all()) for tensor in head.state_dict().values()):
        raise AdapterError(f"{HEAD} holds NaN or infinite numbers")
    labels = read_labels(files.folder, count=head.outer.out_features)
    head = head.to(next(base.module.parameters()).device)
    return EncoderVersion(ReadingHead(base.module, pooling, head).eval(), "classify", base.pooling, labels)


def _load_model(base: Encoder, files: VersionFiles, trust: bool) -> EncoderVersion:
    import torch
    import transformers

    # fp32 first: transformers sets the process' default dtype while it builds, and others are reading meanwhile
    module, info = getattr(transformers, _AUTO_CLASSES[files.task]).from_pretrained(
        str(files.folder),
        dtype=torch.float32,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        trust_remote_code=trust,
        attn_implementation=base.module.config._attn_implementation,
    )
    missing = sorted(str(name) for name in info["missing_keys"])
    if files.task == "embed":
        missing = [name for name in missing if not name.startswith("pooler.")]
    if missing:
        raise AdapterError(f"its weights lack {len(missing)} of a {type(module).__name__}, e.g. {missing[0]}")
    _refuse_strangers(base, module)
    where = next(base.module.parameters())
    module = module.to(device=where.device, dtype=where.dtype).eval().requires_grad_(False)
    _share(base, module)
    labels = Labels() if files.task == "embed" else read_labels(files.folder, count=module.config.num_labels)
    modules_file = files.folder / "modules.json"
    try:
        own = pooling_of(
            read_json(files.folder / "1_Pooling/config.json"),
            json.loads(modules_file.read_text(encoding="utf-8")) if modules_file.is_file() else [],
        )
    except ModelError as error:
        raise AdapterError(str(error)) from error
    return EncoderVersion(module, files.task, own or base.pooling, labels)


def _skeleton(base: Encoder, task: Task, labels: int, trust: bool) -> Any:
    """The architecture on the meta device: no memory, no values."""
    import torch
    import transformers

    config = copy.deepcopy(base.module.config)
    config.num_labels = labels
    with torch.device("meta"):
        skeleton = getattr(transformers, _AUTO_CLASSES[task]).from_config(
            config,
            dtype=torch.float32,  # so that the process' default stays what it is: others are reading meanwhile
            trust_remote_code=trust,
            attn_implementation=config._attn_implementation,
        )
    skeleton.tie_weights()
    return skeleton


def _slots(base: Encoder, skeleton: Any) -> list[tuple[tuple[Any, str], Any]]:
    """Where the base's tensors belong in a skeleton: ((module, attribute), tensor). PEFT keeps these modules."""
    inner = skeleton.base_model
    modules = dict(inner.named_modules())
    slots = []
    for name, tensor in _named_tensors(base.module):
        owner, _, leaf = name.rpartition(".")
        if owner in modules and hasattr(modules[owner], leaf) and name not in base.lacking:
            slots.append(((modules[owner], leaf), tensor))
    return slots


def _put(module: Any, leaf: str, tensor: Any) -> None:
    import torch

    if leaf in module._parameters:
        # a parameter of its own over the same memory: no flag or assignment to it reaches the base's
        module._parameters[leaf] = torch.nn.Parameter(tensor.detach(), requires_grad=False)
    else:
        module._buffers[leaf] = tensor


def _named_tensors(module: Any) -> list[tuple[str, Any]]:
    parameters = module.named_parameters(remove_duplicate=False)
    return [*parameters, *module.named_buffers(remove_duplicate=False)]


def _tensors(base: Encoder, files: VersionFiles) -> dict[str, Any]:
    """The adapter's tensors in the base's precision, in memory of their own: the file may change or go."""
    from safetensors.torch import load_file

    where = next(base.module.parameters())
    loaded = load_file(files.folder / ADAPTER)
    tensors = {}
    for name, tensor in loaded.items():
        dtype = where.dtype if tensor.is_floating_point() else tensor.dtype
        tensors[name] = tensor.to(device=where.device, dtype=dtype, copy=True)
        if not bool(tensors[name].isfinite().all()):
            raise AdapterError(f"{ADAPTER}: {name} holds NaN or infinite numbers")
    return tensors


def _share(base: Encoder, module: Any) -> None:
    """A whole model's tensors that are still the base's take the base's memory; the others get memory of their own.

    Until then they are pages of the file, which may change or go.
    """
    theirs = dict(base.module.named_parameters(remove_duplicate=False))
    inner = {id(part): name for name, part in module.base_model.named_modules()}
    kept: dict[int, Any] = {}
    for part in module.modules():
        for leaf, tensor in part._parameters.items():
            if tensor is None:
                continue
            candidate = theirs.get(f"{inner[id(part)]}.{leaf}".lstrip(".")) if id(part) in inner else None
            if id(tensor) not in kept:
                same = candidate is not None and candidate.shape == tensor.shape and bool((candidate == tensor).all())
                kept[id(tensor)] = candidate if same else tensor.detach().clone()
            _put(part, leaf, kept[id(tensor)])


def _fill_adalora(adapted: Any, *, rank: int) -> None:
    """AdaLoRA divides by the rank that training began with, and resizes its tensors, which must have memory by then."""
    import torch

    for module in adapted.modules():
        if hasattr(module, "ranknum"):
            where = module.get_base_layer().weight
            for parts in (module.lora_A, module.lora_B, module.lora_E):
                for leaf, tensor in parts.items():
                    parts[leaf] = torch.zeros_like(tensor, device=where.device, dtype=where.dtype)
            for leaf in module.ranknum:
                module.ranknum[leaf] = torch.full((1,), float(rank), device=where.device, dtype=where.dtype)


def _refuse_holes(adapted: Any, missing: list[str]) -> None:
    """What is still without memory has come from neither file; the replaced originals of saved modules are not used."""
    holes = [name for name, tensor in _named_tensors(adapted) if tensor.is_meta and "original_module" not in name]
    holes += [name for name in missing if ".lora_" in name]
    if holes:
        name = min(holes).removeprefix("base_model.model.").replace(".default", "")
        raise AdapterError(
            f"neither {ADAPTER} nor the base has {name} ({len(set(holes))} such weights); they would be random: "
            "train the adapter with these modules in modules_to_save"
        )


def _refuse_strangers(base: Encoder, module: Any) -> None:
    """A whole model must read the base's tokens, as long as the base's."""
    mine, theirs = module.config, base.module.config
    if mine.model_type != theirs.model_type:
        raise AdapterError(f"it is a {mine.model_type!r} model; the base is {theirs.model_type!r}")
    if mine.vocab_size != theirs.vocab_size:
        raise AdapterError(
            f"it knows {mine.vocab_size} tokens and the base {theirs.vocab_size}; texts would be misread"
        )
    if (getattr(mine, "max_position_embeddings", None) or 0) < (getattr(theirs, "max_position_embeddings", None) or 0):
        raise AdapterError(f"it reads {mine.max_position_embeddings} positions; fewer than the base")


def _head_rows(skeleton: Any, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many labels an adapter's head has: the rows of the last linear layer beside the encoder."""
    import torch

    inside = {id(module) for module in skeleton.base_model.modules()}
    beside = [
        name
        for name, module in skeleton.named_modules()
        if isinstance(module, torch.nn.Linear) and id(module) not in inside
    ]
    head = shapes.get(f"base_model.model.{beside[-1]}.weight") if beside else None
    if not head:
        raise AdapterError(
            f"{ADAPTER} has no head ({beside[-1] if beside else 'none known'}); name it in modules_to_save"
        )
    return head[0]
