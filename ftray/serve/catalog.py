"""What may be asked for: names to versions, kept in memory, in step with the registry.

A request never waits for the storage: names are resolved from what the last look found, and only a name or version
that is not known is looked up, seldom. While the storage cannot be reached, what is known goes on being resolved.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import logging
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

from ftray.config.schema import NAME_PATTERN
from ftray.errors import AdapterError, BadReference, FtrayError, RegistryError, RequestError, StorageError
from ftray.serve.engine import VersionRef
from ftray.serve.lookups import LookUps
from ftray.store.aliases import AliasState
from ftray.store.registry import PROD, Registry
from ftray.store.versions import Version
from ftray.store.watch import Changes, Shelved, check_reachable, look

log = logging.getLogger(__name__)
T = TypeVar("T")

PATIENCE_S = 10.0
_LONGEST = 140  # name@alias with 64 characters each
_NUMBER = re.compile(r"v([1-9][0-9]{0,8})")
_SPREAD = 4  # a look that takes long is not repeated at once: at most a fifth of the time is spent looking


@dataclass(frozen=True)
class Route:
    """Where a request goes. `version` None: the base; `alias`: by which one the version was found."""

    model: str
    version: VersionRef | None
    alias: str | None = None


@dataclass(frozen=True)
class VersionInfo:
    """What is kept of a version's card. `created`: ISO 8601; `gate`: whether it passed, None if there was none."""

    ref: VersionRef
    created: str
    base: str | None
    fingerprint: str | None
    servability: str | None
    gate: bool | None
    method: str | None
    objective: str | None

    @classmethod
    def of(cls, version: Version) -> VersionInfo:
        card = version.card
        if not isinstance(version.digest, str):
            raise TypeError(f"{version.id} has no digest")
        return cls(
            ref=VersionRef.of(version),
            created=version.created,
            base=card.get("base"),
            fingerprint=card.get("base_fingerprint"),
            servability=card.get("servability"),
            gate=(card.get("gate") or {}).get("passed"),
            method=_kind(card.get("method")),
            objective=_kind(card.get("objective")),
        )


@dataclass(frozen=True)
class Listed:
    """Something that a request's `model` may say.

    `targets`: shares by version number; `info`: of the version with the largest; `state`: the alias's last move;
    `problem`: why a request for it would be refused here.
    """

    id: str
    kind: Literal["base", "name", "alias", "version"]
    targets: Mapping[int, float] = field(default_factory=dict)
    info: VersionInfo | None = None
    state: AliasState | None = None
    problem: str | None = None


class Catalog:
    """`fingerprint` is that of the served base (None: not compared); `allowed` the adapters' names that are served.

    `stale_since`, in time.time() seconds, is since when the registry cannot be read.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        base_names: Sequence[str],
        fingerprint: str | None,
        allowed: Literal["all"] | list[str],
        watch_s: float,
    ):
        self.stale_since: float | None = None
        self._registry = registry
        self._base_names = tuple(base_names)
        self._fingerprint = fingerprint
        self._allowed = allowed if allowed == "all" else frozenset(allowed)
        self._watch_s = watch_s
        self._known: dict[str, Shelved[VersionInfo]] = {}
        self._looks = 0
        self._look_of: dict[str, int] = {}
        self._failed: Mapping[str, str] = {}
        self._look_ups = LookUps()
        # Threads of our own: a storage that hangs may hold these, and nobody else's.
        self._watcher = ThreadPoolExecutor(1, "registry-watch")
        self._threads = ThreadPoolExecutor(4, "registry")
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Looks at the registry, and goes on watching it. A registry that cannot be read is looked at again later."""
        first = asyncio.ensure_future(self.refresh())
        await asyncio.wait({first}, timeout=PATIENCE_S)
        if not self._known:
            log.info("no adapters under %s yet", self._registry.storage.root)
        self._task = asyncio.create_task(self._watch(first))

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        for threads in (self._watcher, self._threads):
            threads.shutdown(wait=False, cancel_futures=True)

    # reading

    async def resolve(self, model: str, *, point: float | None = None) -> Route:
        """The version that a request's `model` means now: `name`, `name@v3` or `name@alias`; or the base.

        `point` in [0, 1) decides where an alias is split, e.g. a hash of the user, so that each stays with one version.
        RequestError 404 where there is no such version, 503 where it is not known and the registry cannot be asked.
        AdapterError for a version of another base.
        """
        if model in self._base_names:
            return Route(model, None)
        name, at = self._parts(model)
        point = random.random() if point is None else point
        found = self._find(name, at, point)
        if found is None:
            hint = await self._look_up(name)
            found = self._find(name, at, point)
            if found is None:
                raise self._unknown(model, name, at, hint)
        info, alias = found
        if problem := self._problem(info):
            raise AdapterError(problem)
        return Route(model, info.ref, alias)

    def models(self) -> list[Listed]:
        """The base, then per adapter its name, its aliases and its versions, newest first."""
        listed = [Listed(name, "base") for name in self._base_names]
        for name in sorted(self._known):
            if self._is_allowed(name):
                listed += self._listed(name, self._known[name])
        return listed

    async def refresh(self, name: str | None = None) -> None:
        """Looks at the registry now, at one adapter or all. Where that fails, what is known stays, and `stale_since`
        says so."""
        threads = self._watcher if name is None else self._threads
        try:
            await self._look(name, threads)
        except FtrayError as error:
            self._set_stale(str(error))

    # moving aliases; RegistryError where the registry refuses

    async def promote(
        self, ref: str, alias: str = PROD, *, force: bool = False, expect: int | None = None, by: str | None = None
    ) -> AliasState:
        """As Registry.promote. The move counts for the next request through this catalog."""
        name, at = self._parts(ref)
        if at is not None:
            await self.resolve(ref)
        call = partial(self._registry.promote, ref, alias, force=force, expect=expect, by=by)
        return await self._change(name, call)

    async def rollback(self, name: str, alias: str = PROD, *, by: str | None = None) -> AliasState:
        return await self._change(self._name(name), partial(self._registry.rollback, name, alias, by=by))

    async def split(
        self,
        name: str,
        alias: str,
        weights: Mapping[Any, float],
        *,
        force: bool = False,
        expect: int | None = None,
        by: str | None = None,
    ) -> AliasState:
        call = partial(self._registry.split, name, alias, weights, force=force, expect=expect, by=by)
        return await self._change(self._name(name), call)

    async def unalias(self, name: str, alias: str, *, by: str | None = None) -> None:
        """Points an alias nowhere; fine if it does so already."""
        await self._change(self._name(name), partial(self._registry.drop_alias, name, alias, by=by))

    # looking

    async def _watch(self, first: asyncio.Future[None]) -> None:
        await first
        took = 0.0
        while True:
            await asyncio.sleep(max(self._watch_s - took, _SPREAD * took))
            began = time.monotonic()
            work = asyncio.ensure_future(self.refresh())
            done, _ = await asyncio.wait({work}, timeout=PATIENCE_S)
            if not done:
                self._set_stale(f"{self._registry.storage.root} gives no answer")
                await work
            took = time.monotonic() - began

    async def _look(self, name: str | None, threads: ThreadPoolExecutor) -> None:
        self._looks += 1
        number = self._looks
        work = partial(look, self._registry.storage, dict(self._known), VersionInfo.of, only=name)
        changes = await asyncio.get_running_loop().run_in_executor(threads, work)
        self._take(changes, number)
        if name is None:
            self._set_fresh()

    def _take(self, changes: Changes[VersionInfo], number: int) -> None:
        """What a look found counts, save where another look, begun later, was faster."""
        for name, shelved in changes.read.items():
            if self._look_of.get(name, 0) < number:
                self._known[name], self._look_of[name] = shelved, number
        for name in changes.gone:
            if self._look_of.get(name, 0) < number:
                self._known.pop(name, None)
                self._look_of.pop(name, None)
        for name, reason in changes.failed.items():
            if self._failed.get(name) != reason:
                log.warning("adapter %s cannot be read: %s", name, reason)
        still = {name: why for name, why in self._failed.items() if name not in changes.read}
        self._failed = {**still, **changes.failed}

    async def _look_up(self, name: str) -> str:
        """Asks the registry for an adapter, unless that was just done; returns what else may have been meant."""

        async def ask() -> str:
            await self._look(name, self._threads)
            if name in self._known and self._known[name].versions:
                return ""
            names = [*self._base_names, *filter(self._is_allowed, self._known)]
            near = await self._in_thread(partial(difflib.get_close_matches, name, names, n=1))
            return f"; did you mean {near[0]!r}?" if near else ""

        try:
            return await self._look_ups.ask(name, ask)
        except StorageError as error:
            raise RequestError(
                f"{name} is not among the adapters known here, and the registry cannot be asked: {error}",
                param="model",
                code="registry_unreachable",
                status=503,
            ) from error

    async def _change(self, name: str, call: Callable[[], T]) -> T:
        def change() -> T:
            if self._known:
                check_reachable(self._registry.storage)  # or it would say that there is no such version
            return call()

        try:
            result = await self._in_thread(change)
        except RegistryError:
            raise
        except Exception as error:  # StorageError, and every cloud client has errors of its own
            text = f"the registry cannot be changed now: {error}"
            raise RequestError(text, code="registry_unreachable", status=503) from error
        await self.refresh(name)
        return result

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    def _set_stale(self, why: str) -> None:
        if self.stale_since is None:
            self.stale_since = time.time()
            log.warning("the registry cannot be read, what is known goes on being served: %s", why)

    def _set_fresh(self) -> None:
        if self.stale_since is not None:
            log.info("the registry can be read again, after %.0f s", time.time() - self.stale_since)
            self.stale_since = None

    # names

    def _parts(self, model: str) -> tuple[str, str | None]:
        """Name and what follows the @, each of them safe to look for; RequestError 404 for everything else."""
        name, at, rest = model.partition("@")
        is_ref = len(model) <= _LONGEST and NAME_PATTERN.fullmatch(name) and (not at or NAME_PATTERN.fullmatch(rest))
        if not is_ref or not self._is_allowed(name):
            raise self._unknown(model, name, rest, "")
        return name, rest if at else None

    def _name(self, name: str) -> str:
        found, at = self._parts(name)
        if at is not None:
            raise BadReference(f"{name!r} names more than an adapter; write {found!r}")
        return found

    def _is_allowed(self, name: str) -> bool:
        return self._allowed == "all" or name in self._allowed

    def _find(self, name: str, at: str | None, point: float) -> tuple[VersionInfo, str | None] | None:
        shelved = self._known.get(name)
        if shelved is None or not shelved.versions:
            return None
        number = _NUMBER.fullmatch(at) if at is not None else None
        if number is not None:
            info, alias = shelved.versions.get(int(number[1])), None
        elif (state := shelved.aliases.get(at or PROD)) is not None:
            info, alias = shelved.versions.get(state.pick(point)), at or PROD
        else:
            info, alias = (shelved.versions[max(shelved.versions)] if at is None else None), None
        return (info, alias) if info is not None else None

    def _unknown(self, model: str, name: str, at: str | None, hint: str) -> RequestError:
        shown = model if len(model) <= _LONGEST else f"{model[:60]}…"
        shelved = self._known.get(name) if self._is_allowed(name) else None
        if shelved is not None and shelved.versions:
            there = [*sorted(shelved.aliases), *(f"v{number}" for number in sorted(shelved.versions, reverse=True)[:5])]
            near = difflib.get_close_matches(at or "", there, n=1)
            hint = f"; did you mean {name}@{near[0]}?" if near else f"; {name} has {', '.join(there)}"
        text = f"there is no model {shown!r} here{hint}"
        return RequestError(text, param="model", code="model_not_found", status=404)

    def _problem(self, info: VersionInfo) -> str | None:
        if self._fingerprint is None or info.fingerprint in (None, self._fingerprint):
            return None
        return (
            f"{info.ref.id} was trained on {info.base or 'a base'} with fingerprint {info.fingerprint}, "
            f"but here {self._base_names[0] if self._base_names else 'the base'} with {self._fingerprint} is served; "
            "serve the version with its own base"
        )

    def _listed(self, name: str, shelved: Shelved[VersionInfo]) -> Iterator[Listed]:
        if not shelved.versions:
            return
        prod = shelved.aliases.get(PROD)
        yield self._entry(name, "name", prod.targets if prod else {max(shelved.versions): 1.0}, shelved, prod)
        for alias, state in sorted(shelved.aliases.items()):
            yield self._entry(f"{name}@{alias}", "alias", state.targets, shelved, state)
        for number in sorted(shelved.versions, reverse=True):
            yield self._entry(f"{name}@v{number}", "version", {number: 1.0}, shelved)

    def _entry(
        self,
        id: str,
        kind: Literal["name", "alias", "version"],
        targets: Mapping[int, float],
        shelved: Shelved[VersionInfo],
        state: AliasState | None = None,
    ) -> Listed:
        info = shelved.versions.get(state.main if state else max(targets))
        problem = self._problem(info) if info is not None else "its version is not there"
        return Listed(id, kind, dict(targets), info, state, problem)


def _kind(section: Any) -> str | None:
    return section.get("kind") if isinstance(section, dict) else section
