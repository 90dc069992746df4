"""A run with a range of workers shrinks with its cluster and grows again, and learns what a fixed one learns."""

import os
import signal
import time

import pytest

from ftray.config.load import load_run
from ftray.train import group
from tests.cluster.conftest import NODE_CPUS, Live, curve

pytestmark = [pytest.mark.ray, pytest.mark.slow]

LONG = {"optim__steps": 100, "optim__batch_size": 48}
SEEN_S = 25  # after which Ray Train has seen a new node


def sizes(live):
    return [row["workers"] for row in live.rows("started")]


def test_from_three_workers_to_two_and_back_the_curve_is_that_of_three(cluster, run_file, monkeypatch):
    fixed = Live(load_run(run_file("fixed", **LONG, scale__workers=3)))
    fixed.end()
    monkeypatch.setattr(group, "RESIZE_S", 2.0)
    live = Live(load_run(run_file("elastic", **LONG, scale__workers=[2, 3])))
    live.wait_for_step(8)
    home = live.rows("started")[0]["node"]
    node = next(node for node in cluster.list_all_nodes() if node.node_id == home)
    cluster.remove_node(node, allow_graceful=False)
    try:
        live.wait_for(lambda: len(sizes(live)) > 1, timeout_s=200)
    finally:
        cluster.add_node(num_cpus=NODE_CPUS)
    # the two stand still meanwhile: on a fast machine they would be done before
    writer = live.rows("started")[-1]["pid"]
    os.kill(writer, signal.SIGSTOP)
    try:
        time.sleep(SEEN_S)
    finally:
        os.kill(writer, signal.SIGCONT)
    live.end()
    assert sizes(live) == [3, 2, 3]
    assert curve(live.folder) == pytest.approx(curve(fixed.folder), abs=1e-4)
