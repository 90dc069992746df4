"""One Ray cluster for every test that needs one: a head without CPUs and two nodes, all on this machine."""

import logging
import os
import socket
import threading
import time
from dataclasses import dataclass, field

import pytest
from files_here import run_writer, sweep_writer

from tests.small_base import write_small_base

NODE_CPUS = 2


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="session")
def cluster():
    import ray
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray spells it so
    # A lost node is noticed in seconds here; Ray's own limits are for wide networks.
    quick = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000, "health_check_failure_threshold": 3}
    made = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "include_dashboard": True,
            "dashboard_port": free_port(),
            "dashboard_agent_listen_port": free_port(),  # the usual one may be another cluster's
            "_system_config": quick,
        },
    )
    # Connected while the head is alone: a driver joins any node of its address, and one of the others will be killed.
    ray.init(address=made.address, log_to_driver=False, logging_level=logging.ERROR)
    for _ in range(2):
        made.add_node(num_cpus=NODE_CPUS)
    made.wait_for_nodes()
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture(scope="session")
def small_base(tmp_path_factory):
    return write_small_base(tmp_path_factory.mktemp("base") / "small")


@pytest.fixture(scope="session")
def orders(tmp_path_factory):
    """The sample task's rows as files."""
    from ftray.data.sample import write_sample

    folder = tmp_path_factory.mktemp("orders")
    write_sample(folder, train_rows=400, eval_rows=20)
    return folder


@pytest.fixture
def run_file(small_base, orders, tmp_path):
    """Writes a run file; keyword arguments are dotted keys with __ for the dot."""
    return run_writer(small_base, orders, tmp_path)


@pytest.fixture
def sweep_file(run_file, tmp_path):
    """Writes a sweep file over a small run; keyword arguments are its keys. Each trial trains alone unless it says."""
    return sweep_writer(run_file, tmp_path)


@dataclass
class Live:
    """A run that goes on in a thread of this process."""

    run: object
    fresh: bool = False
    outcome: object = None
    error: BaseException | None = None
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self):
        from ftray.store.paths import Storage
        from ftray.store.runs import RunFolder

        self.folder = RunFolder(Storage(self.run.storage), self.run.name)
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self):
        from ftray.train.launch import train

        try:
            self.outcome = train(self.run, fresh=self.fresh, as_json=True)
        except BaseException as error:  # handed to the test's thread
            self.error = error

    def rows(self, kind):
        return rows(self.folder, kind)

    def wait_for(self, what, timeout_s=120):
        """Until `what()` is true; the run's own error comes out here."""
        end = time.monotonic() + timeout_s
        while not (found := what()):
            if self.error is not None:
                raise self.error
            assert time.monotonic() < end, f"not seen in {timeout_s} s"
            time.sleep(0.1)
        return found

    def wait_for_step(self, step, timeout_s=120):
        self.wait_for(lambda: any(row["step"] >= step for row in self.rows("train")), timeout_s)

    def end(self, timeout_s=240):
        self.thread.join(timeout_s)
        assert not self.thread.is_alive(), f"still running after {timeout_s} s"
        if self.error is not None:
            raise self.error
        return self.outcome


def rows(folder, kind):
    """Every row of a kind, repeated steps included."""
    return [row for row in folder._rows() if row["kind"] == kind]


def curve(folder):
    """Loss by step, the last report of each."""
    return {row["step"]: row["loss"] for row in folder.metrics() if row["kind"] == "train"}


def repeated(folder):
    """How many steps were made more than once."""
    steps = [row["step"] for row in rows(folder, "train")]
    return len(steps) - len(set(steps))


@pytest.fixture(scope="session")
def undisturbed(cluster, small_base, orders, tmp_path_factory):
    """The loss curve of the run that the fault tests disturb."""
    from ftray.config.load import load_run

    tmp_path = tmp_path_factory.mktemp("undisturbed")
    path = run_writer(small_base, orders, tmp_path)(name="undisturbed")
    live = Live(load_run(path))
    outcome = live.end()
    assert outcome.version == "undisturbed@v1"
    return curve(live.folder)
