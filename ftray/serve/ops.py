"""/health, /ready and /metrics: for whoever runs the server."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ftray.serve.fleet import ReplicaState
from ftray.serve.keys import needs
from ftray.serve.metrics import CONTENT_TYPE
from ftray.serve.server import Server

router = APIRouter(tags=["operations"])
_NUMBER = re.compile(r"v\d+")


@router.get("/health")
@router.head("/health", include_in_schema=False)
async def health() -> JSONResponse:
    """This process answers. Needs no key, and tells nothing."""
    return JSONResponse({"status": "ok"})


@router.get("/ready", responses={503: {"description": "Not yet; `missing` says what is not there"}})
async def ready(request: Request) -> JSONResponse:
    """Requests are answered: the fleet is there, and once at the start everything that was to be preloaded was."""
    server = Server.of(request)
    states = await server.states()
    missing = list(_missing(states, [] if server.was_ready else [*server.adapters.preload, *server.adapters.pin]))
    server.was_ready = server.was_ready or not missing
    document = {
        "status": "waiting" if missing else "ready",
        "missing": missing,
        "replicas": len(states or ()),
        "registry_stale_since": server.catalog.stale_since,
    }
    return JSONResponse(document, 503 if missing else 200)


@router.get("/metrics", dependencies=[Depends(needs("admin"))])
async def metrics(request: Request) -> Response:
    """For Prometheus."""
    server = Server.of(request)
    stale_since = server.catalog.stale_since
    stale_s = 0.0 if stale_since is None else time.time() - stale_since
    return Response(server.metrics.page(await server.states(), stale_s=stale_s), media_type=CONTENT_TYPE)


def _missing(states: list[ReplicaState] | None, refs: list[str]) -> Iterator[str]:
    """What was preloaded under an alias counts whichever of the name's versions it was: the alias may have moved."""
    if not states:
        yield "no replica answers yet"
    for state in states or ():
        for ref in refs:
            name, _, at = ref.partition("@")
            is_number = _NUMBER.fullmatch(at) is not None
            held = [
                one for one in state.residents if one.version.id == ref or (one.version.name == name and not is_number)
            ]
            if not any(one.state == "loaded" for one in held):
                reason = next((f": {one.reason}" for one in held if one.reason), " is not loaded yet")
                yield f"{ref} on replica {state.id}{reason}"
