"""/v1/adapters, /ready, /metrics and the access log: what lies where, moving it, and what is told of it."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest
from app_server import Engine, Running, publish, running

from ftray.config.serving import Serving

ASK = [{"role": "user", "content": "two coffees"}]
FAILED_GATE = {"gate": {"passed": False, "rules": [{"rule": "score >= 1", "value": 0.5, "passed": False}]}}


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    root = tmp_path_factory.mktemp("app") / "store"
    publish(root, "orders", "first", "second", "third")
    publish(root, "refunds", "money")
    publish(root, "poor", "bad", card=FAILED_GATE)
    return root


@pytest.fixture(scope="module")
def server(storage, tokenizer) -> Iterator[Running]:
    serving = Serving(
        storage=str(storage),
        adapters={"watch_s": 60, "preload": ["refunds"], "pin": ["orders@v1"]},
        http={"log_prompts": True},
    )
    with running(serving, engine=Engine(slots=3), tokenizer=tokenizer) as started:
        yield started


@pytest.fixture(scope="module")
def http(server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=20) as client:
        yield client


def move(http: httpx.Client, action: str, status: int = 200, **body: Any) -> dict[str, Any]:
    answer = http.post(f"/v1/adapters/{action}", json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


def residents(http: httpx.Client) -> dict[str, dict[str, Any]]:
    [replica] = http.get("/v1/adapters").json()["replicas"]
    return {held["version"]: held for held in replica["residents"]}


def who_answers(http: httpx.Client, model: str) -> str:
    answer = http.post("/v1/chat/completions", json={"model": model, "messages": ASK, "max_tokens": 1})
    assert answer.status_code == 200, answer.text
    return answer.headers["x-ftray-version"]


def test_a_server_is_ready_once_what_it_should_hold_is_there(http):
    ready = http.get("/ready")
    assert (ready.status_code, ready.json()) == (
        200,
        {"status": "ready", "missing": [], "replicas": 1, "registry_stale_since": None},
    )


def test_a_server_that_misses_a_version_says_which(storage, tokenizer):
    serving = Serving(storage=str(storage), adapters={"preload": ["nobody@v1"], "pin": ["orders@v2"]})
    with running(serving, engine=Engine(slots=3), tokenizer=tokenizer) as started:
        answer = httpx.get(f"{started.url}/ready")
        assert answer.status_code == 503
        assert answer.json()["missing"] == ["nobody@v1 on replica r0 is not loaded yet"]


def test_the_list_has_names_versions_aliases_and_residents(http, server):
    told = http.get("/v1/adapters").json()
    names = {adapter["name"]: adapter for adapter in told["data"]}
    assert list(names) == ["orders", "poor", "refunds"]
    assert [version["id"] for version in names["orders"]["versions"]] == ["orders@v3", "orders@v2", "orders@v1"]
    assert names["poor"]["versions"][0]["gate_passed"] is False
    assert told["registry"] == {"stale_since": None}
    [replica] = told["replicas"]
    assert replica["engine"]["kind"] == "fake"
    assert replica["engine"]["room"] == {"bank": 3, "own": 1}
    held = residents(http)
    assert held["orders@v1"]["pinned"] is True
    assert held["refunds@v1"]["state"] == "loaded"


def test_versions_are_loaded_pinned_and_unloaded_by_hand(http):
    told = move(http, "load", model="orders@v2")
    assert told["id"] == "orders@v2"
    assert told["replicas"][0]["resident"]["state"] == "loaded"
    assert move(http, "pin", model="orders@v2")["replicas"][0]["resident"]["pinned"] is True
    assert move(http, "unpin", model="orders@v2")["replicas"][0]["resident"]["pinned"] is False
    assert move(http, "unload", model="orders@v2")["replicas"][0]["resident"] is None
    assert "orders@v2" not in residents(http)
    assert "always there" in move(http, "load", 400, model="base")["error"]["message"]
    assert move(http, "load", 404, model="orders@v9")["error"]["code"] == "model_not_found"


def test_a_promotion_counts_for_the_next_request_and_is_rolled_back(http):
    told = move(http, "promote", model="orders@v2")
    assert told["id"] == "orders@prod"
    assert told["shares"] == {"v2": 1.0}
    assert told["by"] == "http"
    assert who_answers(http, "orders") == "orders@v2"
    move(http, "promote", model="orders", expect=told["move"])  # a bare name is its newest version
    assert who_answers(http, "orders") == "orders@v3"
    assert move(http, "promote", 409, model="orders@v1", expect=told["move"])["error"]["code"] == "refused_by_registry"
    assert move(http, "rollback", name="orders")["shares"] == {"v2": 1.0}
    assert who_answers(http, "orders") == "orders@v2"
    assert who_answers(http, "orders@v3") == "orders@v3"
    assert "nothing to go back to" in move(http, "rollback", 409, name="refunds")["error"]["message"]
    move(http, "rollback", 409, name="nobody")


def test_a_promoted_version_is_loaded_before_it_is_asked_for(http, server):
    move(http, "unload", model="orders@v3")
    move(http, "promote", model="orders@v3", alias="next")
    assert residents(http)["orders@v3"]["state"] == "loaded"
    assert who_answers(http, "orders@next") == "orders@v3"


def test_a_gate_that_failed_stops_a_promotion_unless_forced(http):
    told = move(http, "promote", 409, model="poor@v1")
    assert "did not pass its gate" in told["error"]["message"]
    assert move(http, "promote", model="poor@v1", force=True)["shares"] == {"v1": 1.0}


def test_a_version_that_cannot_be_loaded_is_not_promoted_and_says_why(http, server, storage):
    publish(storage, "broken", "one", "two")
    version = server.registry.resolve("broken@v2")
    (server.registry.fetch(version) / "adapter_config.json").write_text("{")
    move(http, "promote", model="broken@v1")
    told = move(http, "promote", 422, model="broken@v2")
    assert told["error"]["code"] == "adapter_not_servable"
    assert who_answers(http, "broken") == "broken@v1"
    answer = http.post("/v1/completions", json={"model": "broken@v2", "prompt": "a"})
    assert answer.status_code == 422
    assert residents(http)["broken@v2"]["state"] == "failed"
    assert "adapter_config.json" in residents(http)["broken@v2"]["reason"]
    move(http, "promote", model="broken@v2", force=True)
    move(http, "rollback", name="broken")
    assert who_answers(http, "broken") == "broken@v1"


def test_a_split_shares_requests_out(http):
    told = move(http, "split", name="orders", alias="test", weights={"v1": 3, "v2": 1})
    assert told["shares"] == {"v1": 0.75, "v2": 0.25}
    assert {who_answers(http, "orders@test") for _ in range(40)} == {"orders@v1", "orders@v2"}
    for weights, param in ({"v1": 0}, "weights.v1"), ({}, "weights"), ({"v1": "a"}, "weights.v1"):
        assert move(http, "split", 400, name="orders", alias="test", weights=weights)["error"]["param"] == param
    move(http, "split", 400, name="orders", alias="v1", weights={"v1": 1})
    move(http, "split", 400, name="orders", alias="test", weights={"first": 1})
    move(http, "split", 404, name="orders", alias="test", weights={"v77": 1})


@pytest.mark.parametrize(
    "name", ["../../etc", "orders/../refunds", "orders@", "@v1", "a" * 300, "orders\n", "ORDERS", "é"]
)
def test_a_name_that_cannot_be_one_is_refused_everywhere(http, name):
    for action in ("load", "unload", "pin", "unpin", "promote"):
        assert http.post(f"/v1/adapters/{action}", json={"model": name}).status_code in (400, 404)
    for action in ("rollback", "split"):
        body = {"name": name, "weights": {"v1": 1}} if action == "split" else {"name": name}
        assert http.post(f"/v1/adapters/{action}", json=body).status_code in (400, 404)
    assert http.post("/v1/completions", json={"model": name, "prompt": "a"}).status_code in (400, 404)


def test_metrics_count_by_version_and_never_by_what_a_client_made_up(http):
    body = {"model": "refunds", "messages": ASK, "max_tokens": 5, "stream": True}
    assert http.post("/v1/chat/completions", json=body).status_code == 200
    http.post("/v1/chat/completions", json=body | {"model": "made-up-name"})
    http.get("/made/up/path")
    page = http.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = page.text.splitlines()
    chat = 'ftray_requests_total{route="/v1/chat/completions",status="%s",version="%s"}'
    assert any(line.startswith(chat % (200, "refunds@v1")) for line in lines)
    assert any(line.startswith(chat % (404, "unknown")) for line in lines)
    assert 'ftray_new_tokens_total{version="refunds@v1"} 5.0' in lines
    assert 'ftray_adapter_moves_total{action="promote",outcome="ok"}' in page.text
    assert 'ftray_resident_version{replica="r0",room="bank",state="loaded",version="refunds@v1"} 1.0' in lines
    assert 'ftray_replica_running{replica="r0"} 0.0' in lines
    assert "ftray_time_to_first_token_seconds_bucket" in page.text
    assert "ftray_inter_token_seconds_bucket" in page.text
    assert "ftray_requests_in_flight 1.0" in lines
    assert "made" not in page.text.replace("ftray_", "")


def test_a_line_of_the_log_tells_of_each_request(http, caplog):
    caplog.set_level(logging.INFO, logger="ftray.access")
    headers = {"x-request-id": "find-me"}
    body = {"model": "refunds", "messages": ASK, "max_tokens": 2, "stream": True}
    http.post("/v1/chat/completions", json=body, headers=headers)
    line = told(caplog, "find-me")
    assert line | {"at": 0, "ttft_s": 0, "total_s": 0, "prompt_tokens": 0} == {
        "at": 0,
        "request_id": "find-me",
        "key": None,
        "method": "POST",
        "route": "/v1/chat/completions",
        "model": "refunds",
        "version": "refunds@v1",
        "status": 200,
        "error": None,
        "stream": True,
        "prompt_tokens": 0,
        "cached_tokens": 0,
        "new_tokens": 2,
        "ttft_s": 0,
        "total_s": 0,
        "prompts": [ASK[0]],  # only because http.log_prompts is on
        "answers": [line["answers"][0]],
    }
    assert line["answers"][0].startswith("money ")
    assert 0 < line["ttft_s"] <= line["total_s"]
    assert line["prompt_tokens"] > 0


def test_the_log_has_no_prompts_unless_asked(storage, tokenizer, caplog):
    caplog.set_level(logging.INFO, logger="ftray.access")
    with running(Serving(storage=str(storage)), engine=Engine(), tokenizer=tokenizer) as started:
        body = {"model": "base", "prompt": "my secret", "max_tokens": 2, "logit_bias": {"secret": 1}}
        httpx.post(f"{started.url}/v1/completions", json=body, headers={"x-request-id": "wrong"})
        del body["logit_bias"]
        httpx.post(f"{started.url}/v1/completions", json=body, headers={"x-request-id": "plain"})
    assert {"prompts", "answers"}.isdisjoint(told(caplog, "plain"))
    assert told(caplog, "wrong")["error"] == "invalid_request"
    assert "secret" not in caplog.text


def told(caplog: pytest.LogCaptureFixture, id: str) -> dict[str, Any]:
    """The line comes after the answer, so it may have to be waited for."""
    ends = time.monotonic() + 5
    while time.monotonic() < ends:
        lines = [json.loads(record.message) for record in caplog.records if record.name == "ftray.access"]
        if found := [line for line in lines if line["request_id"] == id]:
            return found[0]
        time.sleep(0.01)
    raise AssertionError(f"no line of {id}")


def test_a_move_that_takes_too_long_says_so(storage, tokenizer):
    with running(Serving(storage=str(storage)), engine=Engine(load_s=5), tokenizer=tokenizer) as started:
        answer = httpx.post(
            f"{started.url}/v1/adapters/load",
            json={"model": "orders@v1"},
            headers={"x-request-timeout-seconds": "0.1"},
        )
        assert answer.status_code == 504
        assert "load took longer than 0.1 s" in answer.json()["error"]["message"]
