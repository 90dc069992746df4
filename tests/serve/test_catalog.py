"""Names become versions, in step with the registry and without waiting for it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import time
from collections import Counter
from pathlib import Path

import pytest
from serve_registry import publish

from ftray.errors import AdapterError, BadReference, RegistryError, RequestError, UnknownVersion
from ftray.serve.catalog import Catalog, Route
from ftray.serve.engine import VersionRef
from ftray.store.paths import MARKER, Storage
from ftray.store.registry import Registry

HOSTILE = [
    "",
    "../../etc/passwd",
    "bot/../bot",
    "bot\0",
    "bot\n",
    "bot@",
    "@prod",
    "bot@v1@v2",
    "bot@../v1",
    "bot@v0",
    "bot@v01",
    "bot@v٣",
    "bot@v99999999999999999999",
    "Bot",
    "bot@PROD",
    "b" * 65,
    "b" * 1_000_000,
    "bot@" + "a" * 1_000_000,
    "%2e%2e",
    "аdmin",
    "file:///etc",
    "\ud800",
]


@pytest.fixture(params=["local", "memory"])
def registry(request: pytest.FixtureRequest, tmp_path: Path):
    root = str(tmp_path / "store") if request.param == "local" else f"memory://{tmp_path.name}-{time.time_ns()}"
    registry = Registry(Storage(root))
    yield registry
    if request.param == "memory":
        registry.storage.remove("adapters")


@pytest.fixture
def local(tmp_path: Path) -> Registry:
    return Registry(Storage(str(tmp_path / "store")))


@contextlib.asynccontextmanager
async def watching(registry: Registry, **options):
    catalog = Catalog(
        registry,
        **{"base_names": ["base", "builtin:tiny"], "fingerprint": None, "allowed": "all", "watch_s": 60, **options},
    )
    await catalog.start()
    try:
        yield catalog
    finally:
        await catalog.stop()


async def until(is_so, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not await is_so():
        assert time.monotonic() < deadline, "it did not come to be"
        await asyncio.sleep(0.02)


async def refusal(catalog: Catalog, model: str) -> RequestError:
    with pytest.raises(RequestError) as caught:
        await catalog.resolve(model)
    return caught.value


def test_names_numbers_and_aliases_become_versions(registry: Registry, tmp_path: Path):
    v1, v2, v3 = (publish(registry, "bot", says, folder=tmp_path) for says in ("one", "two", "three"))
    registry.promote("bot@v1", "canary")

    async def main():
        async with watching(registry) as catalog:
            assert await catalog.resolve("base") == Route("base", None)
            assert await catalog.resolve("builtin:tiny") == Route("builtin:tiny", None)
            assert await catalog.resolve("bot@v2") == Route("bot@v2", v2)
            assert await catalog.resolve("bot@canary") == Route("bot@canary", v1, "canary")
            assert await catalog.resolve("bot") == Route("bot", v3)  # nothing is promoted: the newest
            await catalog.promote("bot@v2")
            assert await catalog.resolve("bot") == Route("bot", v2, "prod")
            assert (await catalog.resolve("bot@prod")).version == v2

    asyncio.run(main())


@pytest.mark.parametrize("model", HOSTILE)
def test_a_hostile_name_is_a_model_that_is_not_there(local: Registry, tmp_path: Path, model: str):
    publish(local, "bot", "one", folder=tmp_path)

    async def main():
        async with watching(local) as catalog:
            error = await refusal(catalog, model)
            assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
            assert len(str(error)) < 400

    asyncio.run(main())


def test_an_unknown_name_is_told_what_was_meant(local: Registry, tmp_path: Path):
    publish(local, "coffee-bot", "one", folder=tmp_path)
    local.promote("coffee-bot@v1", "canary")

    async def main():
        async with watching(local) as catalog:
            assert "did you mean 'coffee-bot'" in str(await refusal(catalog, "cofee-bot"))
            assert "did you mean coffee-bot@canary" in str(await refusal(catalog, "coffee-bot@canry"))
            assert "coffee-bot has canary, v1" in str(await refusal(catalog, "coffee-bot@zzz"))

    asyncio.run(main())


def test_a_version_that_was_just_published_is_looked_up(registry: Registry, tmp_path: Path):
    async def main():
        async with watching(registry) as catalog:
            await refusal(catalog, "other")
            ref = await asyncio.to_thread(publish, registry, "bot", "one", folder=tmp_path)
            assert (await catalog.resolve("bot")).version == ref
            assert (await catalog.resolve("bot@v1")).version == ref

    asyncio.run(main())


def test_unknown_names_do_not_hammer_the_storage(local: Registry, tmp_path: Path):
    publish(local, "bot", "one", folder=tmp_path)
    asked: list[str] = []

    class Counting(Storage):
        def list(self, key: str) -> list[str]:
            asked.append(key)
            return super().list(key)

    async def main():
        async with watching(Registry(Counting(local.storage.root))) as catalog:
            asked.clear()
            for number in range(500):
                await refusal(catalog, f"bat-{number}")
            await asyncio.gather(*(refusal(catalog, "bot@v7") for _ in range(200)))
            for _ in range(200):
                await refusal(catalog, "bot@v7")

    began = time.monotonic()
    asyncio.run(main())
    # A look-up of a name that is there lists three folders or four; of one that is not, none.
    assert len(asked) <= 4 * (1 + time.monotonic() - began), asked


def test_a_look_at_what_has_not_changed_reads_nothing(local: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ftray.store.watch._SETTLED_S", -1.0)
    for name in ("bot", "cat"):
        publish(local, name, "one", folder=tmp_path)
        local.promote(f"{name}@v1")
    calls: list[str] = []

    class Counting(Storage):
        def list(self, key: str) -> list[str]:
            calls.append(key)
            return super().list(key)

        def read_bytes(self, key: str) -> bytes:
            calls.append(key)
            return super().read_bytes(key)

    async def main():
        async with watching(Registry(Counting(local.storage.root))) as catalog:
            await catalog.refresh()  # times of change of the aliases' folders
            calls.clear()
            await catalog.refresh()
            assert calls == ["adapters"]
            local.promote("cat@v1", "canary")
            await catalog.refresh()
            assert (await catalog.resolve("cat@canary")).version is not None
            assert not [key for key in calls if "bot" in key or "card" in key]

    asyncio.run(main())


def promote_elsewhere(root: str, ref: str) -> None:
    Registry(Storage(root)).promote(ref)


def test_what_another_process_does_is_seen_soon(local: Registry, tmp_path: Path):
    v1, v2 = (publish(local, "bot", says, folder=tmp_path) for says in ("one", "two"))
    local.promote("bot@v1")

    async def main():
        async with watching(local, watch_s=0.1) as catalog:

            async def points_at(ref: VersionRef) -> bool:
                return (await catalog.resolve("bot")).version == ref

            assert await points_at(v1)
            elsewhere = multiprocessing.get_context("fork").Process(
                target=promote_elsewhere, args=(local.storage.root, "bot@v2")
            )
            elsewhere.start()
            await asyncio.to_thread(elsewhere.join)
            began = time.monotonic()
            await until(lambda: points_at(v2))
            assert time.monotonic() - began < 2.0

            v3 = await asyncio.to_thread(publish, local, "bot", "three", folder=tmp_path)
            await until(lambda: _lists(catalog, "bot@v3"))
            assert (await catalog.resolve("bot@v3")).version == v3
            local.delete("bot@v1")
            await until(lambda: _lists(catalog, "bot@v1", False))
            assert "bot has" in str(await refusal(catalog, "bot@v1"))

    asyncio.run(main())


async def _lists(catalog: Catalog, id: str, is_there: bool = True) -> bool:
    return (id in {listed.id for listed in catalog.models()}) is is_there


def test_a_version_without_its_marker_is_seen_when_the_marker_comes(registry: Registry, tmp_path: Path):
    publish(registry, "bot", "one", folder=tmp_path)
    ref = publish(registry, "bot", "two", folder=tmp_path)
    key = f"adapters/bot/v2/{MARKER}"
    marker = registry.storage.read_bytes(key)
    registry.storage.remove(key)

    async def main():
        async with watching(registry, watch_s=0.05) as catalog:
            await refusal(catalog, "bot@v2")
            registry.storage.write_bytes(key, marker)
            await until(lambda: _lists(catalog, "bot@v2"))
            assert (await catalog.resolve("bot")).version == ref

    asyncio.run(main())


def test_a_registry_that_was_made_anew_has_other_versions_under_the_same_numbers(local: Registry, tmp_path: Path):
    old = publish(local, "bot", "one", folder=tmp_path)

    async def main():
        async with watching(local, watch_s=0.05) as catalog:
            assert (await catalog.resolve("bot")).version == old
            local.storage.remove("adapters")
            new = await asyncio.to_thread(publish, local, "bot", "two", folder=tmp_path)
            assert (new.id, new.digest) != (old.id, old.digest)

            async def is_new() -> bool:
                return (await catalog.resolve("bot")).version == new

            await until(is_new)

    asyncio.run(main())


def test_moves_through_the_catalog_count_at_once(registry: Registry, tmp_path: Path):
    refs = [publish(registry, "bot", says, folder=tmp_path) for says in ("one", "two", "three")]

    async def main():
        async with watching(registry, watch_s=0.01) as catalog:  # looks all the time, and never undoes a move
            for turn in range(30):
                state = await catalog.promote(f"bot@v{1 + turn % 3}", by="alice")
                assert state.by == "alice"
                assert (await catalog.resolve("bot")).version == refs[turn % 3]
            await catalog.rollback("bot", by="bob")
            assert (await catalog.resolve("bot")).version == refs[1]
            await catalog.promote("bot@v3", "canary")
            await catalog.unalias("bot", "canary")
            await refusal(catalog, "bot@canary")

    asyncio.run(main())


def test_a_refused_move_says_why_and_changes_nothing(local: Registry, tmp_path: Path):
    publish(local, "bot", "one", folder=tmp_path)
    publish(local, "bot", "two", folder=tmp_path, gate={"passed": False, "rules": []})

    async def main():
        async with watching(local) as catalog:
            first = await catalog.promote("bot@v1")
            with pytest.raises(RegistryError, match="did not pass its gate"):
                await catalog.promote("bot@v2")
            with pytest.raises(RegistryError, match="moved by another writer"):
                await catalog.promote("bot@v1", expect=first.number + 7)
            with pytest.raises(BadReference):
                await catalog.promote("bot@v1", "v7")
            with pytest.raises(UnknownVersion):
                await catalog.split("bot", "prod", {9: 1.0})
            assert (await refusal_of(catalog.promote("bot@v9"))).status == 404
            assert (await refusal_of(catalog.rollback("../bot"))).status == 404
            route = await catalog.resolve("bot")
            assert route.version is not None
            assert route.version.number == 1

    asyncio.run(main())


async def refusal_of(work) -> RequestError:
    with pytest.raises(RequestError) as caught:
        await work
    return caught.value


def test_a_split_gives_each_version_its_share_and_each_user_one_version(local: Registry, tmp_path: Path):
    for says in ("one", "two"):
        publish(local, "bot", says, folder=tmp_path)

    async def main():
        async with watching(local) as catalog:
            await catalog.split("bot", "prod", {1: 0.9, 2: 0.1})
            routes = [await catalog.resolve("bot", point=index / 1000) for index in range(1000)]
            assert Counter(route.version.id for route in routes) == {"bot@v1": 900, "bot@v2": 100}
            drawn = Counter([(await catalog.resolve("bot")).version.id for _ in range(4000)])
            assert 300 < drawn["bot@v2"] < 500  # 6 standard deviations of 19 around 400
            for point in (0.0, 0.5, 0.95):
                assert len({(await catalog.resolve("bot", point=point)).version for _ in range(20)}) == 1

    asyncio.run(main())


def test_only_allowed_names_are_there(local: Registry, tmp_path: Path):
    for name in ("bot", "cat"):
        publish(local, name, "one", folder=tmp_path)

    async def main():
        async with watching(local, allowed=["cat"]) as catalog:
            assert (await catalog.resolve("cat")).version
            assert "did you mean" not in str(await refusal(catalog, "bot"))
            assert (await refusal_of(catalog.promote("bot@v1"))).status == 404
            assert {listed.id for listed in catalog.models()} == {"base", "builtin:tiny", "cat", "cat@v1"}

    asyncio.run(main())


def test_a_version_of_another_base_is_refused_with_both_named(local: Registry, tmp_path: Path):
    publish(local, "bot", "one", folder=tmp_path, base="acme/other", base_fingerprint="sha256:aaa")
    publish(local, "cat", "one", folder=tmp_path, base_fingerprint="sha256:bbb")

    async def main():
        async with watching(local, fingerprint="sha256:bbb") as catalog:
            assert (await catalog.resolve("cat")).version
            with pytest.raises(AdapterError) as caught:
                await catalog.resolve("bot")
            for part in ("bot@v1", "acme/other", "sha256:aaa", "sha256:bbb"):
                assert part in str(caught.value)
            problems = {listed.id: listed.problem for listed in catalog.models()}
            assert problems["cat@v1"] is None
            assert "acme/other" in str(problems["bot@v1"])

    asyncio.run(main())


def test_the_list_says_what_there_is(local: Registry, tmp_path: Path):
    publish(local, "bot", "one", folder=tmp_path, gate={"passed": True}, objective={"kind": "sft"})
    publish(local, "bot", "two", folder=tmp_path)
    local.split("bot", "canary", {1: 3, 2: 1})

    async def main():
        async with watching(local) as catalog:
            listed = {entry.id: entry for entry in catalog.models()}
            assert list(listed) == ["base", "builtin:tiny", "bot", "bot@canary", "bot@v2", "bot@v1"]
            assert listed["bot@canary"].targets == {1: 0.75, 2: 0.25}
            assert listed["bot@canary"].state.number == 1
            info = listed["bot@v1"].info
            assert (info.servability, info.method, info.objective, info.gate) == ("adapter", "lora", "sft", True)
            assert info.created

    asyncio.run(main())


def test_what_is_known_is_served_while_the_registry_is_away(
    local: Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    ref = publish(local, "bot", "one", folder=tmp_path)
    store, away = Path(local.storage.root), tmp_path / "away"

    async def main():
        async with watching(local, watch_s=0.03) as catalog:
            assert catalog.stale_since is None
            store.rename(away)
            await until(lambda: _is_stale(catalog))
            assert (await catalog.resolve("bot")).version == ref
            assert (await refusal(catalog, "bot@v2")).status == 503
            assert (await refusal_of(catalog.promote("bot@v1"))).status == 503
            store.mkdir()  # what an unmounted share looks like
            await asyncio.sleep(0.2)
            assert catalog.stale_since is not None
            assert (await catalog.resolve("bot@v1")).version == ref
            store.rmdir()
            away.rename(store)
            await until(lambda: _is_stale(catalog, False))

    with caplog.at_level(logging.INFO, logger="ftray.serve.catalog"):
        asyncio.run(main())
    said = [record.message for record in caplog.records if record.name == "ftray.serve.catalog"]
    assert len([line for line in said if "cannot be read" in line]) == 1
    assert len([line for line in said if "can be read again" in line]) == 1


async def _is_stale(catalog: Catalog, wanted: bool = True) -> bool:
    return (catalog.stale_since is not None) is wanted


def test_a_server_starts_without_its_registry_and_finds_it_later(local: Registry, tmp_path: Path):
    ref = publish(local, "bot", "one", folder=tmp_path)
    store, away = Path(local.storage.root), tmp_path / "away"
    store.rename(away)

    async def main():
        async with watching(local, watch_s=0.03) as catalog:
            await refusal(catalog, "bot")
            away.rename(store)
            await until(lambda: _lists(catalog, "bot"))
            assert (await catalog.resolve("bot")).version == ref

    asyncio.run(main())


def test_one_broken_adapter_does_not_hide_the_others(local: Registry, tmp_path: Path):
    for name in ("bad", "bot", "odd"):
        publish(local, name, "one", folder=tmp_path)
    adapters = Path(local.storage.root, "adapters")
    (adapters / "bad" / "v1" / MARKER).write_text("[]")
    (adapters / "odd" / "v1" / "card.json").write_text('"card"')
    (adapters / "odd" / "aliases" / "Not An Alias").mkdir(parents=True)
    (adapters / "My Folder").mkdir()
    (adapters / "notes.txt").write_text("hello")

    async def main():
        async with watching(local) as catalog:
            assert (await catalog.resolve("bot")).version is not None
            assert (await refusal(catalog, "bad")).status == 404
            assert (await refusal(catalog, "odd")).status == 404

    asyncio.run(main())
