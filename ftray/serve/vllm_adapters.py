"""Which versions vLLM can take, by their configuration and their tensors' headers alone.

vLLM copies A and B into larger, zeroed matrices: one that is too small for the base goes in without an error and
answers nonsense. So the shapes are compared here, with the base's own layers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ftray.errors import AdapterError

ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
BANK = "with engine: {kind: bank}"
WAY_OUT = f"serve it {BANK}, or as a model of its own after `ftray adapters merge`"

_UNSUPPORTED = {
    "use_dora": "DoRA",
    "lora_bias": "a bias of its own",
    "modules_to_save": "modules_to_save",
    "trainable_token_indices": "trainable_token_indices",
    "target_parameters": "target_parameters",
    "layer_replication": "layer_replication",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
}
_MUST_BE_READ = {
    "use_rslora": "rank-stabilised scales",
    "rank_pattern": "ranks that differ by layer",
    "alpha_pattern": "scales that differ by layer",
}
"""Settings that a vLLM which does not read them leaves out without a word (0.29: the patterns)."""
_PLAIN_STARTS = {"gaussian", "eva", "orthogonal", "mica", "lora_ga"}
"""Ways to begin A and B that leave the base as it is; the others (PiSSA, OLoRA, …) need a changed base."""

# base_model.model.model.layers.0.mlp.up_proj.lora_A.weight, base_model.model.model.embed_tokens.lora_embedding_B
_MATRIX = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?:(?P<linear>[AB])\.weight|embedding_(?P<row>[AB]))"
)

Layers = Mapping[str, tuple[int, int]]
"""Layer -> (inputs, outputs); for embeddings (vocabulary, width). A tied output layer is not among them."""


def layers_of(config: Any) -> Layers:
    """What LoRA can adapt in a base, by its transformers configuration."""
    from ftray.models.load import linear_modules, linear_shape, meta_model

    model = meta_model(config)
    names = {module: name for name, module in model.named_modules()}
    layers = {name: linear_shape(module) for name, module in linear_modules(model).items()}
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers[names[embeddings]] = (embeddings.num_embeddings, embeddings.embedding_dim)
    if head is not None and head.weight is not embeddings.weight:
        layers[names[head]] = linear_shape(head)
    return layers


def check(folder: Path, *, layers: Layers, max_rank: int, reads: Collection[str]) -> None:
    """AdapterError when vLLM cannot serve the version, with every reason and the way out. Reads no tensor.

    `reads`: the keys of adapter_config.json that this vLLM looks at.
    """
    config = _config(folder)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"{folder.name} is {kind}, and vLLM serves LoRA only; {WAY_OUT}")
    has = [words for key, words in _UNSUPPORTED.items() if config.get(key)]
    has += [words for key, words in _MUST_BE_READ.items() if config.get(key) and key not in reads]
    if config.get("bias", "none") != "none":
        has.append(f"bias={config['bias']}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in _PLAIN_STARTS:
        has.append(f"init_lora_weights={start}")
    if has:
        raise AdapterError(f"{folder.name} has {', '.join(has)}, which this vLLM does not know; {WAY_OUT}")
    shapes = _shapes(folder)
    rank = max((shape[0] for name, shape in shapes.items() if _half(name) == "A"), default=0)
    if rank > max_rank:
        raise AdapterError(f"{folder.name} has rank {rank}; adapters.max_rank is {max_rank}: raise it to {rank}")
    problems = list(_misfits(shapes, layers))
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise AdapterError(f"{folder.name} does not fit this base: {problems[0]}{more}")


def _config(folder: Path) -> dict[str, Any]:
    path = folder / ADAPTER_CONFIG
    if not path.is_file() and (folder / "config.json").is_file():
        raise AdapterError(
            f"{folder.name} is a whole model, and vLLM serves it only as model.base of a server; {WAY_OUT}"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{folder.name}: {ADAPTER_CONFIG} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{folder.name}: {ADAPTER_CONFIG} is no mapping")
    return config


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(folder / ADAPTER), framework="numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{folder.name}: {ADAPTER} cannot be read: {error}; publish the version again") from error


def _misfits(shapes: Mapping[str, tuple[int, ...]], layers: Layers) -> Iterator[str]:
    """A is [rank, inputs], B is [outputs, rank]."""
    ranks: dict[str, dict[str, int]] = {}
    for name, shape in shapes.items():
        own = layers.get(name.removeprefix("base_model.model.").removesuffix(".base_layer.weight"))
        if own in (shape, shape[::-1]):
            continue  # PEFT saves the base's own embeddings beside an adapted one; vLLM leaves them out
        match = _MATRIX.fullmatch(name)
        if match is None or len(shape) != 2:
            yield f"tensor {name} {list(shape)} is no LoRA matrix"
            continue
        module, half = match["module"], _half(name)
        if module not in layers:
            yield f"there is no layer {module} to adapt"
            continue
        rank, size = shape if half == "A" else shape[::-1]
        wanted = layers[module][half == "B"]
        if size != wanted:
            yield f"{module}: lora_{half} has {size} {'inputs' if half == 'A' else 'outputs'}, the layer {wanted}"
        ranks.setdefault(module, {})[half] = rank
    for module, halves in ranks.items():
        if len(set(halves.values())) != 1 or len(halves) != 2:
            yield f"{module}: lora_A and lora_B do not belong together, ranks {halves}"
    if not shapes:
        yield "it has no tensors"


def _half(name: str) -> str:
    match = _MATRIX.fullmatch(name)
    return (match["linear"] or match["row"]) if match else ""
