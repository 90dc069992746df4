"""What the routes share: the sections they read, the fleet, the catalog, the tokenizer, the metrics."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

from starlette.requests import Request

from ftray.config.serving import Serving
from ftray.errors import RequestError, ServeError
from ftray.serve.call import BASE, Call
from ftray.serve.catalog import Catalog, Route
from ftray.serve.engine import EngineFacts
from ftray.serve.fleet import Fleet, ReplicaState
from ftray.serve.metrics import Metrics
from ftray.serve.prompts import Prompts
from ftray.serve.wanted import Deadline

_STATES_S = 5.0
_WAYS = {
    "generate": "serve a model that writes text",
    "embed": "serve an encoder (engine.kind: encoder)",
    "classify": "serve an encoder (engine.kind: encoder) and name a classification version",
}


class Server:
    def __init__(self, *, serving: Serving, fleet: Fleet, catalog: Catalog, tokenizer: Any, metrics: Metrics):
        self.http, self.limits, self.adapters = serving.http, serving.limits, serving.adapters
        self.fleet, self.catalog, self.metrics = fleet, catalog, metrics
        self.prompts = Prompts(tokenizer)
        self.was_ready = False
        self._facts: EngineFacts | None = None

    @classmethod
    def of(cls, request: Request) -> Server:
        server = request.app.state.server
        assert isinstance(server, cls)
        return server

    async def facts(self) -> EngineFacts:
        """Asked for once: what an engine is does not change while it runs."""
        if self._facts is None:
            self._facts = await self.fleet.facts()
        return self._facts

    async def facts_for(self, task: str) -> EngineFacts:
        facts = await self.facts()
        if task not in facts.tasks:
            raise RequestError(
                f"the engine here ({facts.kind}) does not {task}, it does {', '.join(facts.tasks)}; {_WAYS[task]}",
                code="unsupported_task",
            )
        return facts

    async def route(self, request: Request, model: str, *, who: str | None = None) -> Route:
        """The version that answers, from here to the end of the request. One `who` is on one side of a split."""
        call = Call.of(request.scope)
        call.model = model
        route = await self.catalog.resolve(model, point=None if who is None else _point(model, who))
        call.version = BASE if route.version is None else route.version.id
        return route

    async def states(self) -> list[ReplicaState] | None:
        """None where the fleet gives no answer: the caller has something to say without it."""
        try:
            async with asyncio.timeout(_STATES_S):
                return await self.fleet.states()
        except (ServeError, TimeoutError):
            return None

    def deadline(self, request: Request) -> Deadline:
        return Deadline.of(request, timeout_s=self.limits.timeout_s)


def fingerprint(facts: EngineFacts, route: Route) -> str:
    """The same for two answers that the same weights gave in the same precision."""
    weights = route.version.digest if route.version else ""
    text = "|".join((facts.kind, facts.base, facts.dtype, weights))
    return f"fp_{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _point(model: str, who: str) -> float:
    """In [0, 1); by model, so that the same users are not the first to try every new version."""
    digest = hashlib.sha256(f"{model}\0{who}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
