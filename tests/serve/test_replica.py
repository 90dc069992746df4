"""One engine with its versions: who is let in, answers in time, and a replica that comes back with what it had."""

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

from ftray.config.serving import Adapters, Limits
from ftray.errors import AdapterError, DeadlineExceeded, Overloaded, RegistryError, ReplicaGone, RequestError
from ftray.serve.engine import EngineStats, Generation, Labelled, Sampling, VersionRef
from ftray.serve.replica import Replica
from ftray.store.paths import Storage
from ftray.store.registry import Registry


class Encoder(FakeEngine):
    """Reads: a text's embedding is its length, and its label the version's word."""

    def __init__(self, **options):
        super().__init__(**options)
        self.facts = self.facts.__class__(**{**vars(self.facts), "tasks": ("embed", "classify")})

    async def embed(self, ids, version):
        await asyncio.sleep(self.pause_s)
        return [[float(len(text))] for text in ids]

    async def classify(self, ids, version):
        await asyncio.sleep(self.pause_s)
        return [Labelled({self.loaded[version][1]: 1.0}) for _ in ids]


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(Storage(str(tmp_path / "store")))


@pytest.fixture
def refs(registry: Registry, tmp_path: Path) -> list[VersionRef]:
    """bot-0@v1 … bot-4@v1."""
    return [publish(registry, f"bot-{number}", f"word{number}", folder=tmp_path) for number in range(5)]


@contextlib.asynccontextmanager
async def running(registry: Registry, engine: FakeEngine, *, limits: Limits | None = None, **options):
    adapters = options.pop("adapters", Adapters())
    options = {"id": "r1", "tend_s": 0.05, **options}
    replica = Replica(engine, registry, limits=limits or Limits(), adapters=adapters, **options)
    await replica.start()
    try:
        yield replica
    finally:
        await replica.close()


def request(tokens: int = 1, *, prompt: int = 0, **options) -> Generation:
    return Generation("r", (7,) * prompt, Sampling(tokens), **options)


async def answer(replica: Replica, version: VersionRef | None, asked: Generation | None = None) -> str:
    return "".join([piece.text async for piece in replica.generate(asked or request(), version)])


async def residents(replica: Replica) -> dict[str, str]:
    [state] = await replica.states()
    return {
        one.version.id: ("pinned " if one.pinned else "") + one.state + (f": {one.reason}" if one.reason else "")
        for one in state.residents
    }


async def until(is_so, timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not await is_so():
        assert time.monotonic() < deadline, "it did not come to be"
        await asyncio.sleep(0.01)


def test_the_base_and_versions_answer(registry: Registry, refs):
    engine = FakeEngine(slots=2)

    async def main():
        async with running(registry, engine) as replica:
            assert await answer(replica, None) == "base "
            assert await answer(replica, refs[0]) == "word0 "
            assert await answer(replica, refs[1], request(3, prompt=1)) == "word1 7 word1 "
            assert (await replica.facts()).kind == "fake"
            [state] = await replica.states()
            assert (state.id, state.stats.generated_tokens) == ("r1", 5)
            assert [(one.version, one.in_use) for one in state.residents] == [(refs[0], 0), (refs[1], 0)]

    asyncio.run(main())


def test_a_client_that_goes_away_ends_its_generation_and_frees_its_version(registry: Registry, refs):
    engine = FakeEngine(slots=1, pause_s=0.01)

    async def main():
        async with running(registry, engine) as replica:
            async with contextlib.aclosing(replica.generate(request(1000), refs[0])) as pieces:
                await anext(pieces)
                assert engine.running == 1
            assert (engine.running, engine.cancelled) == (0, 1)
            task = asyncio.create_task(answer(replica, refs[0], request(1000)))
            await until(lambda: _is(engine.running == 1))
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            assert engine.cancelled == 2
            assert await answer(replica, refs[1]) == "word1 "

    asyncio.run(main())


async def _is(value: bool) -> bool:
    return value


def test_a_request_past_its_deadline_ends_before_or_in_the_middle(registry: Registry, refs):
    engine = FakeEngine(slots=1, pause_s=0.02)

    async def main():
        async with running(registry, engine, limits=Limits(timeout_s=0.15)) as replica:
            with pytest.raises(DeadlineExceeded):
                await answer(replica, None, request(deadline=time.time() - 1))
            before = engine.generated
            with pytest.raises(DeadlineExceeded):
                await answer(replica, refs[0], request(1000, deadline=time.time() + 0.1))
            assert engine.generated > before
            with pytest.raises(DeadlineExceeded):  # limits.timeout_s, where the request says nothing
                await answer(replica, refs[0], request(1000))
            assert engine.running == 0
            engine.load_s = 1.0
            began = time.monotonic()
            with pytest.raises(DeadlineExceeded):  # while its version loads
                await answer(replica, refs[1], request(deadline=time.time() + 0.05))
            assert time.monotonic() - began < 0.9
            [state] = await replica.states()
            assert not any(one.in_use for one in state.residents)

    asyncio.run(main())


def test_too_long_a_prompt_and_too_long_a_queue_are_refused(registry: Registry, refs):
    class Queueing(FakeEngine):
        waiting = 0

        def stats(self) -> EngineStats:
            return EngineStats(waiting=self.waiting)

    engine = Queueing(slots=1, max_length=10)

    async def main():
        async with running(registry, engine, limits=Limits(max_queue=2)) as replica:
            assert await answer(replica, None, request(prompt=9)) == "base "
            with pytest.raises(RequestError) as caught:
                await answer(replica, None, request(prompt=10))
            assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
            engine.waiting = 2
            with pytest.raises(Overloaded, match="max_queue"):
                await answer(replica, None)
            engine.waiting, engine.load_s = 0, 0.2
            loading = [asyncio.create_task(answer(replica, refs[0])) for _ in range(2)]
            await asyncio.sleep(0.05)
            with pytest.raises(Overloaded):  # those who wait for a version wait too
                await answer(replica, None)
            assert await asyncio.gather(*loading) == ["word0 "] * 2

    asyncio.run(main())


def test_an_engine_error_reaches_the_caller_as_it_is(registry: Registry, refs):
    class Broken(FakeEngine):
        async def generate(self, request):
            yield (await anext(super().generate(request)))
            raise ZeroDivisionError("in the engine")

    async def main():
        async with running(registry, Broken(slots=1)) as replica:
            with pytest.raises(ZeroDivisionError):
                await answer(replica, refs[0], request(5))
            [state] = await replica.states()
            assert state.residents[0].in_use == 0

    asyncio.run(main())


def test_a_reader_reads_and_does_not_write(registry: Registry, refs):
    async def main():
        engine = Encoder(slots=1)
        async with running(registry, engine, limits=Limits(timeout_s=0.2)) as replica:
            assert await replica.embed([(1, 2), (3,)], None) == [[2.0], [1.0]]
            assert await replica.classify([(1,)], refs[2]) == [Labelled({"word2": 1.0})]
            with pytest.raises(RequestError, match="does not generate; it does embed, classify"):
                await answer(replica, None)
            engine.pause_s = 5.0
            with pytest.raises(DeadlineExceeded):
                await replica.embed([(1,)], None)
        async with running(registry, FakeEngine()) as replica:
            with pytest.raises(RequestError, match="does not embed"):
                await replica.embed([(1,)], None)

    asyncio.run(main())


def test_versions_are_loaded_pinned_and_unloaded_by_hand(registry: Registry, refs):
    engine = FakeEngine(slots=1)

    async def main():
        async with running(registry, engine) as replica:
            [state] = await replica.load(refs[0], pin=True)
            assert state.residents[0].pinned
            with pytest.raises(Overloaded):
                await answer(replica, refs[1])
            [state] = await replica.unpin(refs[0])
            assert not state.residents[0].pinned
            assert (await replica.unload(refs[0]))[0].residents == ()
            with pytest.raises(AdapterError):
                await replica.load(VersionRef("bot-0", 9, "ab" * 32))

    asyncio.run(main())


def test_a_stopped_replica_sends_requests_elsewhere_and_holds_nothing(registry: Registry, refs):
    async def main():
        async with running(registry, FakeEngine()) as replica:
            await answer(replica, refs[0])
            with pytest.raises(RegistryError):
                registry.delete("bot-0@v1")
        with pytest.raises(ReplicaGone):
            await answer(replica, refs[0])
        registry.delete("bot-0@v1")

    asyncio.run(main())


def test_what_the_serve_file_names_is_there_before_the_first_request(
    registry: Registry, refs, caplog: pytest.LogCaptureFixture
):
    engine = FakeEngine(slots=3)
    adapters = Adapters(preload=["bot-0", "bot-1@v1", "gone"], pin=["bot-2"])

    async def main():
        async with running(registry, engine, adapters=adapters) as replica:
            assert await residents(replica) == {
                "bot-0@v1": "loaded",
                "bot-1@v1": "loaded",
                "bot-2@v1": "pinned loaded",
            }
            await asyncio.sleep(0.3)

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())
    assert len([record for record in caplog.records if "gone is to be loaded" in record.message]) == 1


def test_a_preload_that_fails_is_visible_and_stops_nothing(registry: Registry, refs):
    broken = Path(registry.storage.root, "adapters/bot-1/v1/adapter_config.json")
    broken.write_text("{}")

    async def main():
        adapters = Adapters(preload=["bot-1", "bot-0"], pin=["bot-1"])
        async with running(registry, FakeEngine(slots=3), adapters=adapters) as replica:
            found = await residents(replica)
            assert found["bot-0@v1"] == "loaded"
            assert "was changed" in found["bot-1@v1"]

    asyncio.run(main())


@pytest.mark.parametrize("slots", [1, 2])
def test_a_pin_follows_its_alias(registry: Registry, tmp_path: Path, slots: int):
    for says in ("one", "two"):
        publish(registry, "bot", says, folder=tmp_path)
    registry.promote("bot@v1")

    async def main():
        async with running(registry, FakeEngine(slots=slots), adapters=Adapters(pin=["bot"])) as replica:
            assert await residents(replica) == {"bot@v1": "pinned loaded"}
            registry.promote("bot@v2")
            expected = {"bot@v2": "pinned loaded", **({"bot@v1": "loaded"} if slots > 1 else {})}

            async def has_moved() -> bool:
                return await residents(replica) == expected

            await until(has_moved)

    asyncio.run(main())


def test_a_replica_that_comes_back_loads_what_it_had(registry: Registry, refs):
    storage = registry.storage

    async def main():
        engine = FakeEngine(slots=3)
        first = Replica(engine, registry, id="r1", limits=Limits(), adapters=Adapters(), app="shop", tend_s=0.05)
        await first.start()
        for index in (0, 1, 2, 1, 3):
            await answer(first, refs[index])
        await first.load(refs[2], pin=True)

        async def is_noted() -> bool:
            if not storage.exists("serving/shop/recent.json"):
                return False
            versions = storage.read_json("serving/shop/recent.json")["versions"]
            return [(one["name"], one["pinned"]) for one in versions[:2]] == [("bot-2", True), ("bot-3", False)]

        await until(is_noted)
        # Killed: nothing is closed.
        async with running(registry, FakeEngine(slots=2), app="shop", id="r2") as replica:
            assert await residents(replica) == {"bot-2@v1": "pinned loaded", "bot-3@v1": "loaded"}
            assert await answer(replica, refs[3]) == "word3 "
            await replica.unpin(refs[2])
            await replica.unload(refs[3])
        await first.close()
        async with running(registry, FakeEngine(slots=2), app="shop", id="r3") as replica:
            assert "pinned" not in str(await residents(replica))
        async with running(registry, FakeEngine(slots=2), app="other", id="r4") as replica:
            assert await residents(replica) == {}

    asyncio.run(main())


def test_replicas_share_their_note_and_names_that_are_not_served_stay_away(registry: Registry, refs):
    async def main():
        one = Replica(FakeEngine(), registry, id="a", limits=Limits(), adapters=Adapters(), app="shop", tend_s=60)
        two = Replica(FakeEngine(), registry, id="b", limits=Limits(), adapters=Adapters(), app="shop", tend_s=60)
        for replica, ref in ((one, refs[0]), (two, refs[1])):
            await replica.start()
            await answer(replica, ref)
        await one.close()
        await two.close()
        async with running(registry, FakeEngine(slots=4), app="shop") as replica:
            assert list(await residents(replica)) == ["bot-0@v1", "bot-1@v1"]
        async with running(registry, FakeEngine(), app="shop", adapters=Adapters(serve=["bot-1"])) as replica:
            assert list(await residents(replica)) == ["bot-1@v1"]

    asyncio.run(main())


@pytest.mark.parametrize(
    "note",
    ["", "[]", '{"versions": [{"name": "../x", "number": 1, "digest": "../../x", "used": 1, "pinned": true}]}', "{"],
)
def test_a_note_that_is_nonsense_is_passed_over_and_written_anew(registry: Registry, refs, note: str):
    registry.storage.write_bytes("serving/shop/recent.json", note.encode())

    async def main():
        async with running(registry, FakeEngine(), app="shop") as replica:
            assert await answer(replica, refs[0]) == "word0 "

    asyncio.run(main())
    found = json.loads(registry.storage.read_bytes("serving/shop/recent.json"))
    assert [one["name"] for one in found["versions"]] == ["bot-0"]


def test_without_its_registry_a_replica_starts_serves_and_makes_no_folder(registry: Registry, refs, tmp_path: Path):
    store, away = Path(registry.storage.root), tmp_path / "away"
    store.rename(away)

    async def main():
        adapters = Adapters(preload=["bot-0"])
        async with running(registry, FakeEngine(), adapters=adapters, app="shop") as replica:
            assert await answer(replica, None) == "base "
            with pytest.raises(RequestError) as caught:
                await answer(replica, refs[1])
            assert caught.value.status == 503
            await asyncio.sleep(0.2)
            assert not store.exists()
            away.rename(store)

            async def is_loaded() -> bool:
                return (await residents(replica)).get("bot-0@v1") == "loaded"

            await until(is_loaded)

    asyncio.run(main())


def test_promotions_under_load_lose_no_request(registry: Registry, tmp_path: Path):
    versions = [publish(registry, "bot", f"word{number}", folder=tmp_path) for number in range(6)]
    engine = FakeEngine(slots=2, pause_s=0.001, load_s=0.002)

    async def main():
        async with running(registry, engine) as replica:
            current, stop = versions[0], False

            async def client() -> int:
                answered = 0
                while not stop:
                    began_with = current
                    assert (await answer(replica, began_with, request(5))).startswith(f"word{began_with.number - 1} ")
                    answered += 1
                return answered

            clients = [asyncio.create_task(client()) for _ in range(20)]
            for turn in range(50):
                current = versions[turn % 6]
                await asyncio.sleep(0.01)
            stop = True
            assert sum(await asyncio.gather(*clients)) > 50

    asyncio.run(main())
