"""What a run says, and how its command ends, when Ray has tried often enough."""

import pytest

from ftray.config.schema import Run
from ftray.errors import Lost, TrainError
from ftray.train.group import _last_words

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
