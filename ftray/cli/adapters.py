"""`adapters …`: the registry from the terminal."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftray.cli import show as shown
from ftray.errors import RegistryError

if TYPE_CHECKING:
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
    about |= {"created": shown.when(version.created), "folder": f"{arguments.storage}/{version.key}"}
    print(f"{shown.pairs(about)}\n\ncard\n{dump(version.card)}", end="")
    return 0


def promote(arguments: argparse.Namespace) -> int:
    registry = _registry(arguments)
    version = registry.resolve(arguments.ref)
    registry.promote(version.id, arguments.alias, force=arguments.force)
    print(f"{version.name}@{arguments.alias} is now {version.id}")
    return 0


def rollback(arguments: argparse.Namespace) -> int:
    registry = _registry(arguments)
    registry.rollback(arguments.name, arguments.alias)
    print(f"{arguments.name}@{arguments.alias} is back at {registry.resolve(f'{arguments.name}@{arguments.alias}').id}")
    return 0


def merge(arguments: argparse.Namespace) -> int:
    raise SystemExit(0)


def export(arguments: argparse.Namespace) -> int:
    raise SystemExit(0)


def delete(arguments: argparse.Namespace) -> int:
    registry = _registry(arguments)
    version = registry.resolve(arguments.ref)
    if not arguments.yes:
        if not sys.stdin.isatty():
            raise RegistryError(f"{version.id} would be deleted for good; say --yes")
        if input(f"Delete {version.id} for good? [y/N] ").strip().lower() not in ("y", "yes"):
            print("Nothing deleted.")
            return 0
    registry.delete(version.id)
    print(f"{version.id} deleted; its number is not used again")
    return 0


def _registry(arguments: argparse.Namespace) -> Registry:
    from ftray.store.paths import Storage
    from ftray.store.registry import Registry

    return Registry(Storage(arguments.storage))


def _about(version: Version) -> dict[str, Any]:
    card = version.card
    passed = (card.get("gate") or {}).get("passed")
    return {
        "method": card.get("method"),
        "base": card.get("base"),
        "servability": card.get("servability"),
        "gate": None if passed is None else "passed" if passed else "failed",
    }


def _aliases(targets: dict[str, float]) -> str | None:
    return ", ".join(alias if weight == 1 else f"{alias} {weight:.0%}" for alias, weight in targets.items()) or None


def _new_folder(path: str) -> Path:
    out = Path(path)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RegistryError(f"{out} is not empty; name a new folder with --out")
    return out
