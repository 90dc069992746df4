"""A base that is a version of the registry: `model.base: adapters:coffee-bot@v2`.

The base is the version's own base with the adapter merged in, made once per version under the storage root, or the
version itself where it is a whole model:

```text
models/<digest>/    config, weights, tokenizer with its chat template; COMPLETE.json last
```
The digest covers the adapter's files and its base's fingerprint, so that versions with equal weights share a folder.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ftray.config.methods import Method, Prompt
from ftray.config.schema import VERSION, Model, Run
from ftray.errors import ModelError, RegistryError
from ftray.models.feature_files import HEAD_CONFIG
from ftray.models.merge import UNMERGEABLE, merge
from ftray.models.prompts import prompt_of
from ftray.models.save import ADAPTER_CONFIG
from ftray.store.paths import MARKER, Storage
from ftray.store.registry import Registry
from ftray.store.versions import Version

_NUMBER = re.compile(r"v\d+")
LAYOUT = 1  # raised whenever the same version would be merged to other weights


class WithModel(Protocol):
    """A run or serve file."""

    @property
    def model(self) -> Model: ...
    def model_copy(self, *, update: dict[str, Any]) -> Any: ...


Asked = TypeVar("Asked", bound=WithModel)


def pinned(asked: Asked, storage: Storage, *, began: str | None = None) -> Asked:
    """The same with its base's version by number: what an alias or a bare name means now. RegistryError for none.

    `began`: the base that it began with earlier, by number. It stays, wherever the alias points by now.
    """
    ref = asked.model.version
    if ref is None:
        return asked
    before = began.removeprefix(VERSION) if began is not None and began.startswith(VERSION) else None
    base = VERSION + numbered("model.base", ref, storage, began=before)
    return asked.model_copy(update={"model": asked.model.model_copy(update={"base": base})})


def pinned_prompt(run: Run, storage: Storage, *, began: str | None = None) -> Run:
    """The run with the version that its prompt begins as by number; `began` as in `pinned`."""
    if run.begins_as is None:
        return run
    begin = numbered("method.begin", run.begins_as, storage, began=began)
    return run.model_copy(update={"method": run.method.model_copy(update={"begin": begin})})


def numbered(key: str, ref: str, storage: Storage, *, began: str | None = None) -> str:
    """A version by its number: `began`, where that is another of the same name and `ref` says no number itself."""
    if began is not None and began.partition("@")[0] == ref.partition("@")[0] and not _is_number(ref):
        return began
    return resolved(key, ref, storage).id


def resolved(key: str, ref: str, storage: Storage) -> Version:
    """The version that the key of a run or serve file names; what the registry refuses is said of that key."""
    try:
        return Registry(storage).resolve(ref)
    except RegistryError as error:
        raise type(error)(f"{key}: {error}") from error


def _is_number(ref: str) -> bool:
    return bool(_NUMBER.fullmatch(ref.partition("@")[2]))


def here(asked: Asked, storage: Storage) -> Asked:
    """The same with its base's version as a model on this machine. ModelError where nothing can start from it."""
    return asked.model_copy(update={"model": found(asked.model, storage)})


def found(model: Model, storage: Storage) -> Model:
    """`here` of a model section alone."""
    if model.version is None or model.place:
        return model
    registry = Registry(storage)
    version = registry.resolve(model.version)
    if _is_whole(version, storage):
        return model.at(str(registry.fetch(version, _cache(version.digest))))
    key = f"models/{_digest(version)}"
    if not storage.exists(f"{key}/{MARKER}"):
        _make(version, registry, key, trusted=model.trust_remote_code)
    return model.at(str(_local_copy(storage, key)))


def lineage(refs: Iterable[str | None], storage: Storage) -> list[dict[str, str]]:
    """The versions that these are made of and they themselves, the first trained first: [{version, digest}, …].

    None is no version, as of a plain base.
    """
    made: list[dict[str, str]] = []
    for ref in refs:
        if ref is not None:
            version = Registry(storage).resolve(ref)
            made += [*version.card.get("lineage", []), {"version": version.id, "digest": version.digest}]
    return made


def first_prompt(method: Method, storage: Storage, *, width: int) -> Any:
    """[virtual tokens, width]: of the version that a prompt begins as; None where it names none.

    ModelError where that is no prompt, or none for this method and a base of this width; RegistryError for no version.
    """
    if not isinstance(method, Prompt) or method.begin is None:
        return None
    version = resolved("method.begin", method.begin, storage)
    try:
        prompt = prompt_of(Registry(storage).fetch(version, _cache(version.digest)))
    except ModelError as error:
        raise ModelError(f"method.begin: {version.id} {error}") from None
    tokens, theirs = prompt.shape
    if tokens != method.tokens:
        raise ModelError(f"method.tokens: {version.id} has {tokens} virtual tokens, not {method.tokens}; use {tokens}")
    if theirs != width:
        base = version.card.get("base")
        raise ModelError(f"method.begin: {version.id} is a prompt for {base}, {theirs} wide, and the base is {width}")
    return prompt


def _digest(version: Version) -> str:
    text = f"{LAYOUT}\n{version.digest}\n{version.card.get('base_fingerprint') or version.card.get('base')}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _is_whole(version: Version, storage: Storage) -> bool:
    """A whole model; of adapters ModelError unless they can be merged."""
    files = storage.read_json(f"{version.key}/{MARKER}")["files"]
    if HEAD_CONFIG in files:
        raise ModelError(
            f"model.base: {version.id} is a head over a frozen base, so no run can start from it; start from its own "
            f"base {version.card.get('base')!r}"
        )
    if ADAPTER_CONFIG not in files:
        return True
    config = storage.read_json(f"{version.key}/{ADAPTER_CONFIG}")
    if (kind := config.get("peft_type")) in UNMERGEABLE:
        raise ModelError(
            f"model.base: {version.id} is a version of {kind}, which is no change of weights, so no run can start from "
            f"it; start from its own base {version.card.get('base')!r}, or train a version by lora, full or another "
            "method that merges"
        )
    if (task := config.get("task_type")) not in (None, "CAUSAL_LM"):
        raise ModelError(f"model.base: {version.id} is an adapter for {task}, which does not write text; take its base")
    return False


def _make(version: Version, registry: Registry, key: str, *, trusted: bool) -> None:
    """The merged model into storage, once. Two who make it at once write the same."""
    import torch
    from transformers.utils import logging

    from ftray.models.load import fingerprint, load_config

    logging.disable_progress_bar()
    card, storage = version.card, registry.storage
    own = Model(base=card["base"], revision=card.get("base_revision"), trust_remote_code=trusted)
    own = found(own, storage)
    expected = card.get("base_fingerprint")
    if expected and (now := fingerprint(own)) != expected:
        raise ModelError(
            f"model.base: {version.id} was trained on {own.base} with fingerprint {expected[:19]}, and what {own.base} "
            f"is now has {now[:19]}; put that base back where it was"
        )
    dtype = getattr(load_config(own).get_text_config(), "dtype", None) or torch.bfloat16
    with tempfile.TemporaryDirectory(prefix="ftray-merge-") as scratch:
        folder = registry.fetch(version, Path(scratch, "version"))
        out = merge(own, folder, Path(scratch, "model"), dtype)
        about = {"digest": key.rpartition("/")[2], "adapter": version.digest, "base": expected}
        (out / MARKER).write_text(json.dumps(about), encoding="utf-8")
        if not storage.exists(f"{key}/{MARKER}"):  # another run may have made it meanwhile, and its files are in use
            storage.upload(out, key)


def _local_copy(storage: Storage, key: str) -> Path:
    """The folder itself under a local root; elsewhere a copy, made once per machine."""
    folder = _cache(key.rpartition("/")[2])
    copied = folder / ".copied"  # files arrive one by one, and another process may be copying them
    if copied.exists():
        return folder
    there = storage.download(key, folder)
    if there == folder:
        copied.touch()
    return there


def _cache(digest: str) -> Path:
    return Path(tempfile.gettempdir(), "ftray-cache", "models", digest)
