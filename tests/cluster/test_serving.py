"""The server on a Ray cluster, under load: swapped, killed, cut off, scaled and drained, and nothing is lost."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import threading
import time
from pathlib import Path

import openai
import pytest

from ftray.config.serving import ServeScale, Serving
from ftray.errors import ClusterError, ServeError
from ftray.serve.engine import Generation, Sampling, VersionRef
from ftray.serve.remote import RemoteFleet
from ftray.store.paths import Storage
from ftray.store.registry import Registry
from tests.cluster.conftest import free_port
from tests.cluster.serving_clients import PATIENCE_S, Client, Load, Mover, Told, stream_by_openai, until
from tests.cluster.serving_cluster import (
    START_S,
    apply,
    deployments,
    engines,
    generated,
    idle,
    is_dead,
    residents,
    wait_until_ready,
)
from tests.serve.engine_world import EVERYDAY, MAX_RANK, make_world

pytestmark = pytest.mark.ray

SLOTS = 4
CLIENTS = 20
MOVES = 50
TOKENS = 24
LONGEST = 4096
MAX_BATCH, MAX_QUEUE = 8, 16
PROMPTS = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Versions whose greedy answers differ, on a base that goes on for thousands of tokens."""
    return make_world(tmp_path_factory.mktemp("world"), max_position_embeddings=LONGEST)


@pytest.fixture(scope="module")
def prompts(world):
    return [world.prompt(seed) for seed in range(PROMPTS)]


@pytest.fixture(scope="module")
def texts(world, prompts):
    """What each version of `orders` answers to each prompt, by PEFT alone."""
    made = {
        f"orders@v{number}": [world.text(world.greedy(name, prompt, TOKENS)) for prompt in prompts]
        for number, name in enumerate(EVERYDAY, start=1)
    }
    for answers in zip(*made.values(), strict=True):
        assert len(set(answers)) == len(EVERYDAY), "two versions answer alike: nothing would show a mix-up"
    return made


@pytest.fixture(scope="module")
def serving(world, tmp_path_factory):
    """More versions than slots; v1 of each name is prod."""
    storage = tmp_path_factory.mktemp("serving") / "store"
    registry = Registry(Storage(str(storage)))
    for adapter, count in (("orders", len(EVERYDAY)), ("refunds", 4)):
        for name in EVERYDAY[:count]:
            registry.publish(adapter, world.folders[name], {"base": str(world.base)}, key=name)
        registry.promote(f"{adapter}@v1")
    return Serving.model_validate(
        {
            "storage": str(storage),
            "model": {"base": str(world.base), "dtype": "fp32"},
            "adapters": {"slots": SLOTS, "max_rank": MAX_RANK, "watch_s": 0.5},
            "engine": {"kind": "bank", "max_length": LONGEST, "max_batch": MAX_BATCH, "threads": 1},
            "http": {"port": free_port()},
            "limits": {"max_queue": MAX_QUEUE, "max_new_tokens": LONGEST},
            "scale": {"replicas": 2, "cpus_per_replica": 0.5},
        }
    )


@pytest.fixture(scope="module")
def url(cluster, serving):
    """The server as KubeRay brings it up: its config given to the dashboard. Ray Serve is gone afterwards."""
    from ray import serve as ray_serve

    apply(cluster, serving)
    url = f"http://127.0.0.1:{serving.http.port}"
    wait_until_ready(url, replicas=2)
    yield url
    ray_serve.shutdown()


def failures(told):
    return [(one.status, one.error, one.finish, one.version) for one in told if not one.whole]


def test_a_config_as_kuberay_applies_it_brings_the_server_up(cluster, url, prompts):
    assert {name: len(replicas) for name, replicas in deployments(cluster).items()} == {"engine": 2, "ingress": 1}
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    assert "orders@prod" in [model.id for model in client.models.list()]
    answer = client.completions.create(model="base", prompt=list(prompts[0]), max_tokens=3)
    assert answer.usage.completion_tokens == 3


def test_requests_go_to_a_replica_that_has_their_version(url, prompts):
    """Each version is loaded once, however often it is asked for; one that many ask for at once, by the others too."""
    versions = [f"refunds@v{number}" for number in range(1, 5)]

    async def ask():
        async with Client(url) as client:

            async def often(version):
                return [await client.stream(version, prompts[0], tokens=2) for _ in range(25)]

            told = [one for many in await asyncio.gather(*map(often, versions)) for one in many]
            assert not failures(told)
            alone = residents(await client.replicas(), "refunds")
            many = await asyncio.gather(*(client.stream(versions[0], prompts[0], tokens=100) for _ in range(30)))
            assert not failures(many)
            return alone, residents(await client.replicas(), "refunds")

    alone, together = asyncio.run(ask())
    held = sorted(version for versions in alone.values() for version in versions)
    assert held == versions
    assert all(versions[0] in versions_there for versions_there in together.values())


def test_a_burst_is_spread_before_a_replica_has_said_how_busy_it_is(url, serving, prompts):
    """All for one version, more than the replica that has it takes, through a router that has just begun."""
    from ray import serve as ray_serve

    version = VersionRef.of(Registry(Storage(serving.storage)).resolve("refunds@v1"))

    async def ask(fleet, number):
        sampling = Sampling(max_new_tokens=100, ignore_eos=True)
        request = Generation(id=f"burst-{number}", prompt_ids=prompts[0], sampling=sampling)
        return [piece async for piece in fleet.generate(request, version)][-1].finish

    async def burst():
        fleet = RemoteFleet(ray_serve.get_deployment_handle("engine", "ftray"))
        return await asyncio.gather(*(ask(fleet, number) for number in range(MAX_BATCH + MAX_QUEUE + 6)))

    assert set(asyncio.run(burst())) == {"length"}


def test_the_prompts_of_one_request_are_spread_too(url, prompts):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    many = [list(prompts[0])] * (MAX_BATCH + MAX_QUEUE + 6)
    answer = client.completions.create(
        model="refunds@v2", prompt=many, max_tokens=100, extra_body={"ignore_eos": True}, timeout=PATIENCE_S
    )
    assert [choice.finish_reason for choice in answer.choices] == ["length"] * len(many)


def test_no_request_fails_and_none_is_answered_by_a_wrong_version_while_versions_are_swapped(
    url, serving, prompts, texts
):
    async def swap():
        async with (
            Client(url) as client,
            openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as by_openai,
        ):
            mover = Mover(client, "orders")
            await mover.promote(1)

            def ask(told, turn):
                prompt = prompts[turn % PROMPTS]
                if turn % 5 == 0:
                    return stream_by_openai(by_openai, "orders", prompt, tokens=TOKENS, told=told)
                return client.stream("orders", prompt, tokens=TOKENS, told=told)

            async with Load(ask, CLIENTS) as load:
                for number in range(MOVES):
                    seen = len(load.told)
                    await load.until(lambda seen=seen: len(load.told) >= seen + CLIENTS // 4)
                    if number % 5 == 4:
                        await mover.rollback()
                    else:
                        await mover.promote(1 + (3 * number) % len(EVERYDAY))
            return mover, load.told, await client.replicas()

    mover, told, replicas = asyncio.run(swap())
    assert not failures(told)
    for turn, one in enumerate(told):
        assert one.version in mover.current(one.began, one.headed), f"request {turn}"
    by_version = {version: [one for one in told if one.version == version] for version in texts}
    for version, mine in by_version.items():
        assert mine, f"{version} was never current"
        assert {one.text for one in mine} <= set(texts[version])
    pauses = sorted(pause for one in told for pause in one.pauses)
    begin, end = mover.moves[0].begun, mover.moves[-1].ended
    print(
        f"{len(told)} requests while an alias moved {MOVES} times in {end - begin:.1f} s; a pause between pieces of a "
        f"stream: median {1e3 * statistics.median(pauses):.0f} ms, p99 {1e3 * pauses[len(pauses) * 99 // 100]:.0f} ms, "
        f"longest {1e3 * pauses[-1]:.0f} ms"
    )
    for name in ("orders", "refunds"):
        assert all(len(held) <= SLOTS for held in residents(replicas, name).values())


def test_a_client_that_hangs_up_leaves_nothing_running(url, prompts):
    async def hang_up():
        async with Client(url) as client:
            before = generated(await client.replicas())
            many = [client.stream("orders", prompts[0], tokens=LONGEST - 20, pieces=3) for _ in range(4)]
            told = await asyncio.gather(*many)
            assert all(one.status == 200 and one.finish is None for one in told)
            await idle(client)
            return generated(await client.replicas()) - before

    assert asyncio.run(hang_up()) < LONGEST


def test_more_than_may_wait_is_refused_with_a_time_to_come_back(url, prompts):
    async def burst():
        async with Client(url) as client:
            many = (client.stream("base", prompts[0], tokens=150) for _ in range(4 * (MAX_BATCH + MAX_QUEUE)))
            told = await asyncio.gather(*many)
            await idle(client)
            return told

    told = asyncio.run(burst())
    refused = [one for one in told if one.status == 429]
    assert refused
    assert all(one.code == "overloaded" and int(one.retry_after) >= 1 for one in refused)
    assert not failures(one for one in told if one.status != 429)
    assert len(told) - len(refused) >= 2 * MAX_BATCH


def test_a_killed_replica_costs_its_requests_only_and_comes_back_with_its_versions(cluster, url, serving, prompts):
    note = Path(serving.storage, "serving", serving.name, "recent.json")
    versions = {f"refunds@v{number}" for number in (1, 2, 3)}

    async def kill():
        async with Client(url) as client:
            for version in sorted(versions):
                assert (await client.post("/v1/adapters/load", model=version))[0] == 200

            async def noted():
                known = json.loads(note.read_text())["versions"]
                return {f"{one['name']}@v{one['number']}" for one in known[: len(versions)]} == versions

            await until(noted)

            def ask(told, turn):
                if killed and turn % CLIENTS >= 4:
                    return done()
                return client.stream(sorted(versions)[turn % 3], prompts[turn % PROMPTS], tokens=60, told=told)

            async def done():
                await stopped.wait()

            killed, stopped = [], asyncio.Event()
            before = {one["replica_id"]: one["pid"] for one in await asyncio.to_thread(engines, cluster)}
            async with Load(ask, CLIENTS) as load:
                await load.until(lambda: len(load.ended) >= 3 * CLIENTS)
                victim, pid = next(iter(before.items()))
                in_flight = len(load.in_flight)
                os.kill(pid, signal.SIGKILL)
                await load.until(lambda: is_dead(pid))
                killed.append(time.monotonic())

                async def back():
                    now = {one["id"]: one for one in await client.replicas()}
                    there = residents(now.values(), "refunds")
                    return len(now) == 2 and victim not in now and all(held >= versions for held in there.values())

                await until(back, timeout_s=START_S)
                took = time.monotonic() - killed[0]
                seen = len(load.ended)
                await load.until(lambda: len(load.ended) >= seen + 20)
                stopped.set()
                load.stopping = True
            return load.told, killed[0], in_flight, took

    told, killed, in_flight, took = asyncio.run(kill())
    told = [one for one in told if one.ended]
    failed = [one for one in told if not one.whole]
    print(f"{len(failed)} of {in_flight} requests in flight failed; the replica was back after {took:.1f} s")
    assert 0 < len(failed) < in_flight
    assert all(one.began <= killed for one in failed)
    assert {one.code for one in failed} == {"replica_gone"}
    for one in failed:
        if one.status == 200:
            assert one.error["status"] == 503
            assert not one.done
        else:
            assert (one.status, one.retry_after) == (503, "1")


def test_a_replica_that_hangs_is_left_out_of_what_the_server_says(cluster, url, prompts):
    """Until it answers again, or Ray Serve, whose patience is longer, replaces it."""
    frozen = engines(cluster)[0]

    async def look():
        async with Client(url) as client:
            os.kill(frozen["pid"], signal.SIGSTOP)
            try:
                replicas, ready = await client.replicas(), await client.get("/ready")
            finally:
                os.kill(frozen["pid"], signal.SIGCONT)
            assert frozen["replica_id"] not in [one["id"] for one in replicas]
            assert (len(replicas), ready["status"]) == (1, "ready")

            async def both():
                return len(await client.replicas()) == 2

            await until(both)

    asyncio.run(look())


def test_what_is_loaded_is_served_while_the_registry_is_away(url, serving, prompts, texts):
    store = Path(serving.storage)
    away = store.with_name("away")

    async def cut_off():
        async with Client(url) as client:
            mover = Mover(client, "orders")
            await mover.promote(5)

            async def ask(told, turn):
                await client.stream("orders", prompts[turn % PROMPTS], tokens=TOKENS, told=told)

            async def is_stale():
                return (await client.get("/v1/adapters"))["registry"]["stale_since"] is not None

            async def is_fresh():
                return not await is_stale()

            async with Load(ask, 4) as load:
                store.rename(away)
                try:
                    await until(is_stale)
                    seen = len(load.ended)
                    status, document = await client.post("/v1/adapters/promote", model="orders@v6")
                    assert (status, document["error"]["code"]) == (503, "registry_unreachable")
                    held = set().union(*residents(await client.replicas(), "orders").values())
                    absent = await client.stream(min(texts.keys() - held), prompts[0], tokens=1)
                    assert (absent.status, absent.code) == (503, "registry_unreachable")
                    await load.until(lambda: len(load.ended) >= seen + 20)
                finally:
                    assert not store.exists(), "somebody made the storage anew"
                    away.rename(store)
                await until(is_fresh)
                await mover.promote(6)
                moved = len(load.told)
                await load.until(lambda: len(load.ended) >= moved + 8)
            return mover, load.told

    mover, told = asyncio.run(cut_off())
    assert not failures(told)
    assert {one.version for one in told} == {"orders@v5", "orders@v6"}
    assert all(one.version in mover.current(one.began, one.headed) for one in told)
    assert all(one.text in texts[one.version] for one in told)


def test_replicas_follow_the_load_and_are_drained(cluster, url, serving, prompts):
    """A new config restarts everything, under load; then load brings a replica, and takes it away while it streams."""
    scale = {"replicas": [1, 2], "target_ongoing": 4, "upscale_delay_s": 0, "downscale_delay_s": 1}
    changed = serving.model_copy(update={"scale": serving.scale.model_copy(update=scale)})

    async def states():
        replicas = (await asyncio.to_thread(deployments, cluster)).get("engine", [])
        return sorted(one["state"] for one in replicas)

    async def follow():
        async with Client(url) as client:

            async def ask(told, turn):
                await client.stream("base", prompts[turn % PROMPTS], tokens=40, told=told)

            before = {one["id"] for one in await client.replicas()}
            async with Load(ask, 2) as load:
                await asyncio.to_thread(apply, cluster, changed)

                async def alone():
                    return await states() == ["RUNNING"] and before.isdisjoint(
                        one["id"] for one in await client.replicas()
                    )

                await until(alone, timeout_s=START_S)
            quiet = load.told
            async with Load(ask, 10) as load:

                async def two():
                    return await states() == ["RUNNING", "RUNNING"]

                await until(two, timeout_s=START_S)
            busy = load.told

            async def ask_long(told, turn):
                await client.stream("base", prompts[turn % PROMPTS], tokens=LONGEST - 20, told=told)

            async with Load(ask_long, 3) as load:

                async def one_goes():
                    return "STOPPING" in await states()

                await until(one_goes)
            return quiet, busy, load.told

    for told in asyncio.run(follow()):
        assert not failures(told)


def test_a_server_that_would_be_in_the_way_of_another_is_refused(url, serving):
    from ftray.serve.deploy import running

    other = serving.model_copy(update={"name": "other"})
    with (
        pytest.raises(ServeError, match="refuses the application: Prefix / is being used"),
        running(other),
    ):
        pass
    elsewhere = other.model_copy(update={"http": serving.http.model_copy(update={"port": free_port()})})
    with pytest.raises(ClusterError, match=f"listens at 127.0.0.1:{serving.http.port}"), running(elsewhere):
        pass


def test_a_deleted_app_finishes_what_it_streams(url, serving, prompts):
    from ray import serve as ray_serve

    told = [Told() for _ in range(3)]

    async def stream():
        async with Client(url) as client:
            await asyncio.gather(*(client.stream("base", prompts[0], tokens=800, told=one) for one in told))

    streaming = threading.Thread(target=asyncio.run, args=(stream(),))
    streaming.start()
    while not all(one.headed for one in told):
        assert streaming.is_alive()
        time.sleep(0.01)
    assert not any(one.ended for one in told)
    ray_serve.delete(serving.name)
    streaming.join(PATIENCE_S)
    assert not failures(told)


def test_a_server_that_does_not_come_up_says_why(url, serving, tmp_path):
    from ray import serve as ray_serve

    from ftray.serve.deploy import running

    if serving.name in ray_serve.status().applications:  # a server of that name is refused, broken or not
        ray_serve.delete(serving.name)
    model = serving.model.model_copy(update={"base": str(tmp_path)})
    broken = serving.model_copy(update={"model": model, "scale": ServeScale(replicas=1)})
    with pytest.raises(ServeError, match=f"does not come up: model.base: {tmp_path} has no"), running(broken):
        pass
