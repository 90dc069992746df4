"""GET /v1/models: what a request's `model` may say."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Any

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import JSONResponse

from ftray.errors import RequestError
from ftray.serve.catalog import Catalog, Listed
from ftray.serve.keys import needs
from ftray.serve.server import Server

router = APIRouter(dependencies=[Depends(needs("infer"))], tags=["models"])
_STARTED = int(time.time())


@router.get("/v1/models")
async def models(request: Request) -> JSONResponse:
    """The base, and of each adapter its name, aliases and versions. Those that would be refused are not among them."""
    listed = Server.of(request).catalog.models()
    return JSONResponse({"object": "list", "data": [_model(entry) for entry in listed if not entry.problem]})


@router.get("/v1/models/{model:path}")
async def model(request: Request, model: str) -> JSONResponse:
    catalog = Server.of(request).catalog
    entry = _find(catalog, model)
    if entry is None:
        await catalog.resolve(model)  # looks it up, or says what there is
        entry = _find(catalog, model)
    if entry is None:
        raise RequestError(f"there is no model {model[:140]!r} here", param="model", code="model_not_found", status=404)
    return JSONResponse(_model(entry))


def shares(entry: Listed) -> dict[str, float]:
    return {f"v{number}": share for number, share in entry.targets.items()}


def _find(catalog: Catalog, model: str) -> Listed | None:
    return next((entry for entry in catalog.models() if entry.id == model), None)


def _model(entry: Listed) -> dict[str, Any]:
    """`version` is what answers now; of a split, the largest share."""
    document: dict[str, Any] = {"id": entry.id, "object": "model", "created": _STARTED, "owned_by": "ftray"}
    document |= {"kind": entry.kind, "version": None, "problem": entry.problem}
    if entry.info is not None:
        document |= {
            "created": _seconds(entry.info.created),
            "version": entry.info.ref.id,
            "shares": shares(entry),
            "method": entry.info.method,
            "objective": entry.info.objective,
            "base": entry.info.base,
        }
    return document


def _seconds(created: str) -> int:
    """Seconds since 1970; the server's start for a card that does not say when it was made."""
    try:
        return int(datetime.fromisoformat(created).timestamp())
    except (TypeError, ValueError):
        return _STARTED
