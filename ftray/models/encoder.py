"""Encoder bases: models that read a text both ways and give one vector a token, such as BERT, RoBERTa, ModernBERT."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ftray.config.schema import Model
from ftray.errors import ModelError
from ftray.models.load import load_config, read_base, resolve_base

Pooling = Literal["mean", "cls"]
"""How the tokens' vectors become the text's: their mean, or the first one."""

_WRITES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoder:
    """A loaded encoder base. `positions`: tokens of the longest text it can read.

    `max_length`: tokens of the longest text it was made for; sentence-transformers' max_seq_length, else `positions`.
    `lacking`: weights that its files do not have, which are random here: those of the pooler, which embeddings by mean
    or by the first token do not pass through, and some classifiers do.
    """

    module: Any
    pooling: Pooling
    positions: int
    max_length: int
    lacking: frozenset[str]


def is_encoder(config: Any) -> bool:
    """Whether a base reads instead of writing, by its transformers configuration."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    architectures = getattr(config, "architectures", None) or []
    if any(name.endswith(_WRITES) for name in architectures):
        return False
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", False):
        return False
    own_code = getattr(config, "auto_map", None) or {}
    if "AutoModel" in own_code:
        return "AutoModelForCausalLM" not in own_code
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def load_encoder(model: Model, *, dtype: Any, device: Any = "cpu") -> Encoder:
    """The base with its weights in `dtype`, ready to read. ModelError when it is none, or lacks weights it needs."""
    import torch
    from transformers import AutoModel

    config = load_config(model)
    if not is_encoder(config):
        raise ModelError(
            f"model.base: {model.base!r} is a {config.model_type!r} model, no encoder; take a BERT-like base for "
            "embeddings and labels, or engine: {kind: bank} for one that writes"
        )
    options: dict[str, Any] = {} if model.attention == "auto" else {"attn_implementation": model.attention}
    module, info = read_base(
        model, AutoModel.from_pretrained, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options
    )
    lacking = frozenset(map(str, info["missing_keys"]))
    needed = sorted(name for name in lacking if not name.startswith("pooler."))
    if needed:
        raise ModelError(
            f"model.base: {model.base!r} lacks {len(needed)} weights of a {type(module).__name__}, e.g. {needed[0]}; "
            "they would be random: take a complete encoder"
        )
    module = module.to(device=device, dtype=dtype).eval().requires_grad_(False)
    positions = positions_of(module)
    made_for = _document(model, "sentence_bert_config.json").get("max_seq_length") or positions
    return Encoder(
        module=module,
        pooling=pooling_in(model) or "mean",
        positions=positions,
        max_length=min(made_for, positions),
        lacking=lacking,
    )


def pooling_in(model: Model) -> Pooling | None:
    """What the base's files say, as `pooling_of`."""
    return pooling_of(_document(model, "1_Pooling/config.json"), _document(model, "modules.json").get("modules", []))


def pooling_of(document: dict[str, Any], modules: list[dict[str, Any]]) -> Pooling | None:
    """What sentence-transformers' 1_Pooling/config.json says; None where it is empty.

    ModelError for another way of pooling, and for further layers in modules.json: vectors would not be the model's.
    """
    further = [str(item.get("type")) for item in modules if not str(item.get("type")).endswith(_KNOWN_MODULES)]
    if further:
        raise ModelError(f"modules.json: {further[0]} is not supported; only Transformer, Pooling and Normalize are")
    if not document:
        return None
    said = document.get("pooling_mode")
    modes = [said] if said else [key.removeprefix("pooling_mode_") for key, value in document.items() if value is True]
    modes = [mode.removesuffix("_tokens").removesuffix("_token") for mode in modes if mode != "include_prompt"]
    if modes not in (["mean"], ["cls"]):
        raise ModelError(f"1_Pooling/config.json: pooling by {' and '.join(modes)} is not supported; mean or cls is")
    return "mean" if modes == ["mean"] else "cls"


def positions_of(module: Any) -> int:
    """Tokens of the longest text that an encoder can read."""
    import torch

    for name, table in module.named_modules():
        if name.endswith("position_embeddings") and isinstance(table, torch.nn.Embedding):
            # RoBERTa and its kin count positions from behind the padding token's id
            return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
    return getattr(module.config, "max_position_embeddings", None) or 512


def _document(model: Model, name: str) -> dict[str, Any]:
    """One of the base's JSON files, a list under "modules"; empty where it has none."""
    from transformers.utils import cached_file

    base = resolve_base(model)
    try:
        path = cached_file(base, name, revision=model.revision, _raise_exceptions_for_missing_entries=False)
    except OSError as error:  # the base itself comes from the cache, which need not hold this file
        logger.warning("model.base: cannot see whether %s has a %s; going on without: %s", base, name, error)
        return {}
    if path is None:
        return {}
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"model.base: {name} of {model.base!r} is not JSON: {error}") from error
    return {"modules": document} if isinstance(document, list) else document
