"""`adapters …`: the registry from the terminal."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftray.cli import show as shown
from ftray.errors import RegistryError

if TYPE_CHECKING:
    from ftray.config.schema import Model
    from ftray.store.registry import Registry, Version


def list_(arguments: argparse.Namespace) -> int:
    registry = _registry(arguments)
    found = []
    for name in registry.names():
        aliases = {alias: state.targets for alias, state in registry.aliases(name).items()}
        for version in registry.versions(name):
            at = {alias: targets[version.number] for alias, targets in aliases.items() if version.number in targets}
            found.append({"id": version.id, "created": version.created, "aliases": at, **_about(version)})
    if arguments.json:
        print(shown.as_json(found))
    elif not found:
        print(f"No adapters under {arguments.storage}. `ftray train run.yaml` makes one; --storage names another root.")
    else:
        rows = [
            [row["id"], _aliases(row["aliases"]), row["method"], row["base"], row["gate"], shown.when(row["created"])]
            for row in found
        ]
        print(shown.columns(["version", "alias", "method", "base", "gate", "created"], rows))
    return 0


def show(arguments: argparse.Namespace) -> int:
    from ftray.config.document import dump

    registry = _registry(arguments)
    version = registry.resolve(arguments.ref)
    aliases = {
        alias: state.targets[version.number]
        for alias, state in registry.aliases(version.name).items()
        if version.number in state.targets
    }
    if arguments.json:
        print(shown.as_json({"id": version.id, "digest": version.digest, "aliases": aliases, "card": version.card}))
        return 0
    about = {"version": version.id, "alias": _aliases(aliases), **_about(version), "digest": version.digest}
    if made_of := [part["version"] for part in version.card.get("lineage", [])]:
        about["chain"] = " → ".join([registry.resolve(made_of[0]).card.get("base", "?"), *made_of, version.id])
    about |= {"created": shown.when(version.created), "folder": registry.storage.uri(version.key)}
    print(f"{shown.pairs(about)}\n\ncard\n{dump(version.card)}", end="")
    return 0


def promote(arguments: argparse.Namespace) -> int:
    name = arguments.ref.partition("@")[0]
    state = _registry(arguments).promote(arguments.ref, arguments.alias, force=arguments.force)
    print(f"{name}@{arguments.alias} is now {name}@v{state.main}")
    return 0


def rollback(arguments: argparse.Namespace) -> int:
    state = _registry(arguments).rollback(arguments.name, arguments.alias)
    print(f"{arguments.name}@{arguments.alias} is back at {_targets(arguments.name, state.targets)}")
    return 0


def unalias(arguments: argparse.Namespace) -> int:
    registry = _registry(arguments)
    state = registry.aliases(arguments.name).get(arguments.alias)
    if state is None:
        known = ", ".join(registry.aliases(arguments.name)) or "none"
        raise RegistryError(f"{arguments.name} has no alias {arguments.alias!r}; its aliases: {known}")
    registry.drop_alias(arguments.name, arguments.alias)
    print(f"{arguments.name}@{arguments.alias} is gone; it was {_targets(arguments.name, state.targets)}")
    return 0


def merge(arguments: argparse.Namespace) -> int:
    with _fetched(arguments) as (version, folder, out):
        import torch

        from ftray.models.load import load_config
        from ftray.models.merge import merge as write

        model = _base(version, arguments)
        named = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
        dtype = named.get(arguments.dtype) or load_config(model).dtype or torch.bfloat16
        write(model, folder, out, dtype)
        print(f"{version.id} merged into {model.base}: {out}")
    return 0


def export(arguments: argparse.Namespace) -> int:
    with _fetched(arguments) as (version, folder, out):
        from ftray.models.merge import export as write

        write(_base(version, arguments), folder, out)
        print(f"{version.id} exported: {out}")
    return 0


def delete(arguments: argparse.Namespace) -> int:
    ref = arguments.ref
    if not arguments.yes:
        if not sys.stdin.isatty():
            raise RegistryError(f"{ref} would be deleted for good; say --yes")
        if input(f"Delete {ref} for good? [y/N] ").strip().lower() not in ("y", "yes"):
            print("Nothing deleted.")
            return 0
    _registry(arguments).delete(ref)
    print(f"{ref} deleted; its number is not used again")
    return 0


def _registry(arguments: argparse.Namespace) -> Registry:
    from ftray.store.paths import Storage
    from ftray.store.registry import Registry

    return Registry(Storage(arguments.storage))


def _about(version: Version) -> dict[str, Any]:
    card = version.card
    passed, method = (card.get("gate") or {}).get("passed"), card.get("method")
    return {
        "method": method.get("kind") if isinstance(method, dict) else method,
        "base": card.get("base"),
        "servability": card.get("servability"),
        "gate": None if passed is None else "passed" if passed else "failed",
    }


def _aliases(targets: dict[str, float]) -> str | None:
    return ", ".join(alias if weight == 1 else f"{alias} {weight:.0%}" for alias, weight in targets.items()) or None


def _targets(name: str, targets: Mapping[int, float]) -> str:
    parts = [f"{name}@v{number}" + ("" if weight == 1 else f" {weight:.0%}") for number, weight in targets.items()]
    return ", ".join(parts)


@contextmanager
def _fetched(arguments: argparse.Namespace) -> Iterator[tuple[Version, Path, Path]]:
    """The version, its files in a local folder, and the new folder to write. Loads no torch before all is known."""
    out = Path(arguments.out)
    if out.exists():
        raise RegistryError(f"{out} exists; name a new folder with --out")
    registry = _registry(arguments)
    version = registry.resolve(arguments.ref)
    with tempfile.TemporaryDirectory(prefix="ftray-") as scratch:
        yield version, registry.fetch(version, Path(scratch) / "version"), out


def _base(version: Version, arguments: argparse.Namespace) -> Model:
    """The base that the card names, or the one given with --base; it must be the one that was trained on."""
    from ftray.config.schema import Model
    from ftray.models import chain
    from ftray.models.load import fingerprint
    from ftray.store.paths import Storage

    card = version.card
    model = Model(
        base=arguments.base or card["base"],
        revision=None if arguments.base else card.get("base_revision"),
        trust_remote_code=arguments.trust_remote_code,
    )
    model = chain.found(model, Storage(arguments.storage))
    expected = card.get("base_fingerprint")
    if expected and fingerprint(model) != expected:
        raise RegistryError(
            f"{version.id} was trained on another base than {model.base!r} is now; name the right one with --base"
        )
    return model
