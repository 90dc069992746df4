"""Versions brought back to life: loaded with their base, merged into it, exported for use without ftray."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from ftray.config.schema import VERSION, Full, Lora, Method, Model
from ftray.errors import ModelError
from ftray.models.feature_files import HEAD_CONFIG
from ftray.models.heads import pool_where_texts_end, read_head, unwrap_heads, write_head
from ftray.models.load import fingerprint, load_base, load_tokenizer, resolve_base
from ftray.models.save import ADAPTER_CONFIG

UNMERGEABLE = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "BOTTLENECK")


def load_version(
    base_model: Model, folder: Path, card: Mapping[str, Any], dtype: Any, *, attention: str = "auto"
) -> tuple[Any, Any]:
    """(model, tokenizer) of a version, in evaluation mode: the base with its adapter, or the whole model.

    An adapter trained on a quantised base (`card["method"]["bits"]`) gets a base quantised the same way, so that its
    logits are those of training. ModelError when the base is another than the adapter's (`card["base_fingerprint"]`).
    """
    tokenizer, head = load_tokenizer(_tokenizer_source(base_model, folder)), read_head(folder)
    if not (folder / ADAPTER_CONFIG).is_file() and not (folder / HEAD_CONFIG).is_file():
        whole = base_model.model_copy(update={"base": str(folder), "revision": None})
        return load_base(whole, method=Full(), dtype=dtype, attention=attention, head=head).eval(), tokenizer
    expected = card.get("base_fingerprint")
    if expected and expected != (found := fingerprint(base_model)):
        raise ModelError(
            f"{folder.name}: trained on a base with fingerprint {expected}, but {base_model.base!r} has {found}; "
            "name the base, or the revision, that it was trained on"
        )
    if (folder / HEAD_CONFIG).is_file():
        from ftray.models.features import load_reading_head

        return load_reading_head(base_model, folder, dtype=dtype), tokenizer
    method = TypeAdapter(Method).validate_python(card["method"]) if card.get("method") else Lora()
    base = load_base(base_model, method=method, dtype=dtype, attention=attention, head=head)
    return _with_adapter(base, folder), tokenizer


def merge(model: Model, folder: Path, out: Path, dtype: Any) -> Path:
    """Writes base plus adapter as one plain Hugging Face model in `dtype`; returns `out`, which must not exist yet.

    The sum is made in fp32 and rounded once, into the unquantised base even where the adapter was trained on 4 bits:
    merging into 4-bit weights loses the adapter in their rounding.
    """
    import torch

    if (folder / HEAD_CONFIG).is_file():
        raise ModelError(
            f"{folder.name}: is a head over a frozen base, which leaves no weight to merge; serve it as it is, on the "
            "encoder engine, or export it"
        )
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ModelError(f"{folder}: is a whole model, there is nothing to merge; use export")
    kind = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("peft_type")
    if kind in UNMERGEABLE:
        raise ModelError(
            f"{folder.name}: a version of {kind} is no change of weights, so it cannot be merged; serve it as it is, "
            "on the bank engine, or export it"
        )
    with _new_folder(out) as draft:
        head = read_head(folder)
        base = load_base(model, method=Full(), dtype=torch.float32, head=head)
        _untie_where_adapted(base, folder)
        adapted = _with_adapter(base, folder)
        if head is not None:
            unwrap_heads(adapted)
        merged = adapted.merge_and_unload(safe_merge=True).to(dtype)
        merged.save_pretrained(draft)
        load_tokenizer(_tokenizer_source(model, folder)).save_pretrained(draft)
        if head is not None:
            write_head(draft, head)
    return out


def export(model: Model, folder: Path, out: Path) -> Path:
    """Copies a version to `out` so that peft or transformers load it with no ftray; returns `out`, which must be new.

    A base that only ftray can name (builtin:..., adapters:...) is put beside the adapter, in `out`/base.
    """
    with _new_folder(out) as draft:
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.name not in ("card.json", "COMPLETE.json"):
                shutil.copyfile(path, draft / path.name)
        config = draft / ADAPTER_CONFIG
        if config.is_file() and model.base.startswith(("builtin:", VERSION)):
            shutil.copytree(resolve_base(model), draft / "base")
            written = json.loads(config.read_text(encoding="utf-8"))
            written["base_model_name_or_path"] = str((out / "base").absolute())
            config.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return out


def _with_adapter(base: Any, folder: Path) -> Any:
    from peft import PeftModel

    import ftray.models.bottleneck  # noqa: F401  (PEFT learns of the method)

    try:
        adapted = PeftModel.from_pretrained(base, str(folder), is_trainable=False).eval()
    except (RuntimeError, ValueError, KeyError) as error:  # PEFT's ways of saying that names or shapes do not fit
        import torch

        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ModelError(f"{folder}: the adapter does not fit the base {base.name_or_path!r}: {error}") from error
    pool_where_texts_end(adapted)
    return adapted


def _untie_where_adapted(base: Any, folder: Path) -> None:
    """A LoRA on one of two tied layers must not reach the other through the weight that they share."""
    import torch

    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    if head is None or head.weight is not embeddings.weight:
        return
    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    if config["peft_type"] != "LORA":
        return  # the others adapt linear layers, or both of the tied ones
    targets = config["target_modules"]
    names = {name.rsplit(".", 1)[-1] for name, module in base.named_modules() if module in (head, embeddings)}
    if names & {target.rsplit(".", 1)[-1] for target in targets}:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        base.config.tie_word_embeddings = False


def _tokenizer_source(base_model: Model, folder: Path) -> Model:
    """A version's own tokenizer where it has one: its chat template is the one it was trained with."""
    if (folder / "tokenizer_config.json").is_file():
        return base_model.model_copy(update={"base": str(folder), "revision": None})
    return base_model


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder that appears whole or not at all."""
    if out.exists():
        raise ModelError(f"{out}: exists already; name another folder, or remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield draft
        draft.chmod(0o755)
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
