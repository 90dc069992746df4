"""What is refused, how it is said, and what an error, a slow engine or a client that hangs up leaves behind."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx2 as httpx
import openai
import pytest
from app_server import Running, events

from ftray.errors import AdapterError, Overloaded, ReplicaGone

ASK = [{"role": "user", "content": "two coffees"}]
HEAD = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
CHAT = {"model": "base", "messages": ASK, "max_tokens": 4}


@pytest.fixture(scope="module")
def http(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=20) as client:
        yield client


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20)


@pytest.fixture
def failing(server: Running):
    """Makes the engine fail, until the test is over."""

    def fail(error: Exception, after: int = 0) -> None:
        server.engine.fail, server.engine.fail_after = error, after

    yield fail
    server.engine.fail = None


def refused(answer: httpx.Response, status: int, *, says: str, param: str | None = None, code: str | None = None):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert says in error["message"]
    assert error["param"] == param
    if code:
        assert error["code"] == code
    assert answer.headers["x-request-id"]


def eventually(holds) -> None:
    ends = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < ends, "it never came to be"
        time.sleep(0.01)


# requests that are wrong


def test_an_unknown_model_is_not_found_with_a_hint(client):
    with pytest.raises(openai.NotFoundError, match="did you mean 'orders'") as told:
        client.chat.completions.create(model="order", messages=ASK)
    assert (told.value.code, told.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        client.models.retrieve("../../etc/passwd")


@pytest.mark.parametrize(
    ("changes", "param", "says"),
    [
        ({"temperature": 3}, "temperature", "should be less than or equal to 2"),
        ({"temperature": "hot"}, "temperature", "should be a valid number"),
        ({"temperature": True}, "temperature", "should be a valid number"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 1.5}, "max_tokens", "should be a valid integer"),
        ({"max_tokens": 10**30}, "max_tokens", "less than"),
        ({"max_tokens": 1025}, "max_tokens", "limits.max_new_tokens"),
        ({"n": 9}, "n", "limits.max_n"),
        ({"n": 10**9}, "n", "less than or equal to 128"),
        ({"stop": [""]}, "stop[0]", "at least 1 character"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"stop": 5}, "stop", "should be a valid string, or should be a valid list"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", "pattern"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "less than or equal to 100"),
        ({"logit_bias": {"4096": 1}}, "logit_bias", "not below the vocabulary"),
        ({"logit_bias": {str(id): 0 for id in range(1025)}}, "logit_bias", "at most 1024"),
        ({"top_logprobs": 2}, None, "only taken with logprobs"),
        ({"stream_options": {"include_usage": True}}, None, "only taken with stream"),
        ({"max_completion_tokens": 5}, None, "max_tokens and max_completion_tokens differ"),
        ({"seed": 2**64}, "seed", "less than or equal"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": "hi"}, "messages", "should be a valid list"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role", "'system', 'developer', 'user'"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "should be a valid string"),
        ({"messages": [{"role": "user", "content": "a\0b"}]}, "messages[0].content", "U+0000"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].image_url",
            "does not know this key",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio", "text": "x"}]}]},
            "messages[0].content[0]",
            "'input_audio' is not served",
        ),
        ({"messages": [{**ASK[0], "tool_calls": [{"id": "1"}]}]}, "messages[0]", "'tool_calls' is not served"),
        ({"tools": [{"type": "function"}]}, "tools", "calling tools is not served"),
        ({"response_format": {"type": "json_object"}}, "response_format", "only text is served"),
        ({"functions": [{}]}, "functions", "not served"),
        ({"prediction": {"type": "content"}}, "prediction", "not served"),
        ({"audio": {"voice": "x"}}, "audio", "only text"),
        ({"temprature": 1}, "temprature", "did you mean 'temperature'?"),
        ({"best_of": 1}, "best_of", "does not know this key"),
    ],
)
def test_a_field_that_is_wrong_is_named(http, changes, param, says):
    refused(http.post("/v1/chat/completions", json={**CHAT, **changes}), 400, says=says, param=param)


@pytest.mark.parametrize(
    ("changes", "param", "says"),
    [
        ({"prompt": [-1]}, "prompt[0]", "greater than or equal to 0"),
        ({"prompt": [4096]}, "prompt", "not below the vocabulary"),
        ({"prompt": []}, "prompt", "at least 1 item"),
        ({"prompt": ["a"] * 65}, "prompt", "at most 64"),
        ({"prompt": ["a"] * 33, "n": 2}, "n", "send fewer at once"),
        ({"prompt": "a", "best_of": 2}, "best_of", "ask for n"),
        ({"prompt": "a", "suffix": "b"}, "suffix", "not served"),
        ({"prompt": "a", "echo": True, "logprobs": 1}, None, "leave out echo or logprobs"),
        ({"prompt": "a", "logprobs": True}, "logprobs", "should be a valid integer"),
        ({"prompt": "a", "min_tokens": 9}, "min_tokens", "more than the answer's 4"),
    ],
)
def test_a_completion_names_its_field_too(http, changes, param, says):
    body = {"model": "base", "max_tokens": 4, **changes}
    refused(http.post("/v1/completions", json=body), 400, says=says, param=param)


def test_what_is_too_long_says_how_much_fits(http, client):
    long = {**CHAT, "messages": [{"role": "user", "content": "word " * 2000}]}
    refused(
        http.post("/v1/chat/completions", json=long),
        400,
        says="may have 512",
        param="messages",
        code="context_length_exceeded",
    )
    refused(
        http.post("/v1/completions", json={"model": "base", "prompt": [5] * 500, "max_tokens": 13}),
        400,
        says="ask for at most 12",
        param="messages",
        code="context_length_exceeded",
    )


@pytest.mark.parametrize(
    ("content", "status", "says"),
    [
        (b"", 400, "is not JSON"),
        (b"\xff\xfe", 400, "is not JSON"),
        (b'{"model": "base\x00"}', 400, "is not JSON"),
        (b'{"model": "\\ud800"}', 400, "is not JSON"),
        (b'{"model": "\xed\xa0\x80"}', 400, "is not JSON"),
        (b'{"temperature": NaN}', 400, "is not JSON"),
        (b"[" * 100_000, 400, "is not JSON"),
        (b'{"a":' * 50_000, 400, "is not JSON"),
        (b'{"max_tokens": ' + b"9" * 100_000 + b"}", 400, "is not JSON"),
        (b"[]", 400, "must be a JSON object"),
        (b"null", 400, "must be a JSON object"),
        (b'"' + b"a" * 500_001 + b'"', 413, "limits.max_body_mb"),
    ],
)
def test_a_body_that_is_no_object_is_refused(http, content, status, says):
    answer = http.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    refused(answer, status, says=says)


def test_a_body_is_counted_while_it_is_read(http):
    def parts():
        for _ in range(100):
            yield b" " * 10_000

    headers = {"content-type": "application/json"}
    refused(http.post("/v1/chat/completions", content=parts(), headers=headers), 413, says="limits.max_body_mb")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonx", "é"])
def test_only_json_is_read(http, kind):
    content = json.dumps(CHAT).encode()
    answer = http.post("/v1/chat/completions", content=content, headers={"content-type": kind.encode()})
    refused(answer, 415, says="Content-Type: application/json", param="content-type")


def test_two_content_types_are_one_too_many(http):
    headers = [("content-type", "application/json"), ("content-type", "text/plain")]
    answer = http.post("/v1/chat/completions", content=json.dumps(CHAT).encode(), headers=headers)
    refused(answer, 415, says="Content-Type", param="content-type")


def test_paths_and_methods_that_do_not_exist_are_told_in_the_same_shape(http):
    refused(http.get("/v2"), 404, says="nothing at this path", code="unknown_url")
    refused(http.get("/v1/models/"), 404, says="there is no model", param="model")
    refused(http.put("/v1/models"), 405, says="does not know this method", code="method_not_allowed")
    refused(http.get("/v1/chat/completions"), 405, says="does not know this method")
    assert http.head("/health").status_code == 200


# errors of the engine


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "kind", "wait"),
    [
        (Overloaded("256 requests wait already", 2.5), 429, openai.RateLimitError, "3"),
        (ReplicaGone("the replica died"), 503, openai.InternalServerError, "1"),
        (AdapterError("orders@v1: rank 128 is too large"), 422, openai.UnprocessableEntityError, None),
    ],
)
def test_an_error_before_the_first_piece_has_its_status(client, failing, error, status, kind, wait, stream):
    failing(error)
    with pytest.raises(kind) as told:
        client.chat.completions.create(model="base", messages=ASK, max_tokens=2, n=2, stream=stream)
    assert told.value.status_code == status
    assert told.value.response.headers.get("retry-after") == wait
    assert told.value.body["message"] == str(error)


def test_an_error_in_the_middle_is_an_event_and_the_last_one(http, failing):
    failing(ReplicaGone("the replica died"), after=2)
    with http.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as answer:
        assert answer.status_code == 200
        told = events(list(answer.iter_lines()))
    assert told[-1]["error"]["message"] == "the replica died"
    assert told[-1]["error"]["code"] == "replica_gone"
    assert "[DONE]" not in told
    assert [one["choices"][0]["delta"] for one in told[1:-1]] == [{"content": "base "}, {"content": "0 "}]


def test_the_client_raises_what_happened_in_the_middle(client, failing):
    failing(ReplicaGone("the replica died"), after=1)
    with pytest.raises(openai.APIError, match="the replica died"):
        list(client.chat.completions.create(model="base", messages=ASK, max_tokens=4, stream=True))


def test_a_mistake_of_ours_shows_no_trace(http, failing):
    failing(ZeroDivisionError("secret detail"))
    answer = http.post("/v1/chat/completions", json=CHAT)
    refused(answer, 500, says=answer.headers["x-request-id"], code="server_error")
    assert "secret" not in answer.text
    failing(ZeroDivisionError("secret detail"), after=1)
    answer = http.post("/v1/chat/completions", json={**CHAT, "stream": True})
    assert "server_error" in answer.text
    assert "secret" not in answer.text


# time


def test_a_deadline_of_the_client_ends_the_work(http, server):
    cancelled = server.engine.cancelled
    slow = {**CHAT, "max_tokens": 400}
    answer = http.post("/v1/chat/completions", json=slow, headers={"x-request-timeout-seconds": "0.2"})
    refused(answer, 504, says="longer than 0.2 s", code="deadline_exceeded")
    eventually(lambda: server.engine.cancelled == cancelled + 1)
    answer = http.post(
        "/v1/chat/completions", json={**slow, "stream": True}, headers={"x-request-timeout-seconds": "0.2"}
    )
    assert answer.status_code == 200
    assert events(answer.text.splitlines())[-1]["error"]["code"] == "deadline_exceeded"
    eventually(lambda: server.engine.running == 0)


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon", ""])
def test_a_deadline_that_is_no_number_is_refused(http, seconds):
    answer = http.post("/v1/chat/completions", json=CHAT, headers={"x-request-timeout-seconds": seconds})
    refused(answer, 400, says="is not a number of seconds", param="x-request-timeout-seconds")


# clients that hang up


def test_closing_a_stream_cancels_its_answers(client, server):
    cancelled = server.engine.cancelled
    stream = client.chat.completions.create(model="orders", messages=ASK, max_tokens=400, n=3, stream=True)
    next(stream)
    assert server.engine.running == 3
    stream.close()
    eventually(lambda: server.engine.cancelled == cancelled + 3)
    assert server.engine.running == 0


def test_hanging_up_before_the_answer_cancels_it_too(server):
    cancelled = server.engine.cancelled
    where = urlsplit(server.url)
    body = json.dumps({**CHAT, "max_tokens": 400}).encode()
    with socket.create_connection((where.hostname, where.port)) as line:
        line.sendall(HEAD % (b"/v1/chat/completions", len(body)) + body)
        eventually(lambda: server.engine.running == 1)
    eventually(lambda: server.engine.cancelled == cancelled + 1)
    assert server.engine.running == 0


def test_hanging_up_in_the_middle_of_a_body_does_no_harm(server, http):
    where = urlsplit(server.url)
    with socket.create_connection((where.hostname, where.port)) as line:
        line.sendall(HEAD % (b"/v1/completions", 99) + b"{")
    assert http.get("/health").json() == {"status": "ok"}
