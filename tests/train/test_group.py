"""What a run says, and how its command ends, when Ray has tried often enough."""

import os

import pytest
import ray.util

from ftray.config.schema import Run
from ftray.errors import Lost, TrainError
from ftray.train.group import _last_words
from ftray.train.meeting import INTERFACE, interface_of, name_interface

RUN = Run.model_validate({"name": "r", "data": {"sources": ["rows.jsonl"]}, "scale": {"retries": 2}})


@pytest.mark.parametrize("reason", ["A worker health check failed.", "The node was preempted."])
def test_a_run_that_lost_its_nodes_may_go_through_when_tried_again(reason):
    ended = _last_words(RUN, RuntimeError(reason))
    assert (type(ended), ended.exit_code) == (Lost, 75)
    assert f"run r failed 3 times, last with: {reason}" in str(ended)


@pytest.mark.parametrize("reason", ["CUDA out of memory. Tried to allocate 2 GiB", "Task was killed: OutOfMemoryError"])
def test_too_little_memory_is_too_little_again(reason):
    ended = _last_words(RUN, RuntimeError(reason))
    assert (type(ended), ended.exit_code) == (TrainError, 2)
    assert "lower optim.micro_batch_size or data.max_length" in str(ended)


def test_of_an_error_on_a_worker_its_last_line_is_told():
    trace = ["ray::execute._setup()  (pid=7, ip=10.0.0.2)", '  File "config.py", line 153', "RuntimeError: refused"]
    assert "last with: RuntimeError: refused" in str(_last_words(RUN, RuntimeError("\n".join(trace))))


def test_gloo_is_told_the_interface_that_ray_reaches_the_node_by(monkeypatch):
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.9") is None
    wanted = interface_of(ray.util.get_node_ip_address())
    assert wanted is not None
    monkeypatch.setenv(INTERFACE, "mine0")
    name_interface()
    assert os.environ[INTERFACE] == "mine0"
    monkeypatch.delenv(INTERFACE)
    name_interface()
    assert os.environ[INTERFACE] == wanted
