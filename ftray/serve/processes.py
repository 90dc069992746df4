"""The processes of a server on Ray Serve: replicas, each with an engine and its versions, and ingresses, which speak
HTTP. Ingresses know what names mean, replicas know versions only; they share nothing but the registry."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator
from typing import Any

from ray import serve as ray_serve
from ray.serve.handle import DeploymentHandle

from ftray.config.serving import Serving
from ftray.errors import FtrayError, ServeError
from ftray.serve import routing
from ftray.serve.engine import EngineFacts, Generation, Labelled, Piece, VersionRef
from ftray.serve.fleet import ReplicaState
from ftray.serve.gather import Gatherer


class EngineReplica:
    """A process with an engine; see replica.Replica, which this puts behind a deployment handle."""

    async def __init__(self, serving: dict[str, Any]):  # type: ignore[misc]  # Ray Serve awaits it
        from ftray.serve.build import build_engine
        from ftray.serve.replica import Replica
        from ftray.store.paths import Storage
        from ftray.store.registry import Registry

        logging.basicConfig(level=logging.INFO)
        self._serving = await asyncio.to_thread(located, serving)
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

    async def generate(
        self, request: Generation, version: VersionRef | None
    ) -> AsyncGenerator[Piece | FtrayError, None]:
        """An error of ours is the last thing yielded: one that is raised costs a trace in Ray Serve's log each time."""
        pieces = self._replica.generate(request, version)
        gathered = self._gatherer.gathered(pieces, streamed=request.streamed)
        async with contextlib.aclosing(pieces), contextlib.aclosing(gathered):
            try:
                async for piece in gathered:
                    yield piece
            except FtrayError as error:
                yield error

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

    async def __init__(self, serving: dict[str, Any], replicas: DeploymentHandle):  # type: ignore[misc]
        from ftray.models.load import fingerprint, load_tokenizer
        from ftray.serve.app import create_app
        from ftray.serve.catalog import Catalog
        from ftray.serve.remote import RemoteFleet
        from ftray.store.paths import Storage
        from ftray.store.registry import Registry

        config = await asyncio.to_thread(located, serving)
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


def located(content: dict[str, Any]) -> Serving:
    """The serve file, its base fetched where it is a version."""
    from ftray.models import chain
    from ftray.store.paths import Storage

    serving = Serving.model_validate(content)
    return chain.here(serving, Storage(serving.storage))


def base_names(serving: Serving) -> list[str]:
    """What a request may call the base."""
    return list(dict.fromkeys(["base", serving.model.base]))
