"""The access log: a JSON line for each request. Prompts and answers are in it only where http.log_prompts says so."""

from __future__ import annotations

import json
import logging
import sys
import time

from ftray.serve.call import UNKNOWN, Call

LOGGER = logging.getLogger("ftray.access")
_ASKED_ALL_DAY = {"/health", "/ready", "/metrics"}


def write(call: Call, *, route: str, path: str) -> None:
    """`path` is what was asked for; it is told where no route fits."""
    _to_stderr_unless_handled()
    line = {
        "at": round(time.time(), 3),
        "request_id": call.id,
        "key": call.key,
        "method": call.method,
        "route": route,
        "model": call.model,
        "version": call.version,
        "status": call.status,
        "error": call.error,
        "stream": call.stream,
        "prompt_tokens": call.prompt_tokens,
        "cached_tokens": call.cached_tokens,
        "new_tokens": call.new_tokens,
        "ttft_s": _rounded(call.ttft_s),
        "total_s": _rounded(call.elapsed_s),
    }
    if route == UNKNOWN:
        line["path"] = path[:200]
    if call.prompts is not None:
        line |= {"prompts": call.prompts, "answers": call.answers}
    LOGGER.log(logging.DEBUG if route in _ASKED_ALL_DAY else logging.INFO, json.dumps(line))


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)


def _to_stderr_unless_handled() -> None:
    if not LOGGER.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        LOGGER.addHandler(handler)
    if LOGGER.level == logging.NOTSET:
        LOGGER.setLevel(logging.INFO)
