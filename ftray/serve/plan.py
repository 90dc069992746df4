"""What a serve file will serve: `ftray serve --check`, and the first lines of a server. Loads no weights, but
where the base is a version that was never merged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ftray.config.serving import Serving
from ftray.errors import FtrayError, ModelError, RegistryError
from ftray.store.aliases import AliasState
from ftray.store.paths import Storage
from ftray.store.registry import Registry, Version

_ADAPTERS_SHOWN = 30


@dataclass(frozen=True)
class Adapter:
    """One name of the registry: its versions, where its aliases point ({"prod": {"2": 1.0}}), what hinders it."""

    name: str
    versions: tuple[str, ...]
    aliases: dict[str, dict[int, float]]
    method: str | None
    hindrance: str | None = None

    @property
    def aliases_shown(self) -> str | None:
        return ", ".join(f"{alias} → {_targets(targets)}" for alias, targets in self.aliases.items()) or None


@dataclass(frozen=True)
class Plan:
    """`problems` keep the server from serving what the file asks for; `notes` are worth knowing."""

    serving: Serving
    adapters: tuple[Adapter, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def address(self) -> str:
        http = self.serving.http
        return f"http://{f'[{http.host}]' if ':' in http.host else http.host}:{http.port}"

    def lines(self) -> list[str]:
        """For the terminal."""
        facts = list(_facts(self))
        width = max(len(name) for name, _ in facts)
        lines = [f"{name:<{width}}  {value}" for name, value in facts]
        if self.adapters:
            lines += ["", *_table(self.adapters[:_ADAPTERS_SHOWN])]
        if more := len(self.adapters) - _ADAPTERS_SHOWN:
            lines += [f"… and {more} more; `ftray adapters list` shows all"] if more > 0 else []
        if self.notes or self.problems:
            lines.append("")
        return [*lines, *(f"note     {text}" for text in self.notes), *(f"problem  {text}" for text in self.problems)]

    def to_json(self) -> dict[str, Any]:
        return {
            "serving": self.serving.model_dump(mode="json", exclude={"keys"}),
            "keys": [{"name": key.name, "scopes": key.scopes} for key in self.serving.keys],
            "address": self.address,
            "adapters": [asdict(adapter) for adapter in self.adapters],
            "problems": list(self.problems),
            "notes": list(self.notes),
            "ok": self.ok,
        }


def plan(serving: Serving) -> Plan:
    """Looks at the base's files and the registry. What is wrong becomes the plan's problems."""
    problems: list[str] = []
    notes: list[str] = []
    base = _fingerprint(serving, problems)
    adapters: list[Adapter] = []
    try:
        registry = Registry(Storage(serving.storage))
        adapters += _adapters(serving, registry, base)
        problems += _unresolved(serving, registry, base)
    except FtrayError as error:
        problems.append(f"storage: {error}")
    else:
        wanted = serving.adapters.serve
        known = {adapter.name for adapter in adapters}
        if wanted != "all":
            missing = [name for name in wanted if name not in known]
            notes += [f"adapters.serve: {name} has no version yet; it is served once it has" for name in missing]
        elif not adapters:
            notes.append(f"no adapters under {serving.storage} yet; what is published there is served within seconds")
    if not serving.keys:
        notes.append("no keys: whoever reaches the port may ask, promote and load; `ftray serve --new-key NAME`")
    return Plan(serving, tuple(adapters), tuple(problems), tuple(notes))


def _fingerprint(serving: Serving, problems: list[str]) -> str | None:
    from ftray.models import chain
    from ftray.models.load import fingerprint

    try:
        return fingerprint(chain.here(serving, Storage(serving.storage)).model)
    except (ModelError, RegistryError) as error:
        problems.append(str(error))
        return None


def _adapters(serving: Serving, registry: Registry, base: str | None) -> Iterator[Adapter]:
    wanted = serving.adapters.serve
    for name in registry.names():
        if wanted != "all" and name not in wanted:
            continue
        versions = registry.versions(name)
        if not versions:
            continue  # the last one was deleted between the two looks
        aliases = {alias: state.targets for alias, state in registry.aliases(name).items()}
        main = _main(versions, registry.aliases(name))
        method = main.card.get("method")
        kind = method.get("kind") if isinstance(method, dict) else method
        yield Adapter(name, tuple(version.id for version in versions), aliases, kind, _hindrance(main, base))


def _main(versions: list[Version], aliases: dict[str, AliasState]) -> Version:
    """What the bare name means: prod, or else the newest."""
    prod = aliases.get("prod")
    return next((version for version in versions if prod and version.number == prod.main), versions[-1])


def _hindrance(version: Version, base: str | None) -> str | None:
    trained_on = version.card.get("base_fingerprint")
    if base and trained_on and trained_on != base:
        return f"{version.id} was trained on another base: {version.card.get('base')}"
    return None


def _unresolved(serving: Serving, registry: Registry, base: str | None) -> Iterator[str]:
    for key in ("preload", "pin"):
        for ref in getattr(serving.adapters, key):
            try:
                hindrance = _hindrance(registry.resolve(ref), base)
            except FtrayError as error:
                hindrance = str(error)
            if hindrance:
                yield f"adapters.{key}: {hindrance}"


def _facts(plan: Plan) -> Iterator[tuple[str, str]]:
    serving = plan.serving
    revision = f" at {serving.model.revision}" if serving.model.revision else ""
    yield "base", f"{serving.model.base}{revision}"
    yield "engine", _engine(serving)
    yield "storage", serving.storage
    low, high = _range(serving.scale.replicas)
    yield "replicas", str(low) if low == high else f"{low} to {high}, as load decides"
    page = "; playground at /" if serving.http.playground else ""
    yield "address", f"{plan.address if serving.http.port else plan.address + ' (a free port)'}{page}"
    keys = ", ".join(f"{key.name} ({', '.join(key.scopes)})" for key in serving.keys)
    yield "keys", keys or "none"
    if serving.adapters.serve != "all":
        yield "served", ", ".join(serving.adapters.serve)
    for name in ("preload", "pin"):
        if refs := getattr(serving.adapters, name):
            yield name, ", ".join(refs)


def _engine(serving: Serving) -> str:
    engine = serving.engine
    about = (type(engine).__doc__ or "").partition("\n")[0].rstrip(".")
    return f"{engine.kind} ({about[:1].lower()}{about[1:]})" if engine.kind == "auto" else engine.kind


def _range(replicas: int | list[int]) -> tuple[int, int]:
    return (replicas, replicas) if isinstance(replicas, int) else (replicas[0], replicas[1])


def _table(adapters: tuple[Adapter, ...]) -> list[str]:
    rows = [["adapter", "versions", "newest", "aliases", "method", ""]]
    rows += [
        [
            adapter.name,
            str(len(adapter.versions)),
            adapter.versions[-1].rpartition("@")[2],
            adapter.aliases_shown or "–",
            adapter.method or "–",
            adapter.hindrance or "",
        ]
        for adapter in adapters
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _targets(targets: dict[int, float]) -> str:
    return " ".join(f"v{number}" + ("" if share == 1 else f" {share:.0%}") for number, share in targets.items())
