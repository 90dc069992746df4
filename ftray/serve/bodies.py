"""A request's JSON body, read within limits and checked against its schema. Anything wrong names its field."""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import from_json
from starlette.requests import Request

from ftray.errors import RequestError
from ftray.serve.openai import Body

BODY_TIMEOUT_S = 60.0
_MOST_PROBLEMS = 32
_B = TypeVar("_B", bound=Body)


async def read(request: Request, body: type[_B], *, max_mb: float) -> _B:
    """The body as the schema says. RequestError with the field, 413 when it is too large, 415 when it is not JSON."""
    _check_is_json(request)
    return parse(await _bytes(request, limit=int(max_mb * 1e6)), body)


def parse(content: bytes, body: type[_B]) -> _B:
    try:
        data = from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise RequestError('the body must be a JSON object, e.g. {"model": "base"}')
    data = _without_harmless(data, body)
    try:
        return body.model_validate(data)
    except ValidationError as error:
        raise _problem(error, data) from error


def _check_is_json(request: Request) -> None:
    """Another content type would let any web page post here from a visitor's browser without asking first."""
    kinds = request.headers.getlist("content-type")
    kind = kinds[0].partition(";")[0].strip().lower() if len(kinds) == 1 else ""
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise RequestError(
            "the body must come with the header 'Content-Type: application/json'",
            param="content-type",
            code="unsupported_media_type",
            status=415,
        )


async def _bytes(request: Request, *, limit: int) -> bytes:
    too_large = RequestError(
        f"the body is larger than this server's limit of {limit / 1e6:g} MB (limits.max_body_mb)",
        code="request_too_large",
        status=413,
    )
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and len(announced) < 20 and int(announced) > limit:
        raise too_large
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise too_large
                parts.append(part)
    except TimeoutError as error:
        message = f"the body did not come within {BODY_TIMEOUT_S:g} s"
        raise RequestError(message, code="request_timeout", status=408) from error
    return b"".join(parts)


def _without_harmless(data: dict[str, Any], body: type[Body]) -> dict[str, Any]:
    """What is left to check. Unknown keys end it here: a key that does nothing would give a wrong answer silently."""
    kept = {}
    for key, value in data.items():
        if key in body.model_fields:
            kept[key] = value
        elif key in body.refused:
            if not _says_nothing(key, value, body):
                raise RequestError(f"{key}: {body.refused[key]}", param=key, code="unsupported_parameter")
        elif key not in body.harmless:
            raise _unknown(key, body.model_fields)
    return kept


def _says_nothing(key: str, value: Any, body: type[Body]) -> bool:
    return value in (None, [], {}) or any(value == nothing for nothing in body.same_as_nothing.get(key, ()))


def _unknown(key: str, known: Sequence[str] | Any) -> RequestError:
    near = difflib.get_close_matches(key[:64], list(known), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return RequestError(
        f"{key[:64]}: this server does not know this key{hint}", param=key[:64], code="unknown_parameter"
    )


def _problem(error: ValidationError, data: Any) -> RequestError:
    """The first field that is wrong. Of a union's branches, those that came farthest into the data are told."""
    problems: dict[tuple[str, ...], list[str]] = {}
    found = error.errors(include_url=False, include_context=False, include_input=False)
    for item in found:
        if item["loc"][:1] != found[0]["loc"][:1] or len(problems) > _MOST_PROBLEMS:
            break
        path = _path(item["loc"], data, missing=item["type"] in ("missing", "extra_forbidden"))
        told = problems.setdefault(path, [])
        if (what := _what(item)) not in told:
            told.append(what)
    path = max(problems, key=len)
    what, param = ", or ".join(problems[path][:4]), "".join(path).removeprefix(".")
    return RequestError(f"{param}: {what}" if param else what, param=param or None)


def _path(loc: tuple[int | str, ...], data: Any, *, missing: bool) -> tuple[str, ...]:
    """(.messages, [0], .content): the way through the data, without pydantic's names of a union's branches."""
    path: list[str] = []
    for step in loc:
        if isinstance(step, int) and isinstance(data, list) and step < len(data):
            path.append(f"[{step}]")
            data = data[step]
        elif isinstance(step, str) and isinstance(data, dict) and (step in data or (missing and step == loc[-1])):
            path.append(f".{step[:64]}")
            data = data.get(step)
    return tuple(path)


def _what(item: Any) -> str:
    if item["type"] == "missing":
        return "is missing"
    if item["type"] == "extra_forbidden":
        return "this server does not know this key"
    message: str = item["msg"]
    return message.removeprefix("Value error, ").replace("Input should be", "should be", 1)
