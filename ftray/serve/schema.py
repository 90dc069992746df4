"""The app's OpenAPI: bodies are read by bodies.py rather than FastAPI, so their schemas are put in by hand."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from ftray import __version__
from ftray.serve.openai import (
    Body,
    ChatBody,
    ClassifyBody,
    CompletionBody,
    EmbeddingBody,
    PromoteBody,
    RefBody,
    RollbackBody,
    SplitBody,
)

_BODIES: tuple[type[Body], ...] = (
    ChatBody,
    ClassifyBody,
    CompletionBody,
    EmbeddingBody,
    PromoteBody,
    RefBody,
    RollbackBody,
    SplitBody,
)
_PLACE = "#/components/schemas/{model}"
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
ERRORS: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": "What is wrong, and the way out",
        "content": {"application/json": {"schema": {"$ref": _PLACE.format(model="Error")}}},
    }
}


def takes(body: type[Body]) -> dict[str, Any]:
    """Arguments of a route that reads this body."""
    content = {"application/json": {"schema": {"$ref": _PLACE.format(model=body.__name__)}}}
    return {"openapi_extra": {"requestBody": {"required": True, "content": content}}, "response_model": None}


def describe(app: FastAPI) -> None:
    """Makes app.openapi() tell of the bodies too."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            described = get_openapi(title="ftray", version=__version__, summary=__doc__, routes=app.routes)
            schemas = described.setdefault("components", {}).setdefault("schemas", {})
            schemas["Error"] = _ERROR
            for body in _BODIES:
                schema = body.model_json_schema(ref_template=_PLACE)
                schemas |= schema.pop("$defs", {}) | {body.__name__: schema}
            app.openapi_schema = described
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
