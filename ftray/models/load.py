"""The base model: where it lies, its tokenizer, shape and weights. Never pickle; its own code only if the run says."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftray.config.methods import Full
from ftray.config.schema import Method, Model
from ftray.errors import ModelError
from ftray.models.builtin import builtin_folder
from ftray.models.heads import Head, head_modules, mark, set_head
from ftray.models.sharded import without_zero3
from ftray.store.admission import CARD
from ftray.store.paths import MARKER

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
SMALL_FILE_BYTES = 64 * 2**20
HUB_ID = re.compile(r"[\w-][\w.-]*(?:/[\w-][\w.-]*)?")


@dataclass(frozen=True)
class Origin:
    """Where a loaded base came from, and what its files say that training changes; kept on the model for saving."""

    model: Model
    saved_dtype: Any
    use_cache: bool


@dataclass(frozen=True)
class Shape:
    """A model's size by its configuration alone; counts are numbers of weights, exact, tied ones counted once."""

    parameters: int
    embedding_params: int
    linear_params: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    tied: bool
    linears: dict[str, tuple[int, int]]
    """Linear layers apart from the output layer: name -> (inputs, outputs)."""
    norm_params: int = 0
    head_params: int = 0
    """Of a head that reads, which always learns; 0 where the model writes."""

    @classmethod
    def from_config(cls, config: Any, *, head: Head | None = None) -> Shape:
        """Builds the model on the meta device: no weights are read or allocated. ModelError for no causal model."""
        model = meta_model(config, head=head)
        text = config.get_text_config()
        output = model.get_output_embeddings()
        linears = {name: linear_shape(module) for name, module in linear_modules(model).items()}
        return cls(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            embedding_params=model.get_input_embeddings().weight.numel(),
            linear_params=sum(inputs * outputs for inputs, outputs in linears.values()),
            hidden_size=text.hidden_size,
            intermediate_size=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            vocab_size=text.vocab_size,
            max_positions=getattr(text, "max_position_embeddings", None) or 0,
            tied=output is not None and output.weight is model.get_input_embeddings().weight,
            linears=linears,
            norm_params=sum(p.numel() for module in norm_layers(model).values() for p in module.parameters()),
            head_params=sum(p.numel() for module in head_modules(model).values() for p in module.parameters()),
        )


def resolve_base(model: Model) -> str:
    """The folder of a built-in or local base, or the Hub id as written. ModelError when it can be neither."""
    if model.place:
        return model.place
    if model.version:  # `chain.here` gives the base of a run or server its place
        raise ModelError(f"{model.base}: only model.base may be a version; merge it with `ftray adapters merge`")
    if model.base.startswith("builtin:"):
        return str(builtin_folder(model.base))
    path = Path(model.base).expanduser()
    if path.is_dir():
        return str(path)
    if not HUB_ID.fullmatch(model.base):
        raise ModelError(
            f"model.base: no folder {model.base!r}; name a folder with config.json, a Hub id, or builtin:tiny"
        )
    return model.base


def load_config(model: Model) -> Any:
    """The transformers configuration. ModelError when the base does not exist or cannot be reached."""
    from transformers import AutoConfig

    return read_base(model, AutoConfig.from_pretrained)


def load_tokenizer(model: Model) -> Any:
    """The base's tokenizer, with a padding token. ModelError when it has none."""
    from transformers import AutoTokenizer

    tokenizer = read_base(model, AutoTokenizer.from_pretrained, needs="tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def read_base(model: Model, from_pretrained: Any, *, needs: str = "config.json", **options: Any) -> Any:
    """What transformers' `from_pretrained` makes of the base; every way in which that fails is a ModelError."""
    import torch
    from safetensors import SafetensorError

    base = resolve_base(model)
    if Path(base).is_dir() and not (Path(base) / needs).is_file():
        raise ModelError(f"model.base: {base} has no {needs}; name a folder that save_pretrained wrote")
    try:
        return from_pretrained(base, revision=model.revision, trust_remote_code=model.trust_remote_code, **options)
    except torch.OutOfMemoryError:
        raise
    except (
        OSError,
        ValueError,
        RuntimeError,
        KeyError,
        SafetensorError,
    ) as error:  # transformers has no error of its own
        raise _explain(model, base, error) from error


def load_base(
    model: Model,
    *,
    method: Method,
    dtype: Any,
    attention: str = "auto",
    zero3: bool = False,
    head: Head | None = None,
) -> Any:
    """The base with its weights in `dtype`, quantised where the method has `bits`.

    `attention` is transformers' name, `ftray_varlen`, or "auto" for the best that the model supports. `zero3`:
    DeepSpeed's HfDeepSpeedConfig is alive, and weights are sharded while they load. `head`: the base reads under this
    head instead of writing; `adapt` draws what of it the files do not have. ModelError when the base does not exist,
    has no safetensors, or its files lack weights.
    """
    from transformers import AutoModelForCausalLM

    from ftray.models.attention import register

    bits = getattr(method, "bits", None)
    if bits and zero3:
        raise ModelError("scale.zero: a quantised base cannot be sharded by ZeRO 3; use zero: 2, or leave bits out")
    register()
    config = load_config(model)
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    if attention != "auto":
        options["attn_implementation"] = attention
    elif getattr(config.get_text_config(), "attn_logit_softcapping", None):
        options["attn_implementation"] = "eager"  # sdpa has no soft cap
    saved_dtype = getattr(config.get_text_config(), "dtype", None) or dtype
    whole: list[str] | None = None
    if head is not None:
        sketch = meta_model(config, head=head)
        whole = list(head_modules(sketch))
        options |= {**head.settings(), "ignore_mismatched_sizes": True}  # a base may have a head for other labels
        if model.attention == "auto" and not sketch._supports_sdpa:
            options["attn_implementation"] = "eager"
    if bits:
        options["quantization_config"] = quantisation(bits, dtype, whole=whole)
    read = AutoModelForCausalLM.from_pretrained if head is None else head.auto_class.from_pretrained
    with contextlib.nullcontext() if head is None else _without_report():
        loaded, info = read_base(model, read, **options)
    if head is not None:
        mark(loaded, head, [*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])])
        loaded.config.get_text_config().pad_token_id = load_tokenizer(model).pad_token_id
    elif info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ModelError(
            f"model.base: {model.base!r} lacks {len(missing)} weights of a {type(loaded).__name__}, e.g. {missing[0]}; "
            "they would be random: take a complete causal language model"
        )
    if bits == 4:
        _one_way_of_computing(loaded)
    loaded.name_or_path = model.base  # what PEFT writes down as the base: the run's own word for it
    loaded.ftray_origin = Origin(model, saved_dtype, getattr(config.get_text_config(), "use_cache", True))
    return loaded


def load_frozen(model: Model, *, dtype: Any, attention: str) -> Any:
    """A base that only computes, whole on every worker whatever ZeRO shards, on the CPU."""
    with without_zero3():
        base = load_base(model, method=Full(), dtype=dtype, attention=attention)
    base.config.use_cache = False
    return base.eval().requires_grad_(False)


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """transformers warns of a head that is new, and we make it so."""
    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def origin(model: Any) -> Origin:
    """Where a model's base came from; for one that `load_base` did not load, by what transformers knows."""
    known = getattr(model, "ftray_origin", None)
    return known or Origin(Model(base=model.config.name_or_path or "unknown"), model.dtype, True)


def _one_way_of_computing(loaded: Any) -> None:
    """Keeps NF4 layers on the training path when they evaluate.

    On CPUs with AVX512-BF16, bitsandbytes repacks the weights at the first evaluation and multiplies in bf16 from then
    on, which moves logits by about 0.01 against training, and against a fresh load.
    """
    for module in loaded.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def quantisation(bits: int, dtype: Any, *, whole: list[str] | None = None) -> Any:
    """bitsandbytes settings: 4 is QLoRA's NF4, quantised twice (arXiv 2305.14314); 8 is int8 (arXiv 2208.07339).

    `whole`: modules that stay as they are, where it is not the output layer.
    """
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=whole)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=whole,
    )


def cache_shape(config: Any) -> tuple[int, int, int]:
    """(layers, key-value heads, width of a head) of a text configuration: what its keys and values take."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, heads, width


def meta_model(config: Any, *, head: Head | None = None) -> Any:
    """The architecture without weights, on the meta device. ModelError where it is no causal language model, or takes
    no such head."""
    import torch
    from transformers import AutoModelForCausalLM

    build: Any = AutoModelForCausalLM
    if head is not None:
        config = copy.deepcopy(config)
        set_head(config, head)
        build = head.auto_class

    # a configuration of the base's own class exists only where the run trusts the base's code
    trusted = type(config).__module__.startswith("transformers_modules")
    try:
        with torch.device("meta"):
            model = build.from_config(config, trust_remote_code=trusted)
    except ValueError as error:
        lacks = "does not write text; take a causal language model"
        if head is not None:
            lacks = f"has no {head.auto_class.__name__}; take a BERT-like encoder or a causal language model"
        raise ModelError(f"model.base: a {config.model_type!r} model {lacks}") from error
    model.tie_weights()
    if head is not None:
        mark(model, head, ())
    return model


def linear_modules(model: Any) -> dict[str, Any]:
    """Linear layers by name, quantised ones too, without the output layer or the head."""
    import torch
    from transformers.pytorch_utils import Conv1D

    output = model.get_output_embeddings()
    return {
        name: module
        for name, module in _without_head(model).items()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not output
    }


def norm_layers(model: Any) -> dict[str, Any]:
    """Normalisation layers with weights, by name, without the head's."""
    return {
        name: module
        for name, module in _without_head(model).items()
        if "norm" in type(module).__name__.lower() and list(module.parameters(recurse=False))
    }


def _without_head(model: Any) -> dict[str, Any]:
    """Modules by name; the head's learn whole, and no method adapts them besides."""
    head = {id(module) for top in head_modules(model).values() for module in top.modules()}
    return {name: module for name, module in model.named_modules() if id(module) not in head}


def linear_shape(module: Any) -> tuple[int, int]:
    """(inputs, outputs). Read from the module where it says so: quantised and sharded weights have other shapes."""
    if hasattr(module, "in_features"):
        return module.in_features, module.out_features
    inputs, outputs = module.nx, module.nf
    return inputs, outputs


def fingerprint(model: Model) -> str:
    """Tells bases apart: the Hub commit, or for a folder a sha256 over configuration, tokenizer and weights.

    Weight files below 64 MB are read whole; of larger ones the safetensors header and the size count. Of a version, and
    of one that was merged, the digest counts too: it tells large models of one shape apart.
    """
    base = resolve_base(model)
    folder = Path(base)
    if not folder.is_dir():
        commit = getattr(load_config(model), "_commit_hash", None)
        return f"hub:{base}@{commit or model.revision or 'main'}"
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.name in ("config.json", *TOKENIZER_FILES) or path.suffix == ".safetensors":
            total.update(f"{path.name}:{_file_digest(path)}\n".encode())
    for name in (CARD, MARKER):  # of a version that was fetched from an object store only the card is here
        if (folder / name).is_file():
            total.update(json.loads((folder / name).read_text(encoding="utf-8"))["digest"].encode())
            break
    return f"sha256:{total.hexdigest()}"


def _file_digest(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size < SMALL_FILE_BYTES:
            digest.update(file.read())
        else:
            header = file.read(8)
            digest.update(header + file.read(struct.unpack("<Q", header)[0]))
    return digest.hexdigest()


def _explain(model: Model, base: str, error: Exception) -> ModelError:
    text = " ".join(str(error).split())
    where = f"model.base: {model.base!r}"
    if "trust_remote_code" in text:
        return ModelError(f"{where} brings its own Python code; read it, then set model.trust_remote_code: true")
    if "no file named model.safetensors" in text or "does not appear to have a file named model.safetensors" in text:
        return ModelError(
            f"{where} has no safetensors weights, and pickled ones are never read; save it again with save_pretrained"
        )
    if Path(base).is_dir():
        return ModelError(f"{where} cannot be loaded: {text}")
    if any(sign in text.lower() for sign in ("connect", "offline", "couldn't reach", "resolve")):
        return ModelError(
            f"{where} is no folder, is not in the local cache, and the Hub cannot be reached; "
            "name a folder, or builtin:tiny"
        )
    return ModelError(
        f"{where} is no folder here and no model on the Hub that we may read; check the spelling, model.revision, "
        f"and for a gated model HF_TOKEN ({text[:300]})"
    )
