"""Versions come when they are asked for, stay while they are used, and go when their room is needed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from pathlib import Path

import pytest
from serve_fakes import FakeEngine
from serve_registry import publish

from ftray.errors import AdapterError, Overloaded, RegistryError, RequestError
from ftray.serve.engine import Generation, Sampling, VersionRef
from ftray.serve.folders import Folders
from ftray.serve.holds import Holds
from ftray.serve.residency import Residency
from ftray.store import localfiles
from ftray.store.paths import Storage
from ftray.store.registry import Registry

HOLDER = "replica-1"


class PickyEngine(FakeEngine):
    """Refuses to load versions whose key holds one of `refused`."""

    refused: tuple[str, ...] = ()

    async def load(self, key: str, folder: Path):
        if any(part in key for part in self.refused):
            await asyncio.sleep(self.load_s)
            raise AdapterError(f"{key}: rank 128 is more than this server takes (64)")
        return await super().load(key, folder)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(Storage(str(tmp_path / "store")))


@pytest.fixture
def refs(registry: Registry, tmp_path: Path) -> list[VersionRef]:
    """bot-0@v1 … bot-4@v1."""
    return [publish(registry, f"bot-{number}", f"word{number}", folder=tmp_path) for number in range(5)]


@contextlib.asynccontextmanager
async def resident(registry: Registry, engine: FakeEngine, *, cache: Path | None = None, ttl_s: float = 60, **options):
    residency = Residency(
        engine,
        folders=Folders(registry, cache=cache),
        holds=Holds(registry, holder=HOLDER, ttl_s=ttl_s, linger_s=0.2),
        **{"wait_s": 5.0, "tenure_s": 0.0, **options},
    )
    try:
        yield residency
    finally:
        await residency.close()


async def say(residency: Residency, engine: FakeEngine, ref: VersionRef, tokens: int = 1) -> str:
    """What a request to a version answers."""
    async with residency.use(ref) as key:
        request = Generation("r", (), Sampling(tokens), version=key)
        return "".join([piece.text async for piece in engine.generate(request)])


async def until(is_so, timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, "it did not come to be"
        await asyncio.sleep(0.005)


def states(residency: Residency) -> dict[str, str]:
    return {one.version.id: one.state for one in residency.state()}


def test_a_version_is_loaded_when_it_is_asked_for_and_once(registry: Registry, refs):
    engine = FakeEngine(slots=2, load_s=0.02)

    async def main():
        async with resident(registry, engine) as residency:
            said = await asyncio.gather(*(say(residency, engine, ref) for ref in [*refs[:2]] * 10))
            assert said == ["word0 ", "word1 "] * 10
            assert sorted(engine.loads) == sorted(ref.key for ref in refs[:2])
            [one, two] = residency.state()
            assert (one.version, one.state, one.room, one.in_use, one.pinned) == (refs[0], "loaded", "bank", 0, False)
            assert one.load_s >= 0.02
            assert two.last_used > 0

    asyncio.run(main())


def test_different_versions_load_at_once_while_others_answer(registry: Registry, refs):
    engine = FakeEngine(slots=5)

    async def main():
        async with resident(registry, engine) as residency:
            await say(residency, engine, refs[0])
            engine.load_s = 0.3
            loads = asyncio.gather(*(say(residency, engine, ref) for ref in refs[1:]))
            await until(lambda: sum(one.room == "bank" and one.state == "loading" for one in residency.state()) == 4)
            assert await say(residency, engine, refs[0]) == "word0 "
            assert engine.loads == [refs[0].key]
            await loads

    asyncio.run(main())


def test_the_least_recently_used_idle_version_is_evicted_first(registry: Registry, refs):
    engine = FakeEngine(slots=3)

    async def main():
        async with resident(registry, engine) as residency:
            for index in (0, 1, 2, 0, 3, 4):
                await say(residency, engine, refs[index])
            assert engine.unloads == [refs[1].key, refs[2].key]
            assert sorted(states(residency)) == ["bot-0@v1", "bot-3@v1", "bot-4@v1"]

    asyncio.run(main())


def test_a_version_in_use_is_never_evicted(registry: Registry, refs):
    engine = FakeEngine(slots=2, pause_s=0.002)

    async def client(residency: Residency, number: int):
        for turn in range(6):
            ref = refs[(number + turn) % 5]
            # The engine asserts at each token that the version is still there.
            assert (await say(residency, engine, ref, 3)).startswith(f"word{ref.name[-1]} ")

    async def main():
        async with resident(registry, engine, wait_s=30.0) as residency:
            await asyncio.gather(*(client(residency, number) for number in range(12)))
            assert all(one.in_use == 0 for one in residency.state())

    asyncio.run(main())
    assert len(engine.loads) > 5


def test_rooms_do_not_share_their_places(registry: Registry, refs, tmp_path: Path):
    engine = FakeEngine(slots=1, own=1)
    own = [publish(registry, "own", says, folder=tmp_path, peft_type="LOHA") for says in ("a", "b")]

    async def main():
        async with resident(registry, engine) as residency:
            await say(residency, engine, refs[0])
            assert [await say(residency, engine, ref) for ref in own] == ["a ", "b "]
            assert engine.unloads == [own[0].key]
            assert {one.version.id: one.room for one in residency.state()} == {"bot-0@v1": "bank", "own@v2": "own"}
        async with resident(registry, FakeEngine(slots=1, own=0)) as residency:
            with pytest.raises(AdapterError, match=r"adapters\.own"):
                await residency.load(own[0])

    asyncio.run(main())


def test_a_pinned_version_stays_until_it_is_unpinned(registry: Registry, refs):
    engine = FakeEngine(slots=2)

    async def main():
        async with resident(registry, engine) as residency:
            await residency.load(refs[0], pin=True)
            for ref in refs[1:]:
                await say(residency, engine, ref)
            assert refs[0].key not in engine.unloads
            assert next(one for one in residency.state() if one.version == refs[0]).pinned
            residency.unpin(refs[0])
            await say(residency, engine, refs[1])
            assert refs[0].key in engine.unloads

    asyncio.run(main())


def test_where_all_are_pinned_a_request_is_turned_away_at_once(registry: Registry, refs):
    engine = FakeEngine(slots=2)

    async def main():
        async with resident(registry, engine) as residency:
            for ref in refs[:2]:
                await residency.load(ref, pin=True)
            with pytest.raises(Overloaded, match="pinned") as caught:
                await say(residency, engine, refs[2])
            assert caught.value.retry_after_s > 0
            assert await say(residency, engine, refs[0]) == "word0 "
            assert states(residency) == {"bot-0@v1": "loaded", "bot-1@v1": "loaded"}

    asyncio.run(main())


def test_where_all_are_busy_a_request_waits_and_is_turned_away_in_the_end(registry: Registry, refs):
    engine = FakeEngine(slots=1)

    async def main():
        async with resident(registry, engine, wait_s=0.15) as residency, residency.use(refs[0]):
            began = time.monotonic()
            with pytest.raises(Overloaded, match=r"adapters\.slots"):
                await say(residency, engine, refs[1])
            assert time.monotonic() - began >= 0.15
        async with resident(registry, FakeEngine(slots=1)) as residency:
            async with residency.use(refs[0]):
                waits = asyncio.create_task(residency.load(refs[1]))
                await asyncio.sleep(0.05)
                assert not waits.done()
            await waits
            assert states(residency) == {"bot-1@v1": "loaded"}

    asyncio.run(main())


def test_who_waits_longest_is_served_first(registry: Registry, refs):
    engine = FakeEngine(slots=1)

    async def main():
        async with resident(registry, engine) as residency:
            async with residency.use(refs[0]):
                waiting = []
                for ref in refs[1:]:
                    waiting.append(asyncio.create_task(say(residency, engine, ref)))
                    await until(lambda ref=ref: residency._lines["bank"] and residency._lines["bank"][-1].ref == ref)
            await asyncio.gather(*waiting)
            assert engine.loads == [ref.key for ref in refs]

    asyncio.run(main())


def test_a_version_that_is_busy_all_the_time_makes_room_for_one_that_waits(registry: Registry, refs):
    engine = FakeEngine(slots=1, pause_s=0.005)

    async def main():
        async with resident(registry, engine, tenure_s=0.05) as residency:
            stop = False

            async def keep_busy():
                while not stop:
                    await say(residency, engine, refs[0], 4)

            busy = [asyncio.create_task(keep_busy()) for _ in range(4)]
            await until(lambda: len(residency.state()) == 1 and residency.state()[0].in_use > 1)
            assert await asyncio.wait_for(say(residency, engine, refs[1]), 3) == "word1 "
            stop = True
            await asyncio.gather(*busy)

    asyncio.run(main())


def test_a_request_that_gives_up_in_the_line_costs_nobody_a_place(registry: Registry, refs):
    engine = FakeEngine(slots=1)

    async def main():
        async with resident(registry, engine) as residency:
            async with residency.use(refs[0]):
                waits = asyncio.create_task(say(residency, engine, refs[1]))
                await until(lambda: bool(residency._lines["bank"]))
                waits.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await waits
                again = asyncio.create_task(say(residency, engine, refs[1]))
                await until(lambda: bool(residency._lines["bank"]))
            assert await again == "word1 "
            assert engine.loads == [refs[0].key, refs[1].key]

    asyncio.run(main())


def test_who_gives_up_during_a_load_does_not_end_it_for_the_others(registry: Registry, refs):
    engine = FakeEngine(slots=1, load_s=0.1)

    async def main():
        async with resident(registry, engine) as residency:
            first = asyncio.create_task(say(residency, engine, refs[0]))
            second = asyncio.create_task(say(residency, engine, refs[0]))
            await asyncio.sleep(0.05)
            first.cancel()
            assert await second == "word0 "
            assert engine.loads == [refs[0].key]
            assert residency.state()[0].in_use == 0

    asyncio.run(main())


def test_a_version_whose_files_changed_is_refused_and_evicts_nothing(registry: Registry, refs):
    engine = FakeEngine(slots=1)
    broken = Path(registry.storage.root, "adapters/bot-1/v1/adapter_model.safetensors")
    broken.write_bytes(broken.read_bytes()[:-1] + b"\1")

    async def main():
        async with resident(registry, engine, retry_s=0.2) as residency:
            await say(residency, engine, refs[0])
            with pytest.raises(AdapterError, match=r"adapter_model\.safetensors was changed"):
                await say(residency, engine, refs[1])
            assert engine.unloads == []
            assert await say(residency, engine, refs[0]) == "word0 "
            failed = residency.state()[1]
            assert (failed.version, failed.state) == (refs[1], "failed")
            assert "was changed" in failed.reason

    asyncio.run(main())


def test_a_failed_version_is_not_tried_again_at_once_unless_it_is_told_to(registry: Registry, refs):
    engine = PickyEngine(slots=2, load_s=0.01)
    engine.refused = ("bot-1",)

    async def main():
        async with resident(registry, engine, retry_s=0.3) as residency:
            results = await asyncio.gather(
                *(say(residency, engine, refs[1]) for _ in range(5)),
                *(say(residency, engine, refs[0]) for _ in range(5)),
                return_exceptions=True,
            )
            assert [type(result) for result in results[:5]] == [AdapterError] * 5
            assert results[5:] == ["word0 "] * 5
            assert "rank 128" in residency.state()[1].reason
            engine.refused = ()
            with pytest.raises(AdapterError, match="rank 128"):
                await say(residency, engine, refs[1])
            await residency.load(refs[1])
            assert states(residency) == {"bot-0@v1": "loaded", "bot-1@v1": "loaded"}
            await residency.unload(refs[1])
            engine.refused = ("bot-1",)
            with pytest.raises(AdapterError):
                await say(residency, engine, refs[1])
            engine.refused = ()
            await asyncio.sleep(0.35)
            assert await say(residency, engine, refs[1]) == "word1 "

    asyncio.run(main())


def test_an_engine_that_breaks_over_a_version_refuses_that_version_alone(registry: Registry, refs):
    class Breaking(FakeEngine):
        async def load(self, key: str, folder: Path):
            if "bot-1" in key:
                raise RuntimeError("a shape is wrong")
            return await super().load(key, folder)

        async def unload(self, key: str) -> None:
            await super().unload(key)
            raise RuntimeError("cannot forget")

    engine = Breaking(slots=1)

    async def main():
        async with resident(registry, engine) as residency:
            await say(residency, engine, refs[0])
            with pytest.raises(AdapterError, match=r"bot-1@v1 could not be loaded: RuntimeError: a shape is wrong"):
                await say(residency, engine, refs[1])
            assert await say(residency, engine, refs[0]) == "word0 "
            assert await say(residency, engine, refs[2]) == "word2 "

    asyncio.run(main())


def test_failures_that_are_kept_are_bounded(registry: Registry, refs, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ftray.serve.residency._FAILURES", 3)
    engine = PickyEngine(slots=2)
    engine.refused = ("bot",)

    async def main():
        async with resident(registry, engine) as residency:
            for ref in refs:
                with pytest.raises(AdapterError):
                    await residency.load(ref)
            assert list(states(residency)) == ["bot-2@v1", "bot-3@v1", "bot-4@v1"]

    asyncio.run(main())


def test_another_content_under_the_same_number_is_refused(registry: Registry, refs):
    engine = FakeEngine(slots=2)

    async def main():
        async with resident(registry, engine) as residency:
            other = VersionRef("bot-0", 1, "ab" * 32)
            with pytest.raises(AdapterError, match="digest abababababababab"):
                await residency.load(other)
            with pytest.raises(AdapterError, match="there is no bot-0@v9"):
                await residency.load(VersionRef("bot-0", 9, refs[0].digest))
            assert await say(residency, engine, refs[0]) == "word0 "

    asyncio.run(main())


def test_unloading_waits_for_requests_and_later_ones_load_it_again(registry: Registry, refs):
    engine = FakeEngine(slots=2, pause_s=0.01)

    async def main():
        async with resident(registry, engine) as residency:
            await residency.load(refs[0], pin=True)
            running = asyncio.create_task(say(residency, engine, refs[0], 10))
            await until(lambda: residency.state()[0].in_use == 1)
            unloading = asyncio.create_task(residency.unload(refs[0]))
            await asyncio.sleep(0.01)
            later = asyncio.create_task(say(residency, engine, refs[0]))
            await unloading
            assert running.done()
            assert await later == "word0 "
            assert engine.loads == [refs[0].key] * 2
            assert not residency.state()[0].pinned
            await residency.unload(refs[1])  # was never here
            await residency.unload(refs[0])
            assert residency.state() == ()

    asyncio.run(main())


def test_unloading_what_is_being_loaded_lets_those_who_wait_have_their_answer(registry: Registry, refs):
    engine = FakeEngine(slots=2, load_s=0.05)

    async def main():
        async with resident(registry, engine) as residency:
            asked = asyncio.create_task(say(residency, engine, refs[0]))
            await until(lambda: bool(residency.state()))
            await residency.unload(refs[0])
            assert await asked == "word0 "
            assert engine.unloads == [refs[0].key]

    asyncio.run(main())


def test_a_loaded_version_cannot_be_deleted_until_it_is_unloaded(registry: Registry, refs):
    engine = FakeEngine(slots=1)

    async def main():
        async with resident(registry, engine, ttl_s=0.6) as residency:
            await residency.load(refs[0])
            await asyncio.sleep(0.9)  # renewed in time
            assert registry.holders("bot-0", 1) == [HOLDER]
            with pytest.raises(RegistryError, match="held by replica-1"):
                registry.delete("bot-0@v1")
            await residency.unload(refs[0])
            registry.delete("bot-0@v1")

            await residency.load(refs[1])
            await say(residency, engine, refs[2])  # evicts it
            await until(lambda: registry.holders("bot-1", 1) == [])
            registry.delete("bot-1@v1")
            with pytest.raises(AdapterError, match="deleted"):
                await residency.load(refs[1])
            assert registry.holders("bot-2", 1) == [HOLDER]
        assert registry.holders("bot-2", 1) == []

    asyncio.run(main())


def test_what_is_loaded_answers_while_the_registry_is_away(
    registry: Registry, refs, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    engine = FakeEngine(slots=2)
    store, away = Path(registry.storage.root), tmp_path / "away"

    async def main():
        async with resident(registry, engine, ttl_s=0.2, retry_s=0.1) as residency:
            await say(residency, engine, refs[0])
            store.rename(away)
            await asyncio.sleep(0.3)  # renewals fail
            assert await say(residency, engine, refs[0]) == "word0 "
            with pytest.raises(RequestError) as caught:
                await say(residency, engine, refs[1])
            assert (caught.value.status, caught.value.code) == (503, "registry_unreachable")
            assert states(residency) == {"bot-0@v1": "loaded", "bot-1@v1": "failed"}
            assert not store.exists()  # nobody made a folder where the storage is to be mounted
            await residency.unload(refs[0])
            away.rename(store)
            await asyncio.sleep(0.12)
            assert await say(residency, engine, refs[1]) == "word1 "
            await until(lambda: registry.holders("bot-1", 1) == [HOLDER])

    with caplog.at_level(logging.WARNING, logger="ftray.serve.holds"):
        asyncio.run(main())
    assert len([record for record in caplog.records if "cannot tell the registry" in record.message]) == 1


def test_a_registry_that_hangs_stops_neither_the_loop_nor_a_load(
    registry: Registry, refs, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("ftray.serve.holds._PATIENCE_S", 0.1)

    class Hanging(Registry):
        def hold(self, *arguments, **options):
            time.sleep(1.5)
            return super().hold(*arguments, **options)

    engine = FakeEngine(slots=2)

    async def main():
        async with resident(Hanging(registry.storage), engine) as residency:
            loading = asyncio.create_task(say(residency, engine, refs[0]))
            longest, before = 0.0, time.monotonic()
            while not loading.done():
                await asyncio.sleep(0.005)
                longest, before = max(longest, time.monotonic() - before), time.monotonic()
            assert await loading == "word0 "
            assert longest < 1.0

    asyncio.run(main())


def test_a_folder_that_was_checked_is_not_read_again(registry: Registry, refs, monkeypatch: pytest.MonkeyPatch):
    hashed: list[str] = []

    def counting(path: Path) -> str:
        hashed.append(path.name)
        return localfiles.file_sha256(path)

    monkeypatch.setattr("ftray.serve.folders.file_sha256", counting)
    monkeypatch.setattr("ftray.store.registry.file_sha256", counting)
    engine = FakeEngine(slots=1)

    async def main():
        async with resident(registry, engine) as residency:
            for index in (0, 1, 0, 1):
                await say(residency, engine, refs[index])
            assert sorted(hashed) == ["adapter_config.json"] * 2 + ["adapter_model.safetensors"] * 2
            weights = Path(registry.storage.root, "adapters/bot-0/v1/adapter_model.safetensors")
            weights.write_bytes(weights.read_bytes()[:-1] + b"\2")
            with pytest.raises(AdapterError):
                await residency.load(refs[0])

    asyncio.run(main())


@pytest.fixture
def remote(tmp_path: Path):
    registry = Registry(Storage(f"memory://residency-{time.time_ns()}"))
    yield registry
    registry.storage.remove("adapters")


def test_versions_in_an_object_store_are_copied_once(remote: Registry, tmp_path: Path):
    refs = [publish(remote, "bot", says, folder=tmp_path) for says in ("one", "two")]
    engine, cache = FakeEngine(slots=1), tmp_path / "cache"

    async def main():
        async with resident(remote, engine, cache=cache) as residency:
            for index in (0, 1, 0):
                assert await say(residency, engine, refs[index]) == f"{('one', 'two')[index]} "
            assert sorted(path.name for path in cache.iterdir()) == sorted(ref.digest for ref in refs)
        # Another process finds the copy, and needs no registry for it: the digest says that it is right.
        remote.storage.remove("adapters/bot/v1/adapter_model.safetensors")
        async with resident(remote, engine, cache=cache) as residency:
            await engine.unload(refs[0].key)
            assert await say(residency, engine, refs[0]) == "one "

    asyncio.run(main())


def test_a_damaged_copy_is_fetched_again(remote: Registry, tmp_path: Path):
    ref = publish(remote, "bot", "one", folder=tmp_path)
    cache = tmp_path / "cache"
    copy = cache / ref.digest
    copy.mkdir(parents=True)
    (copy / "adapter_config.json").write_text(json.dumps({"says": "nonsense"}))

    async def main():
        engine = FakeEngine(slots=1)
        async with resident(remote, engine, cache=cache) as residency:
            assert await say(residency, engine, ref) == "one "

    asyncio.run(main())


def test_copies_beyond_the_limit_go_but_never_those_in_use(remote: Registry, tmp_path: Path):
    refs = [publish(remote, "bot", f"word{number}", folder=tmp_path) for number in range(4)]
    one = sum(path.stat().st_size for path in (tmp_path / "bot-word0").iterdir())
    mine, other = (Folders(remote, cache=tmp_path / "cache", cache_gb=2.5 * one / 1e9) for _ in range(2))
    folders = {ref: mine.ready(ref) for ref in refs[:2]}
    mine.release(refs[1])
    other.ready(refs[2])
    assert [folder.exists() for folder in folders.values()] == [True, False]  # the other's look at the same cache
    other.release(refs[2])
    other.ready(refs[3])
    assert folders[refs[0]].exists()
    assert not (tmp_path / "cache" / refs[2].digest).exists()
