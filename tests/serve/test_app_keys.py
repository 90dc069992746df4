"""Keys: what answers without one, which scope is for what, and what is kept of them."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import openai
import pytest
from app_server import Engine, Running, running

from ftray.config.serving import Serving
from ftray.serve.keys import find, make_key

CLIENT = httpx.Client(timeout=20)
ADMIN_POSTS = ["load", "unload", "pin", "unpin", "promote", "rollback", "split"]
ASK = [{"role": "user", "content": "two coffees"}]


@pytest.fixture(scope="module")
def secrets() -> dict[str, tuple[str, Any]]:
    return {
        "reader": make_key("reader"),
        "boss": make_key("boss", ["infer", "admin"]),
        "ops": make_key("ops", ["admin"]),
    }


@pytest.fixture(scope="module")
def locked(storage, tokenizer, secrets) -> Iterator[Running]:
    serving = Serving(
        storage=str(storage),
        keys=[key.model_dump() for _, key in secrets.values()],
        http={"cors": ["https://there.example"]},
    )
    with running(serving, engine=Engine(), tokenizer=tokenizer) as started:
        yield started


def ask(server: Running, method: str, path: str, secret: str | None = None, **options: Any) -> httpx.Response:
    headers = options.pop("headers", {}) | ({} if secret is None else {"authorization": f"Bearer {secret}"})
    return CLIENT.request(method, f"{server.url}{path}", headers=headers, **options)


def test_a_key_is_kept_as_its_hash():
    secret, key = make_key("me", ["infer", "admin"])
    assert key.sha256 == hashlib.sha256(secret.encode()).hexdigest()
    assert secret not in key.model_dump_json()
    assert len(secret) > 40
    assert make_key("me")[0] != secret
    assert find([make_key("other")[1], key], f"Bearer {secret}") is key


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer ", "bearer x", "Basic !!!", "Basic eDp5", "Token x", "Bearer é", "Bearer a b", "x" * 9000],
)
def test_what_is_no_key_finds_none(header):
    assert find([make_key("me")[1]], header) is None


def test_without_a_key_nothing_answers_but_health(locked, secrets):
    paths = ask(locked, "GET", "/openapi.json", secrets["boss"][0]).json()["paths"]
    every = [(method.upper(), path) for path, methods in paths.items() for method in methods]
    assert len(every) >= 17
    more = [("GET", "/"), ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/nowhere"),
            ("PUT", "/v1/models"), ("GET", "//health"), ("GET", "/health/"), ("GET", "/HEALTH"), ("HEAD", "/ready"),
            ("OPTIONS", "/v1/models"), ("GET", "/v1/../health")]  # fmt: skip
    for method, path in [*every, *more]:
        answer = ask(locked, method, path.replace("{model}", "base"))
        if path in ("/health", "/v1/../health"):  # the second is the first once the client has tidied it up
            assert answer.status_code == 200
            continue
        assert answer.status_code == 401, (method, path)
        if method != "HEAD":
            assert answer.json()["error"]["code"] == "missing_api_key"
        assert ask(locked, method, path, "ftray-wrong").status_code == 401


def test_the_client_is_told_that_its_key_is_wrong(locked):
    client = openai.OpenAI(base_url=f"{locked.url}/v1", api_key="sk-wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="not one of this server's") as told:
        client.models.list()
    assert told.value.code == "invalid_api_key"


def test_two_keys_in_one_request_are_none(locked, secrets):
    headers = [("authorization", f"Bearer {secrets['boss'][0]}"), ("authorization", "Bearer x")]
    assert CLIENT.get(f"{locked.url}/v1/models", headers=headers).status_code == 401


def test_infer_reads_and_asks_but_moves_nothing(locked, secrets):
    secret = secrets["reader"][0]
    client = openai.OpenAI(base_url=f"{locked.url}/v1", api_key=secret, max_retries=0)
    assert client.chat.completions.create(model="base", messages=ASK, max_tokens=1).choices
    for path in ("/v1/models", "/v1/models/base", "/v1/adapters", "/ready", "/", "/openapi.json"):
        assert ask(locked, "GET", path, secret).status_code == 200, path
    for action in ADMIN_POSTS:
        answer = ask(locked, "POST", f"/v1/adapters/{action}", secret, json={"model": "orders"})
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "insufficient_scope"
        assert "has no scope 'admin'" in answer.json()["error"]["message"]
    assert ask(locked, "GET", "/metrics", secret).status_code == 403
    assert ask(locked, "GET", "/nowhere", secret).status_code == 404


def test_admin_alone_asks_nothing(locked, secrets):
    secret = secrets["ops"][0]
    assert ask(locked, "GET", "/metrics", secret).status_code == 200
    assert ask(locked, "POST", "/v1/adapters/load", secret, json={"model": "orders"}).status_code == 200
    body = {"model": "base", "messages": ASK}
    assert ask(locked, "POST", "/v1/chat/completions", secret, json=body).status_code == 403


def test_a_browser_may_send_the_key_as_a_password(locked, secrets):
    answer = ask(locked, "GET", "/")
    assert answer.headers["www-authenticate"].startswith("Basic ")
    both = base64.b64encode(f"me:{secrets['reader'][0]}".encode()).decode()
    assert ask(locked, "GET", "/", headers={"authorization": f"Basic {both}"}).status_code == 200


def test_a_page_elsewhere_may_ask_before_it_has_a_key(locked):
    headers = {
        "origin": "https://there.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    answer = ask(locked, "OPTIONS", "/v1/chat/completions", headers=headers)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://there.example"
    answer = ask(locked, "OPTIONS", "/v1/chat/completions", headers=headers | {"origin": "https://else.example"})
    assert "access-control-allow-origin" not in answer.headers
    answer = ask(locked, "GET", "/v1/models", headers={"origin": "https://there.example"})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (401, "https://there.example")


def test_a_body_is_not_read_before_the_key_is_checked(locked):
    answer = ask(locked, "POST", "/v1/chat/completions", content=b"{" * 3_000_000)
    assert answer.status_code == 401


def test_a_server_without_keys_answers_to_this_machines_names_only(server):
    for host in ("localhost:8000", "127.0.0.1", "[::1]:8000"):
        assert ask(server, "GET", "/v1/models", headers={"host": host}).status_code == 200
    for host in ("rebound.example", "localhost.rebound.example:8000", ""):
        answer = ask(server, "GET", "/v1/models", headers={"host": host})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "unknown_host")


def test_a_server_with_keys_answers_to_any_name(locked, secrets):
    assert ask(locked, "GET", "/v1/models", secrets["reader"][0], headers={"host": "models.example"}).status_code == 200
