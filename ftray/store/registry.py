"""The registry of adapter versions: immutable, numbered, complete or invisible, safe under any number of writers.

Training publishes here and serving reads here; the two meet nowhere else. How it lies in storage: versions.py (the
numbers), publish.py (a version comes), usage.py (a version goes), aliases.py (prod and its like move).
"""

from __future__ import annotations

import difflib
import getpass
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftray.errors import BadReference, RegistryError, UnknownVersion
from ftray.store import usage
from ftray.store.admission import CARD, content_names, digest
from ftray.store.aliases import Alias, AliasState, shares
from ftray.store.localfiles import file_sha256
from ftray.store.paths import MARKER, Storage
from ftray.store.publish import publish
from ftray.store.versions import Shelf, Version, given_up

PROD = "prod"

_REF = re.compile(r"(?P<name>[^@\s]+)(?:@(?P<at>[^@\s]+))?")


class Registry:
    """The versions and aliases under one storage root. Raises RegistryError for what the caller can fix."""

    def __init__(self, storage: Storage):
        self.storage = storage

    def publish(self, name: str, folder: Path, card: Mapping[str, Any], key: str) -> Version:
        """Makes a saved adapter or model the next version.

        `key` names the publication, e.g. the run and its attempt: publishing the same one again, by a resumed run or
        by two processes at once, returns the version that is there. The card is kept as given, with name, version,
        created, publication and digest added. RegistryError lists what is wrong with the folder.
        """
        return publish(Shelf(self.storage, name), Path(folder), card, key)

    # reading

    def names(self) -> list[str]:
        """Adapters with at least one version."""
        return [name for name in self.storage.list("adapters") if Shelf(self.storage, name).versions()]

    def versions(self, name: str) -> list[Version]:
        """Complete versions, oldest first; [] for an unknown name."""
        return Shelf(self.storage, name).versions()

    def resolve(self, ref: str) -> Version:
        """`name@v3`; `name@prod` (of a split: the largest share); `name`: prod if it is set, else the newest."""
        asked = _parse(ref)
        if asked.number is not None:
            return self._version(asked.name, asked.number)
        state = self._alias(asked.name, asked.alias or PROD)
        if state is not None:
            return self._version(asked.name, state.main)
        newest = self._newest(asked.name)
        if asked.alias is None:
            return newest
        known = ", ".join(self.aliases(asked.name)) or "none yet"
        raise UnknownVersion(f"{asked.name} has no alias {asked.alias!r}; aliases: {known}; versions: {newest.id}, …")

    def fetch(self, version: Version, into: Path | None = None) -> Path:
        """A local folder with the version's files, checked against its digest.

        Under a local root it is the version's own folder; else `into`, which is only filled where it is not right yet.
        """
        try:
            wanted = self.storage.read_json(self.storage.join(version.key, MARKER))["files"]
            if digest(wanted) != version.digest:
                raise RegistryError(f"{version.id}: the marker does not fit the digest; publish it again")
            local = self.storage.local_path(version.key)
            if local is None and into is None:
                raise ValueError("`into` is needed where the storage root is not a local folder")
            folder = local if local is not None else Path(into or "")
            if local is None and _damage(folder, wanted):
                for name in [*wanted, CARD]:
                    self.storage.download_file(self.storage.join(version.key, name), folder / name)
        except FileNotFoundError as error:
            raise RegistryError(f"{version.id} was deleted, or its files were removed ({error})") from error
        if damage := _damage(folder, wanted):
            raise RegistryError(f"{version.id} in {folder} is not what was published: {damage}; publish it again")
        return folder

    def aliases(self, name: str) -> dict[str, AliasState]:
        """Where each alias points."""
        states = {alias: self._alias(name, alias) for alias in self.storage.list(self._aliases_key(name))}
        return {alias: state for alias, state in states.items() if state is not None}

    def history(self, name: str, alias: str = PROD) -> list[AliasState]:
        """Every move of an alias that counts, oldest first."""
        shelf = Shelf(self.storage, name)
        return Alias(self.storage, name, alias).history(shelf.deleted())

    # moving aliases

    def promote(
        self, ref: str, alias: str = PROD, force: bool = False, expect: int | None = None, by: str | None = None
    ) -> AliasState:
        """Points an alias at a version; a bare name means its newest one.

        Refused when the version failed its gate, unless forced, and when `expect`, the number of the move that the
        caller saw (0: none), is no longer the alias's.
        """
        asked = _parse(ref)
        bare = asked.number is None and asked.alias is None
        version = self._newest(asked.name) if bare else self.resolve(ref)
        _check_gate(version, force)
        return self._move(asked.name, alias, {version.number: 1.0}, reason="promote", expect=expect, by=by)

    def split(
        self,
        name: str,
        alias: str,
        weights: Mapping[Any, float],
        force: bool = False,
        expect: int | None = None,
        by: str | None = None,
    ) -> AliasState:
        """Points an alias at several versions: {3: 0.9, 4: 0.1}. The same gate and `expect` as `promote`."""
        targets = shares(weights)
        for number in targets:
            _check_gate(self._version(name, number), force)
        return self._move(name, alias, targets, reason="split", expect=expect, by=by)

    def rollback(self, name: str, alias: str = PROD, by: str | None = None) -> AliasState:
        """Points an alias where it pointed before, in one move; twice goes back two states.

        RegistryError if there is nothing before, or if another writer moved it meanwhile.
        """
        deleted = Shelf(self.storage, name).deleted()
        moves = Alias(self.storage, name, alias)
        current = moves.state(deleted)
        before = moves.before(current, deleted) if current else None
        if current is None or before is None:
            raise RegistryError(f"{name}@{alias} has nothing to go back to; promote a version: {name}@v1")
        expect, restores = current.number, before.number
        return self._move(name, alias, before.targets, reason="rollback", expect=expect, by=by, restores=restores)

    def drop_alias(self, name: str, alias: str, by: str | None = None) -> None:
        """Points an alias nowhere; its history stays."""
        if self._alias(name, alias) is not None:
            self._move(name, alias, {}, reason="drop", expect=None, by=by)

    # holding and deleting

    def hold(self, ref: str, holder: str, ttl_s: float) -> Version:
        """Keeps a version from being deleted for `ttl_s` seconds; holding again renews. `holder` names a replica."""
        version = self.resolve(ref)
        usage.hold(Shelf(self.storage, version.name), version.number, holder, ttl_s)
        return version

    def release(self, ref: str, holder: str) -> None:
        """Ends a hold; fine if there is none, or if the version is gone."""
        asked = _parse(ref)
        number = asked.number if asked.number is not None else self.resolve(ref).number
        usage.release(Shelf(self.storage, asked.name), number, holder)

    def holders(self, name: str, number: int) -> list[str]:
        """Whose hold of a version has not run out."""
        return usage.holders(Shelf(self.storage, name), number)

    def made_of(self, name: str, number: int) -> list[str]:
        """Versions that began from this one, at whatever depth: their base cannot be made again without it."""
        every = (version for other in self.names() for version in self.versions(other))
        id_ = f"{name}@v{number}"
        return [one.id for one in every if any(part["version"] == id_ for part in one.card.get("lineage", []))]

    def delete(self, ref: str) -> None:
        """Removes a version for good; its number is not used again. The ref must name the number: `name@v3`.

        Refused while an alias points at it, a replica holds it, another version is made of it, or its publication is
        in progress. What a killed deletion left over is removed by repeating it.
        """
        asked = _parse(ref)
        if asked.number is None:
            raise BadReference(f"say which version to delete: {asked.name}@v3, not {ref!r}")
        shelf, number = Shelf(self.storage, asked.name), asked.number
        if number in shelf.deleted():
            shelf.clear(number)
            return
        if shelf.version(number) is None:
            self._check_abandoned(shelf, number)
        usage.delete(shelf, number, lambda: self.aliases(asked.name), lambda: self.made_of(asked.name, number))

    # helpers

    def _version(self, name: str, number: int) -> Version:
        shelf = Shelf(self.storage, name)
        if number in shelf.deleted():
            raise UnknownVersion(f"{name}@v{number} was deleted; {self._what_there_is(name)}")
        version = shelf.version(number)
        if version is None:
            raise UnknownVersion(f"there is no {name}@v{number}; {self._what_there_is(name)}")
        return version

    def _newest(self, name: str) -> Version:
        versions = self.versions(name)
        if not versions:
            raise UnknownVersion(f"there is no adapter {name!r}; {self._what_there_is(name)}")
        return versions[-1]

    def _what_there_is(self, name: str) -> str:
        if versions := self.versions(name):
            return f"there are {', '.join(version.id for version in versions[-5:])}"
        names = self.names()
        near = difflib.get_close_matches(name, names, n=1)
        known = f"it holds {', '.join(names[:10])}" if names else "it is empty: train something first"
        return f"did you mean {near[0]!r}?" if near else f"the registry is {self.storage.root}, {known}"

    def _aliases_key(self, name: str) -> str:
        return Shelf(self.storage, name).key("aliases")

    def _alias(self, name: str, alias: str) -> AliasState | None:
        shelf = Shelf(self.storage, name)
        return Alias(self.storage, name, alias).state(shelf.deleted())

    def _move(
        self,
        name: str,
        alias: str,
        targets: Mapping[int, float],
        *,
        reason: str,
        expect: int | None,
        by: str | None,
        restores: int | None = None,
    ) -> AliasState:
        shelf, moves = Shelf(self.storage, name), Alias(self.storage, name, alias)
        moved = moves.move(
            targets, by=by or _who(), reason=reason, deleted=shelf.deleted(), expect=expect, restores=restores
        )
        usage.settle(shelf, targets)
        return moved

    def _check_abandoned(self, shelf: Shelf, number: int) -> None:
        """A number without a version: RegistryError unless it is what a dead publisher left."""
        claim = shelf.claims.read(number)
        if claim is None:
            self._version(shelf.name, number)  # says what there is
        elif not given_up(claim):
            who = f"pid {claim['pid']} on host {claim['host']}"
            raise RegistryError(f"{shelf.name}@v{number} is being published by {who}; wait for it")


@dataclass(frozen=True)
class _Ref:
    name: str
    number: int | None = None
    alias: str | None = None


def _parse(ref: str) -> _Ref:
    match = _REF.fullmatch(ref)
    if match is None:
        raise BadReference(f"{ref!r} names no version; write name, name@v3 or name@{PROD}")
    at = match["at"]
    if at is not None and re.fullmatch(r"v\d+", at):
        return _Ref(match["name"], number=int(at[1:]))
    return _Ref(match["name"], alias=at)


def _check_gate(version: Version, force: bool) -> None:
    gate = version.card.get("gate") or {}
    if gate.get("passed") is not False or force:
        return
    rules = [rule for rule in gate.get("rules", []) if isinstance(rule, dict) and not rule.get("passed", True)]
    failed = "; ".join(f"{rule.get('rule')} (it is {rule.get('value')})" for rule in rules)
    raise RegistryError(
        f"{version.id} did not pass its gate{': ' + failed if failed else ''}; train further, or promote with --force"
    )


def _damage(folder: Path, wanted: Mapping[str, Mapping[str, Any]]) -> str | None:
    """What differs between a folder and the files that were published; None: nothing."""
    found = set(content_names(folder)) if folder.is_dir() else set()
    if missing := sorted(wanted.keys() - found):
        return f"{missing[0]} is missing"
    if added := sorted(found - wanted.keys()):
        return f"{added[0]} was added"
    for name, info in wanted.items():
        if (folder / name).stat().st_size != info["size"] or file_sha256(folder / name) != info["sha256"]:
            return f"{name} was changed"
    return None


def _who() -> str:
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"
