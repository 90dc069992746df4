"""A trained version as plain files: a PEFT folder for adapters, a Hugging Face folder for whole models; and back.

The folders load with peft and transformers alone. Learnt values come in as `state`: the gathered fp32 tensors by the
names of `adapt.trainable`, so that one process can write what DeepSpeed has sharded over many.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftray.config.methods import PROMPTS, AdaLora, Feature, Full, Lora, Method, Vera, is_adapter
from ftray.errors import ModelError
from ftray.models import adalora, virtual
from ftray.models.adapt import pissa_start, trainable, unwrap
from ftray.models.heads import head_of, write_head
from ftray.models.load import Origin, load_base, origin
from ftray.models.sharded import whole, without_zero3

ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
SAVED = ".modules_to_save.default."


def save_version(model: Any, folder: Path, *, method: Method, state: Mapping[str, Any], tokenizer: Any) -> None:
    """Writes the adapter (fp32) or the whole model (16-bit where its base was), and the tokenizer with its template.

    Call it in one process. `state` must hold every learnt tensor, whole. The base is named as the run file named it.
    """
    model = unwrap(model)
    lacking = trainable(model).keys() - state.keys()
    assert not lacking, f"state lacks {sorted(lacking)[:3]}"
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(method, Feature):
        from ftray.models.features import pooling_for, save_head

        save_head(model, folder, pooling=pooling_for(model.ftray_base, method), state=state)
    elif is_adapter(method):
        _save_adapter(model, folder, method, state)
    else:
        _save_model(model, folder, state)
    tokenizer.save_pretrained(folder)
    if (head := head_of(model)) is not None:
        write_head(folder, head)


def load_state_into(model: Any, folder: Path, method: Method) -> None:
    """Reads a saved version back into the live model it came from; every rank must call it under ZeRO 3.

    ModelError when a tensor is missing, left over, or of another shape. Whole models in 16 bits come back rounded.
    """
    model = unwrap(model)
    if isinstance(method, Feature):
        from ftray.models.features import read_head_into

        read_head_into(model, folder)
        return
    if isinstance(method, PROMPTS):
        live, saved = _beside_prompts(trainable(model)), virtual.read_back(model, folder / ADAPTER)
        ours = {name.replace(SAVED, "."): name for name in live}
        saved = {ours.get(name, name): tensor for name, tensor in saved.items()}
    else:
        saved = _adapter_tensors(model, folder, method) if is_adapter(method) else _model_tensors(model, folder)
        live = trainable(model)
    _refuse_strangers(folder, live, saved)
    for name, parameter in live.items():
        with whole(parameter):
            if parameter.shape != saved[name].shape:
                found, wanted = tuple(saved[name].shape), tuple(parameter.shape)
                raise ModelError(f"{folder}: {name} is {found} in the file and {wanted} in the model")
            parameter.data.copy_(saved[name])


def _save_adapter(model: Any, folder: Path, method: Method, state: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    config = model.peft_config["default"]
    tensors = {name: tensor.detach().float().cpu() for name, tensor in state.items()}
    base = origin(model).model
    changes: dict[str, Any] = {"base_model_name_or_path": base.base, "revision": base.revision, "inference_mode": True}
    if isinstance(method, Lora) and method.init == "pissa":
        tensors, scale_changes = _pissa_on_the_original_base(model, method, tensors)
        changes |= scale_changes
    if isinstance(method, AdaLora):
        config, written_tensors = adalora.as_lora(model, tensors)
    elif isinstance(method, PROMPTS):
        written_tensors = {virtual.TENSOR: virtual.embeddings(model, tensors)}
        written_tensors |= {name.replace(SAVED, "."): tensor for name, tensor in _beside_prompts(tensors).items()}
        if tasks := virtual.task_embeddings(model, tensors):
            config = virtual.as_prompt(config)
            save_file(tasks, folder / virtual.TASKS, metadata={"format": "pt"})
    else:
        written_tensors = _peft_names(model, tensors, beside=_shared(model, method))
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in written_tensors.items()},
        folder / ADAPTER,
        metadata={"format": "pt"},
    )
    config.save_pretrained(folder)
    path = folder / ADAPTER_CONFIG
    written = json.loads(path.read_text(encoding="utf-8")) | changes
    # PEFT keeps names in sets, whose order changes from process to process; equal runs should write equal files
    ordered = {key: sorted(value) if _is_names(value) else value for key, value in written.items()}
    path.write_text(json.dumps(ordered, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _pissa_on_the_original_base(model: Any, method: Lora, tensors: dict) -> tuple[dict, dict[str, Any]]:
    """PiSSA (arXiv 2404.02948) trains W - s B0 A0 + s B A; this gives the adapter of rank 2r that does it on W itself.

    [B, -B0] [A; A0] = B A - B0 A0, with alpha chosen so that the scale s stays.
    """
    import torch

    start = pissa_start(model)
    doubled = dict(tensors)
    for name, before in start.items():
        if ".lora_A." in name:
            doubled[name] = torch.cat([tensors[name], before], 0)
        else:
            doubled[name] = torch.cat([tensors[name], -before], 1)
    alpha = method.alpha if method.alpha is not None else 2.0 * method.rank
    scale = alpha / (method.rank**0.5 if method.rslora else method.rank)
    changes = {
        "r": 2 * method.rank,
        "lora_alpha": scale * 2 * method.rank,
        "use_rslora": False,
        "init_lora_weights": True,
    }
    return doubled, changes


def _save_model(model: Any, folder: Path, state: Mapping[str, Any]) -> None:
    came_from = origin(model)
    frozen = _frozen_values(model, came_from, state)
    # one tensor per parameter, whatever its names, so that transformers sees tied weights as tied
    by_parameter: dict[int, Any] = {}
    for name, parameter in model.named_parameters():
        value = state[name] if name in state else frozen[name]
        by_parameter[id(parameter)] = value.detach().to("cpu", came_from.saved_dtype)
    tensors = {n: tensor.detach().cpu() for n, tensor in model.state_dict().items()}
    tensors |= {n: by_parameter[id(p)] for n, p in model.named_parameters(remove_duplicate=False)}
    model.save_pretrained(folder, state_dict=tensors)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"dtype": str(came_from.saved_dtype).removeprefix("torch."), "use_cache": came_from.use_cache}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _frozen_values(model: Any, came_from: Origin, state: Mapping[str, Any]) -> dict[str, Any]:
    frozen = {name: parameter for name, parameter in model.named_parameters() if name not in state}
    if not any(hasattr(parameter, "ds_id") for parameter in frozen.values()):
        return frozen
    # ZeRO 3 has sharded them; gathering would need every rank, and the base's own files have the same values
    with without_zero3():
        base = load_base(came_from.model, method=Full(), dtype=came_from.saved_dtype, head=head_of(model))
    return dict(base.named_parameters())


def _adapter_tensors(model: Any, folder: Path, method: Method) -> dict[str, Any]:
    from safetensors.torch import load_file

    live = trainable(model)
    loaded = load_file(folder / ADAPTER)
    if isinstance(method, AdaLora):
        return adalora.from_lora(model, loaded)
    names = {id(parameter): name for name, parameter in live.items()}
    shared = _shared(model, method)
    theirs = _peft_names(model, live, beside=shared)
    ours = {name: names[id(parameter)] for name, parameter in theirs.items() if id(parameter) in names}
    fixed = theirs.keys() - ours.keys()
    if changed := [name for name in fixed & loaded.keys() if not _equal(loaded[name], theirs[name])]:
        raise ModelError(f"{folder}: {changed[0]} is not this run's; it comes from another seed")
    tensors = {ours.get(name, name): tensor for name, tensor in loaded.items() if name not in fixed}
    if isinstance(method, Lora) and method.init == "pissa":
        for name in pissa_start(model):
            tensors[name] = tensors[name].chunk(2, 0 if ".lora_A." in name else 1)[0]
    return tensors


def _model_tensors(model: Any, folder: Path) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    head = head_of(model)
    read: Any = (AutoModelForCausalLM if head is None else head.auto_class).from_pretrained
    code = origin(model).model.trust_remote_code
    with without_zero3():
        loaded, info = read(
            folder, dtype="auto", use_safetensors=True, output_loading_info=True, trust_remote_code=code
        )
    wrong = sorted({str(name) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[key]})
    if wrong:
        raise ModelError(f"{folder}: {len(wrong)} tensors do not fit the model, e.g. {wrong[0]}")
    live = trainable(model)
    return {name: parameter.detach() for name, parameter in loaded.named_parameters() if name in live}


def _refuse_strangers(folder: Path, live: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    missing, left_over = sorted(live.keys() - saved.keys()), sorted(saved.keys() - live.keys())
    if missing or left_over:
        parts = [f"lacks {len(missing)} tensors, e.g. {missing[0]}"] if missing else []
        parts += [f"has {len(left_over)} that the model does not learn, e.g. {left_over[0]}"] if left_over else []
        raise ModelError(f"{folder}: {'; '.join(parts)}; it comes from another method or another base")


def _shared(model: Any, method: Method) -> dict[str, Any]:
    """What a version holds beside what learns: VeRA's random matrices, which another machine might draw otherwise."""
    if not isinstance(method, Vera):
        return {}
    every = model.named_buffers(remove_duplicate=False)
    return {name: buffer for name, buffer in every if name.startswith("base_model.vera_")}


def _equal(one: Any, other: Any) -> bool:
    return one.shape == other.shape and bool((one.float().cpu() == other.float().cpu()).all())


def _peft_names(model: Any, tensors: Mapping[str, Any], *, beside: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The same tensors under the names that PEFT writes into adapter files; tied ones under each of their names."""
    from peft import get_peft_model_state_dict

    named = list(model.named_parameters(remove_duplicate=False))
    first = {id(parameter): name for name, parameter in reversed(named)}
    everywhere = {name: tensors[first[id(p)]] for name, p in named if first[id(p)] in tensors}
    everywhere |= beside or {}
    return get_peft_model_state_dict(model, state_dict=everywhere, save_embedding_layers=False)


def _beside_prompts(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """What learns beside virtual tokens: a head."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("prompt_encoder.")}


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
