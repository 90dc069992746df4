"""A thousand requests and more that mean no good: each ends, and none with a status of 500 or above."""

from __future__ import annotations

import itertools
import json
import random
import socket
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx2 as httpx
import pytest
import schemathesis
from app_server import Running
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

REQUESTS = 1000
EXAMPLES = 15
SLOWEST_S = 5.0
STATUSES: Counter[int] = Counter()
"""Of every request of this module, so that the last test can count them."""

STRANGE: list[Any] = [
    None, True, -1, 0, 1.5, 1e308, -(2**70), 2**70, "", "x", "\0", "\n\r", "../../etc/passwd", "\u202e\ufffe", "𝕏" * 50,
    "%s%n", "{{7*7}}", "'; drop table", "a" * 5000, [], {}, [[]], [None], [{}], [[[[[1]]]]], {"": {}}, {"a": [1]},
    ["a"] * 100, [0] * 3000, {"$ref": "#"}, {"__class__": "x"},
]  # fmt: skip
CHAT = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": "base", "prompt": "hi", "max_tokens": 1},
    "/v1/embeddings": {"model": "base", "input": "hi"},
    "/v1/classify": {"model": "base", "input": "hi"},
    "/v1/adapters/load": {"model": "orders"},
    "/v1/adapters/unload": {"model": "orders"},
    "/v1/adapters/pin": {"model": "orders"},
    "/v1/adapters/unpin": {"model": "orders"},
    "/v1/adapters/promote": {"model": "orders@v1"},
    "/v1/adapters/rollback": {"name": "orders"},
    "/v1/adapters/split": {"name": "orders", "weights": {"v1": 1}},
}
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
FIELDS = [
    "frequency_penalty", "logit_bias", "logprobs", "max_completion_tokens", "max_tokens", "messages", "min_p", "model",
    "n", "presence_penalty", "repetition_penalty", "seed", "stop", "stop_token_ids", "stream", "stream_options",
    "temperature", "tools", "top_k", "top_logprobs", "top_p", "user",
]  # fmt: skip


@pytest.fixture(scope="module")
def http(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=20) as client:
        yield client


def check(status: int, text: str, what: Any) -> None:
    """What every answer must be: below 500, and an error in OpenAI's shape if it is one."""
    STATUSES[status] += 1
    assert status < 500, (what, status, text)
    if status >= 400 and text:
        assert set(json.loads(text)["error"]) == {"message", "type", "param", "code"}, what


def ask(http: httpx.Client, method: str, path: str, **options: Any) -> httpx.Response:
    began = time.monotonic()
    answer = http.request(method, path, **options)
    check(answer.status_code, "" if method == "HEAD" else answer.text, (method, path, str(options)[:300]))
    assert time.monotonic() - began < SLOWEST_S
    return answer


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["allows", "forbids"])
def test_what_the_schema(server, mode):
    described = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in described.get_all_operations()]
    assert len(operations) >= 17
    for operation in operations:
        if mode is GenerationMode.POSITIVE or operation.body:
            examples(operation.as_strategy(generation_mode=mode))


def examples(strategy: Any) -> None:
    @given(case=strategy)
    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def answered(case: Any) -> None:
        answer = case.call(timeout=SLOWEST_S)
        STATUSES[answer.status_code] += 1
        assert answer.status_code < 500, (case.as_curl_command(), answer.text)

    answered()


def test_any_field_may_hold_anything(http):
    for field, value in itertools.product(FIELDS, STRANGE):
        ask(http, "POST", "/v1/chat/completions", json={**CHAT, field: value})


def test_any_field_of_the_other_routes_too(http):
    for path, body in BODIES.items():
        for field, value in itertools.product(body, STRANGE):
            if (path, field) != ("/v1/chat/completions", "messages"):
                ask(http, "POST", path, json={**body, field: value})


def test_messages_may_hold_anything(http):
    for key, value in itertools.product(("role", "content", "name", "tool_calls", "x"), STRANGE):
        ask(http, "POST", "/v1/chat/completions", json={**CHAT, "messages": [{**CHAT["messages"][0], key: value}]})
    for value in STRANGE:
        part = [{"type": "text", "text": "a"}, {"type": value, "text": value}]
        ask(http, "POST", "/v1/chat/completions", json={**CHAT, "messages": [{"role": "user", "content": part}]})


@pytest.mark.parametrize("path", BODIES)
def test_bodies_that_are_no_json(http, path):
    noise = random.Random(path)
    json_type = {"content-type": "application/json"}
    for content in (b"", b"\0", b"\xff" * 100, noise.randbytes(2000), b'{"a"', b"[" * 100_000, b'{"a":' * 60_000,
                    b"9" * 100_000, b'"\\ud800"', b"NaN", b"-Infinity", b"\xef\xbb\xbf{}", b"\x1f\x8b\x08" + bytes(50),
                    b'{"a": 1, "a": 2}', b"{} {}"):  # fmt: skip
        assert ask(http, "POST", path, content=content, headers=json_type).status_code == 400
    for kind in ("text/plain", "multipart/form-data", "application/json, text/plain", ";", "application/x" * 500):
        ask(http, "POST", path, content=b"{}", headers={"content-type": kind})
    assert ask(http, "POST", path, content=b" " * 10_000_000, headers=json_type).status_code == 413
    assert ask(http, "POST", path, content=iter([b" " * 100_000] * 10), headers=json_type).status_code == 413


def test_large_bodies_within_the_limit(http):
    many = 400_000
    for body in (
        {**CHAT, "messages": [{"role": "user", "content": "a" * many}]},
        {**CHAT, "messages": [{"role": "user", "content": "a b " * (many // 4)}]},
        {**CHAT, "messages": [{"role": "user", "content": ""}] * (many // 40)},
        {**CHAT, "messages": [{"role": "x"}] * (many // 20)},
        {**CHAT, "messages": [{f"k{number}": 1 for number in range(many // 12)}]},
        {**CHAT, **{f"k{number}": 1 for number in range(many // 12)}},
        {**CHAT, "logit_bias": {str(number): 200 for number in range(many // 12)}},
        {**CHAT, "model": "a" * many},
        {**CHAT, "user": "a" * many},
        {**CHAT, "stop": ["a"] * (many // 5)},
    ):
        ask(http, "POST", "/v1/chat/completions", json=body)
    for prompt in ([1] * (many // 3), ["a"] * (many // 6), [[1]] * (many // 6), [1, "a"] * (many // 10), "a" * many):
        ask(http, "POST", "/v1/completions", json={"model": "base", "prompt": prompt})
        ask(http, "POST", "/v1/embeddings", json={"model": "base", "input": prompt})


def test_paths_and_methods_of_every_kind(http):
    paths = ["/", "/health", "/ready", "/metrics", "/v1/models", "/v1/models/base", "/v1/adapters", "/docs", *BODIES]
    for path, method in itertools.product(paths, ("GET", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE", "TRACE")):
        if not (method == "POST" and path in BODIES):
            ask(http, method, path)
    for name in ("..%2f..%2fetc%2fpasswd", "%00", "%ff%fe", "a" * 3000, "orders@v99999999999999999999", "orders@@v1",
                 "@", "orders@v1/../..", "%2e%2e/", "orders%40v1%00", "{model}", "base%0d%0ax: y", "𝕏"):  # fmt: skip
        assert ask(http, "GET", f"/v1/models/{name}").status_code in (404, 422)
        ask(http, "GET", f"/{name}")
        ask(http, "POST", f"/v1/adapters/{name}", json={})


def test_headers_of_every_kind(http):
    for name, value in itertools.product(
        ("x-request-id", "x-request-timeout-seconds", "authorization", "content-type", "accept", "origin", "expect"),
        (b"", b"\xff\xfe", b"a" * 5000, b"'\"{}", b"-1", b"1e999", b"nan", b"0x10", b"Bearer", b"Basic Og=="),
    ):
        ask(http, "POST", "/v1/chat/completions", json=CHAT, headers={name: value})


@pytest.mark.parametrize(
    "raw",
    [
        POST + b"Content-Length: -5\r\n\r\n",
        POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
        POST + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"BREW /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: \0\r\n\r\n",
        b"GET /health HTTP/9.9\r\n\r\n",
        b"GET \xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET http://elsewhere/health HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    ],
)
def test_what_is_hardly_http(server, raw):
    where = urlsplit(server.url)
    with socket.create_connection((where.hostname, where.port), timeout=SLOWEST_S) as line:
        line.sendall(raw)
        line.shutdown(socket.SHUT_WR)
        answer = line.recv(4096)
    assert not answer.startswith(b"HTTP/1.1 5"), answer
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_it_were_a_thousand_and_the_server_is_well(http, server):
    assert STATUSES.total() >= REQUESTS, STATUSES
    answer = ask(http, "POST", "/v1/chat/completions", json=CHAT)
    assert answer.status_code == 200
    assert server.engine.running == 0
