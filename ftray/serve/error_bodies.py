"""Errors as OpenAI's clients expect them, {"error": {"message", "type", "param", "code"}}, with a status that fits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from ftray.errors import (
    BadReference,
    FtrayError,
    Overloaded,
    RegistryError,
    RequestError,
    ServeError,
    UnknownVersion,
)

RETRY_S = 1.0
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_HTTP = {
    404: ("there is nothing at this path; GET /openapi.json lists what there is", "unknown_url"),
    405: ("this path does not know this method; GET /openapi.json lists which it knows", "method_not_allowed"),
}


class Refused(RequestError):
    """A request that is turned away with headers of its own, e.g. WWW-Authenticate."""

    def __init__(self, message: str, *, status: int, code: str, headers: Mapping[str, str] | None = None):
        super().__init__(message, status=status, code=code)
        self.headers = dict(headers or {})


def status_of(error: BaseException) -> int:
    if isinstance(error, ServeError):
        return error.status
    if isinstance(error, RegistryError):
        return _registry(error)[0]
    if isinstance(error, HTTPException):
        return error.status_code
    return 500


def body_of(error: BaseException, *, request_id: str) -> dict[str, Any]:
    """The JSON body. What the user cannot fix is not told, only the request's id, under which the log has it."""
    status = status_of(error)
    kind = "server_error" if status >= 500 else _TYPES.get(status, "invalid_request_error")
    message, code = _message_and_code(error, request_id=request_id)
    param = error.param if isinstance(error, RequestError) else None
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def response_to(error: BaseException, *, request_id: str) -> JSONResponse:
    return JSONResponse(body_of(error, request_id=request_id), status_of(error), headers=_headers(error))


def is_expected(error: BaseException) -> bool:
    """Whether it says something about the request or the cluster, rather than about a mistake of ours."""
    return isinstance(error, FtrayError | HTTPException)


def code_of(error: BaseException) -> str:
    """The word for logs and metrics."""
    return _message_and_code(error, request_id="")[1]


def _message_and_code(error: BaseException, *, request_id: str) -> tuple[str, str]:
    if isinstance(error, ServeError):
        return str(error), error.code
    if isinstance(error, RegistryError):
        return str(error), _registry(error)[1]
    if isinstance(error, HTTPException):
        return _HTTP.get(error.status_code, (str(error.detail), "invalid_request"))
    if isinstance(error, FtrayError):
        return str(error), "server_error"
    return f"something went wrong in the server; its log has more under request {request_id}", "server_error"


def _registry(error: RegistryError) -> tuple[int, str]:
    if isinstance(error, UnknownVersion):
        return 404, "model_not_found"
    if isinstance(error, BadReference):
        return 400, "invalid_request"
    return 409, "refused_by_registry"


def _headers(error: BaseException) -> dict[str, str]:
    if isinstance(error, Refused):
        return error.headers
    if isinstance(error, Overloaded):
        return {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
    if status_of(error) == 503:
        return {"Retry-After": str(math.ceil(RETRY_S))}
    if isinstance(error, HTTPException):
        return dict(error.headers or {})
    return {}
