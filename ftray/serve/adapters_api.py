"""/v1/adapters: what is registered, what lies in which replica, and moving both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import JSONResponse

from ftray.errors import AdapterError, DeadlineExceeded, FtrayError, RequestError, ServeError
from ftray.serve.bodies import read
from ftray.serve.call import Call
from ftray.serve.catalog import Listed
from ftray.serve.engine import VersionRef
from ftray.serve.error_bodies import code_of
from ftray.serve.fleet import ReplicaState, Resident
from ftray.serve.keys import needs
from ftray.serve.models_api import shares
from ftray.serve.openai import PromoteBody, RefBody, RollbackBody, SplitBody
from ftray.serve.schema import takes
from ftray.serve.server import Server
from ftray.store import aliases
from ftray.store.aliases import AliasState

router = APIRouter(tags=["adapters"])
_INFER = [Depends(needs("infer"))]
_ADMIN = [Depends(needs("admin"))]


@router.get("/v1/adapters", dependencies=_INFER)
async def adapters(request: Request) -> JSONResponse:
    """Every registered name with versions and aliases, and what each replica holds, with the reason of a failure."""
    server = Server.of(request)
    states = await server.states()
    return JSONResponse(
        {
            "object": "list",
            "data": _by_name(server.catalog.models()),
            "replicas": None if states is None else [_replica(state) for state in states],
            "registry": {"stale_since": server.catalog.stale_since},
        }
    )


@router.post("/v1/adapters/load", dependencies=_ADMIN, **takes(RefBody))
async def load(request: Request) -> JSONResponse:
    """Loads a version on every replica, before somebody asks for it."""
    server = Server.of(request)
    async with _moving(request, "load"):
        version = await _version(request)
        return _held(version, await server.fleet.load(version))


@router.post("/v1/adapters/unload", dependencies=_ADMIN, **takes(RefBody))
async def unload(request: Request) -> JSONResponse:
    """Takes a version out of every replica, once nobody uses it. It is loaded again when it is asked for."""
    server = Server.of(request)
    async with _moving(request, "unload"):
        version = await _version(request)
        return _held(version, await server.fleet.unload(version))


@router.post("/v1/adapters/pin", dependencies=_ADMIN, **takes(RefBody))
async def pin(request: Request) -> JSONResponse:
    """Loads a version on every replica, and keeps it there."""
    server = Server.of(request)
    async with _moving(request, "pin"):
        version = await _version(request)
        return _held(version, await server.fleet.load(version, pin=True))


@router.post("/v1/adapters/unpin", dependencies=_ADMIN, **takes(RefBody))
async def unpin(request: Request) -> JSONResponse:
    """Lets a version be evicted again."""
    server = Server.of(request)
    async with _moving(request, "unpin"):
        version = await _version(request)
        return _held(version, await server.fleet.unpin(version))


@router.post("/v1/adapters/promote", dependencies=_ADMIN, **takes(PromoteBody))
async def promote(request: Request) -> JSONResponse:
    """Points an alias at a version, which answers the next request.

    The version is loaded before, so that nobody waits for it; one that cannot be loaded is refused unless forced.
    """
    server = Server.of(request)
    async with _moving(request, "promote"):
        body = await read(request, PromoteBody, max_mb=server.limits.max_body_mb)
        Call.of(request.scope).model = body.model
        ref = body.model if "@" in body.model else await _newest(server, body.model)
        await _warm(request, [ref], force=body.force)
        state = await server.catalog.promote(ref, body.alias, force=body.force, expect=body.expect, by=_who(request))
        return _moved(ref.partition("@")[0], body.alias, state)


@router.post("/v1/adapters/rollback", dependencies=_ADMIN, **takes(RollbackBody))
async def rollback(request: Request) -> JSONResponse:
    """Points an alias where it pointed before; twice goes back two states."""
    server = Server.of(request)
    async with _moving(request, "rollback"):
        body = await read(request, RollbackBody, max_mb=server.limits.max_body_mb)
        Call.of(request.scope).model = f"{body.name}@{body.alias}"
        state = await server.catalog.rollback(body.name, body.alias, by=_who(request))
        return _moved(body.name, body.alias, state)


@router.post("/v1/adapters/split", dependencies=_ADMIN, **takes(SplitBody))
async def split(request: Request) -> JSONResponse:
    """Shares an alias's requests out among versions; requests of one `user` stay with one. Loaded before, as above."""
    server = Server.of(request)
    async with _moving(request, "split"):
        body = await read(request, SplitBody, max_mb=server.limits.max_body_mb)
        Call.of(request.scope).model = f"{body.name}@{body.alias}"
        numbers = aliases.shares(body.weights)
        await _warm(request, [f"{body.name}@v{number}" for number in numbers], force=body.force)
        state = await server.catalog.split(
            body.name, body.alias, body.weights, force=body.force, expect=body.expect, by=_who(request)
        )
        return _moved(body.name, body.alias, state)


@asynccontextmanager
async def _moving(request: Request, action: str) -> AsyncIterator[None]:
    """Counts how it ended, at the deadline at the latest. A client that hangs up does not end it halfway."""
    server = Server.of(request)
    deadline = server.deadline(request)
    try:
        async with asyncio.timeout_at(deadline.at) as limit:
            yield
    except TimeoutError as error:
        if not limit.expired():
            raise
        late = DeadlineExceeded(
            f"{action} took longer than {deadline.allowed_s:g} s; look at /v1/adapters how it ended"
        )
        server.metrics.moved(action, late.code)
        raise late from error
    except FtrayError as error:
        server.metrics.moved(action, code_of(error))
        raise
    server.metrics.moved(action, "ok")


async def _version(request: Request) -> VersionRef:
    server = Server.of(request)
    body = await read(request, RefBody, max_mb=server.limits.max_body_mb)
    route = await server.route(request, body.model)
    if route.version is None:
        raise RequestError(
            f"{body.model!r} is the base, which is always there; name an adapter's version", param="model"
        )
    return route.version


async def _newest(server: Server, name: str) -> str:
    """What a bare name means in a promotion: name@v<newest>."""
    await server.catalog.refresh(name)
    numbers = [
        entry.info.ref.number
        for entry in server.catalog.models()
        if entry.kind == "version" and entry.info and entry.info.ref.name == name
    ]
    return f"{name}@v{max(numbers)}" if numbers else name


async def _warm(request: Request, refs: Sequence[str], *, force: bool) -> None:
    """Loads what an alias is about to point at. Only a version that cannot be served stops the move."""
    server = Server.of(request)
    for ref in refs:
        try:
            version = (await server.catalog.resolve(ref)).version
            if version is not None:
                await server.fleet.load(version)
        except AdapterError:
            if not force:
                raise
        except RequestError:
            raise
        except ServeError:
            pass  # no room, or no replica just now; whoever asks first will wait for the load


def _who(request: Request) -> str:
    return Call.of(request.scope).key or "http"


def _moved(name: str, alias: str, state: AliasState) -> JSONResponse:
    return JSONResponse({"object": "alias", "id": f"{name}@{alias}", **_state(state)})


def _held(version: VersionRef, states: Sequence[ReplicaState]) -> JSONResponse:
    """What each replica says of one version; null where it does not hold it."""
    replicas = [
        {
            "id": state.id,
            "resident": next((_resident(held) for held in state.residents if held.version == version), None),
        }
        for state in states
    ]
    return JSONResponse({"object": "adapter", "id": version.id, "digest": version.digest, "replicas": replicas})


def _by_name(listed: Sequence[Listed]) -> list[dict[str, Any]]:
    names: dict[str, dict[str, Any]] = {}
    for entry in listed:
        name, _, at = entry.id.partition("@")
        if entry.kind == "name":
            names[name] = {"name": name, "shares": shares(entry), "aliases": {}, "versions": []}
        elif entry.kind == "alias" and entry.state is not None:
            names[name]["aliases"][at] = _state(entry.state)
        elif entry.kind == "version" and entry.info is not None:
            info = entry.info
            names[name]["versions"].append(
                {
                    "id": entry.id,
                    "digest": info.ref.digest,
                    "created": info.created,
                    "base": info.base,
                    "method": info.method,
                    "objective": info.objective,
                    "servability": info.servability,
                    "gate_passed": info.gate,
                    "problem": entry.problem,
                }
            )
    return list(names.values())


def _state(state: AliasState) -> dict[str, Any]:
    """`move` is what `expect` compares with."""
    targets = {f"v{number}": share for number, share in state.targets.items()}
    return {"shares": targets, "move": state.number, "moved_at": state.moved_at, "by": state.by, "reason": state.reason}


def _replica(state: ReplicaState) -> dict[str, Any]:
    facts = asdict(state.facts)
    return {
        "id": state.id,
        "engine": {**facts, "room": dict(facts["room"]), "tasks": list(facts["tasks"])},
        "stats": asdict(state.stats),
        "started_at": state.started_at,
        "residents": [_resident(held) for held in state.residents],
    }


def _resident(held: Resident) -> dict[str, Any]:
    return {**asdict(held), "version": held.version.id, "digest": held.version.digest}
