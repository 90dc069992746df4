"""The HTTP side of serving: OpenAI's API over a fleet and a catalog that the caller has started."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from ftray.config.serving import Serving
from ftray.errors import FtrayError, RequestError
from ftray.serve import adapters_api, completions, models_api, ops, playground, reading_api
from ftray.serve.call import Call
from ftray.serve.catalog import Catalog
from ftray.serve.edge import Edge
from ftray.serve.error_bodies import code_of, response_to
from ftray.serve.fleet import Fleet
from ftray.serve.keys import KeyGuard
from ftray.serve.local_hosts import LOOPBACK, LocalHosts
from ftray.serve.metrics import Metrics
from ftray.serve.schema import ERRORS, describe
from ftray.serve.server import Server


def create_app(*, serving: Serving, fleet: Fleet, catalog: Catalog, tokenizer: Any) -> FastAPI:
    """A plain ASGI app: it needs no lifespan, so that any server can run it."""
    metrics = Metrics()
    app = FastAPI(
        title="ftray",
        redirect_slashes=False,
        docs_url=None,  # its scripts come from elsewhere, and would run with the rights of whoever looks at it
        redoc_url=None,
        middleware=_middleware(serving, metrics),
        exception_handlers={FtrayError: _answer, HTTPException: _answer, RequestValidationError: _answer_invalid},
        responses=ERRORS,
    )
    app.state.server = Server(serving=serving, fleet=fleet, catalog=catalog, tokenizer=tokenizer, metrics=metrics)
    for routes in (completions, reading_api, models_api, adapters_api, ops):
        app.include_router(routes.router)
    if serving.http.playground:
        app.include_router(playground.router)
    describe(app)
    return app


def _middleware(serving: Serving, metrics: Metrics) -> list[Middleware]:
    """From the outside in. A browser asks for CORS without a key, so that comes before keys are checked."""
    layers = [Middleware(Edge, metrics=metrics)]
    if serving.http.cors:
        layers.append(
            Middleware(
                CORSMiddleware,
                allow_origins=serving.http.cors,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "x-ftray-version", "retry-after"],
            )
        )
    if not serving.keys and serving.http.host in LOOPBACK:
        layers.append(Middleware(LocalHosts))
    return [*layers, Middleware(KeyGuard, keys=serving.keys)]


async def _answer(request: Request, error: Exception) -> Response:
    call = Call.of(request.scope)
    call.error = code_of(error)
    return response_to(error, request_id=call.id)


async def _answer_invalid(request: Request, error: Exception) -> Response:
    """FastAPI's own complaint, of a path or a query."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = ".".join(str(step) for step in first["loc"])
    return await _answer(request, RequestError(f"{param}: {first['msg']}", param=param))
