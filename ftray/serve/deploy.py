"""The server on Ray Serve: replicas, each with the engine and its versions, and ingresses, which speak HTTP.

```text
client -> Serve's proxy -> Ingress (app, catalog, tokenizer) -> AdapterRouter -> EngineReplica (residency, engine)
```
Ingresses know what names mean, replicas know versions only. They share nothing but the registry.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncGenerator
from typing import Any

import ray
from ray import serve as ray_serve
from ray.serve.config import HTTPOptions, RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from ftray.config.serving import Serving, VllmEngine
from ftray.errors import ClusterError, ServeError
from ftray.ray_cluster import connect
from ftray.serve import routing
from ftray.serve.engine import EngineFacts, Generation, Labelled, Piece, VersionRef
from ftray.serve.fleet import ReplicaState
from ftray.serve.gather import Gatherer

log = logging.getLogger(__name__)

APPLICATION = "ftray.serve.deploy:application"
START_S = 600.0
INGRESS_REQUESTS = 10_000
"""An ingress holds a request while it streams, which costs it little; replicas say when it is too much."""
ROUTER_STATS_S = 1.0
TRANSPORT = {
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
"""How Serve's processes talk: 32 streams took 0.15 ms of an ingress's time a piece so, and 0.38 ms by Ray's defaults.
Set for the processes started here; a cluster's own proxies follow the environment of its nodes."""


class EngineReplica:
    """A process with an engine; see replica.Replica, which this puts behind a deployment handle."""

    async def __init__(self, serving: dict[str, Any]):
        from ftray.serve.build import build_engine
        from ftray.serve.replica import Replica
        from ftray.store.paths import Storage
        from ftray.store.registry import Registry

        logging.basicConfig(level=logging.INFO)
        self._serving = Serving.model_validate(serving)
        engine = await asyncio.to_thread(build_engine, self._serving)
        self._engine = engine
        self._gatherer = Gatherer()
        self._replica = Replica(
            engine,
            Registry(Storage(self._serving.storage)),
            id=ray_serve.get_replica_context().replica_id.unique_id,
            limits=self._serving.limits,
            adapters=self._serving.adapters,
            app=self._serving.name,
        )
        await self._replica.start()

    async def generate(self, request: Generation, version: VersionRef | None) -> AsyncGenerator[Piece, None]:
        pieces = self._replica.generate(request, version)
        gathered = self._gatherer.gathered(pieces, streamed=request.streamed)
        async with contextlib.aclosing(pieces), contextlib.aclosing(gathered):
            async for piece in gathered:
                yield piece

    async def embed(self, ids: list[tuple[int, ...]], version: VersionRef | None) -> list[list[float]]:
        return await self._replica.embed(ids, version)

    async def classify(self, ids: list[tuple[int, ...]], version: VersionRef) -> list[Labelled]:
        return await self._replica.classify(ids, version)

    async def load(self, version: VersionRef, pin: bool = False) -> list[ReplicaState]:
        return await self._replica.load(version, pin=pin)

    async def unload(self, version: VersionRef) -> list[ReplicaState]:
        return await self._replica.unload(version)

    async def unpin(self, version: VersionRef) -> list[ReplicaState]:
        return await self._replica.unpin(version)

    async def facts(self) -> EngineFacts:
        return await self._replica.facts()

    async def states(self) -> list[ReplicaState]:
        return await self._replica.states()

    async def record_routing_stats(self) -> dict[str, Any]:
        """Ray Serve hands it to every router."""
        [state] = await self._replica.states()
        return {routing.VERSIONS: [one.version.key for one in state.residents if one.state == "loaded"]}

    async def check_health(self) -> None:
        """Ray Serve replaces a replica where this raises."""
        if not self._engine.stats().alive:
            raise ServeError("the engine's thread or process is gone")

    async def __del__(self) -> None:
        """Ray Serve calls it once the replica is drained."""
        if hasattr(self, "_replica"):
            await self._replica.close()


class Ingress:
    """A process that speaks HTTP."""

    async def __init__(self, serving: dict[str, Any], replicas: DeploymentHandle):
        from ftray.models.load import fingerprint, load_tokenizer
        from ftray.serve.app import create_app
        from ftray.serve.catalog import Catalog
        from ftray.serve.remote import RemoteFleet
        from ftray.store.paths import Storage
        from ftray.store.registry import Registry

        config = Serving.model_validate(serving)
        tokenizer = await asyncio.to_thread(load_tokenizer, config.model)
        self._catalog = Catalog(
            Registry(Storage(config.storage)),
            base_names=base_names(config),
            fingerprint=await asyncio.to_thread(fingerprint, config.model),
            allowed=config.adapters.serve,
            watch_s=config.adapters.watch_s,
        )
        await self._catalog.start()
        fleet = RemoteFleet(replicas)
        self._app = create_app(serving=config, fleet=fleet, catalog=self._catalog, tokenizer=tokenizer)

    def __serve_build_asgi_app__(self) -> Any:
        return self._app

    async def __del__(self) -> None:
        if hasattr(self, "_catalog"):
            await self._catalog.stop()


def base_names(serving: Serving) -> list[str]:
    """What a request may call the base."""
    return list(dict.fromkeys(["base", serving.model.base]))


def application(args: dict[str, Any]) -> Any:
    """The Serve application of a serve file's content; Serve configs and KubeRay's RayService name this function."""
    serving = Serving.model_validate(args)
    content = serving.model_dump(mode="json")
    low, high = _replicas(serving)
    engine = ray_serve.deployment(
        EngineReplica,
        name="engine",
        max_ongoing_requests=_most_requests(serving),
        ray_actor_options=_resources(serving),
        graceful_shutdown_timeout_s=serving.scale.drain_s,
        health_check_period_s=2,
        health_check_timeout_s=30,
        request_router_config=RequestRouterConfig(
            request_router_class="ftray.serve.routing.AdapterRouter", request_routing_stats_period_s=ROUTER_STATS_S
        ),
        **_scaling(serving, low, high),
    )
    ingress = ray_serve.deployment(
        ray_serve.ingress()(Ingress),
        name="ingress",
        num_replicas=serving.scale.ingresses,
        max_ongoing_requests=INGRESS_REQUESTS,
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": TRANSPORT}},
        graceful_shutdown_timeout_s=serving.scale.drain_s,
        health_check_period_s=2,
    )
    return ingress.bind(content, engine.bind(content))


def serve_config(serving: Serving) -> dict[str, Any]:
    """A Ray Serve config: for `serve deploy`, and as KubeRay's `serveConfigV2`."""
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": serving.http.port or 8000, **_timeouts(serving)},
        "applications": [
            {
                "name": serving.name,
                "route_prefix": "/",
                "import_path": APPLICATION,
                "args": serving.model_dump(mode="json"),
            }
        ],
    }


def serve(serving: Serving) -> int:
    """Serves until it is interrupted or terminated; then requests in work are finished, up to `scale.drain_s`."""
    with running(serving) as url:
        print(f"serving on {url}   (Ctrl-C stops it)", flush=True)
        stop = threading.Event()
        before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while not stop.wait(1.0):
                _check_running(serving.name)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        print("stopping: requests in work are finished first", flush=True)
    return 0


@contextlib.contextmanager
def running(serving: Serving):
    """The server while the block runs, on the cluster around us or one of its own; gives its address.

    ServeError when it does not come up, with what its replicas said.
    """
    here = serving.scale.address is None and "RAY_ADDRESS" not in os.environ and not ray.is_initialized()
    if here:
        _check_port(serving)
        for name, value in TRANSPORT.items():
            os.environ.setdefault(name, value)
    connect(serving.scale.address)
    try:
        port = serving.http.port or _free_port()
        _start_proxies(serving, port)
        ray_serve.run(application(serving.model_dump(mode="json")), name=serving.name, route_prefix="/", blocking=False)
        _wait_until_running(serving.name)
        try:
            host = serving.http.host
            yield f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
        finally:
            ray_serve.delete(serving.name)
    finally:
        if here:
            ray_serve.shutdown()
            ray.shutdown()


def _start_proxies(serving: Serving, port: int) -> None:
    loopback = serving.http.host in ("127.0.0.1", "localhost", "::1")
    ray_serve.start(
        proxy_location="HeadOnly" if loopback else "EveryNode",
        http_options=HTTPOptions(host=serving.http.host, port=port, **_timeouts(serving)),
    )


def _timeouts(serving: Serving) -> dict[str, Any]:
    """The proxy gives up only after the app would have answered."""
    return {"request_timeout_s": serving.limits.timeout_s + 30, "keep_alive_timeout_s": 90}


def _replicas(serving: Serving) -> tuple[int, int]:
    asked = serving.scale.replicas
    return (asked, asked) if isinstance(asked, int) else (asked[0], asked[1])


def _scaling(serving: Serving, low: int, high: int) -> dict[str, Any]:
    if low == high:
        return {"num_replicas": low}
    scale = serving.scale
    return {
        "autoscaling_config": {
            "min_replicas": low,
            "max_replicas": high,
            "target_ongoing_requests": scale.target_ongoing,
            "upscale_delay_s": scale.upscale_delay_s,
            "downscale_delay_s": scale.downscale_delay_s,
            "metrics_interval_s": 1.0,
            "look_back_period_s": max(2.0, min(30.0, scale.upscale_delay_s)),
        }
    }


def _most_requests(serving: Serving) -> int:
    """Above what the replica itself refuses with 429, so that nothing waits where nobody sees it."""
    return serving.limits.max_queue + getattr(serving.engine, "max_batch", 64) + 64


def _resources(serving: Serving) -> dict[str, Any]:
    scale, engine = serving.scale, serving.engine
    gpus = scale.gpus_per_replica
    if gpus == "auto":
        has_gpus = ray.is_initialized() and ray.cluster_resources().get("GPU", 0) > 0
        gpus = engine.tensor_parallel if isinstance(engine, VllmEngine) else int(has_gpus and engine.kind != "encoder")
    cpus = 1 if scale.cpus_per_replica == "auto" else scale.cpus_per_replica
    threads = getattr(engine, "threads", "auto")
    variables = {"OMP_NUM_THREADS": str(max(1, int(cpus)) if threads == "auto" else threads)}
    variables |= TRANSPORT | {name: os.environ[name] for name in ("HF_HUB_OFFLINE", "HF_HOME") if name in os.environ}
    return {"num_cpus": cpus, "num_gpus": gpus, "runtime_env": {"env_vars": variables}}


def _wait_until_running(name: str) -> None:
    end = time.monotonic() + START_S
    while True:
        app = ray_serve.status().applications.get(name)
        if app is not None and app.status == "RUNNING":
            return
        if app is not None and app.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise ServeError(f"the server does not come up: {_reasons(app)}")
        if time.monotonic() > end:
            raise ServeError(f"the server is not up after {START_S:.0f} s: {_reasons(app) if app else 'no answer'}")
        time.sleep(0.2)


def _check_running(name: str) -> None:
    """ServeError where somebody else took the application away."""
    with contextlib.suppress(ray.exceptions.RayError):
        if name not in ray_serve.status().applications:
            raise ServeError(f"the application {name!r} was deleted by somebody else")


def _reasons(app: Any) -> str:
    said = [app.message, *(one.message for one in app.deployments.values())]
    return next((line.strip() for text in said for line in reversed((text or "").splitlines()) if line.strip()), "?")


def _check_port(serving: Serving) -> None:
    """ClusterError when another program listens there; Serve would say so in a log only."""
    if not serving.http.port:
        return
    family = socket.AF_INET6 if ":" in serving.http.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((serving.http.host, serving.http.port))
        except OSError as error:
            raise ClusterError(
                f"http.port: {serving.http.host}:{serving.http.port} cannot be used ({error.strerror}); stop what "
                "listens there, or say http.port=0 for a free one"
            ) from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
