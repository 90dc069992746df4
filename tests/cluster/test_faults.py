"""Processes and nodes are killed for real; every run must end where an undisturbed one does."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import ray

from ftray.config.load import load_run
from ftray.errors import StorageError, TrainError
from ftray.store.checkpoints import Checkpoints
from ftray.store.paths import Storage
from ftray.store.registry import Registry
from ftray.store.runs import RunFolder
from ftray.train.progress import Events, Follower
from tests.cluster.conftest import NODE_CPUS, Live, curve, repeated, rows

pytestmark = pytest.mark.ray

INTERVAL = 5


def same_curve(folder, undisturbed):
    assert curve(folder) == pytest.approx(undisturbed, abs=1e-5)


def test_a_killed_worker_costs_at_most_one_interval(cluster, run_file, undisturbed):
    live = Live(load_run(run_file()))
    live.wait_for_step(12)
    killed = time.monotonic()
    os.kill(live.rows("started")[0]["pid"], signal.SIGKILL)
    live.wait_for(lambda: len(live.rows("started")) > 1)
    print(f"worker: training again after {time.monotonic() - killed:.0f} s")
    live.end()
    assert live.rows("started")[1]["resumed"]
    assert repeated(live.folder) <= INTERVAL
    same_curve(live.folder, undisturbed)


def test_a_killed_node_costs_at_most_one_interval(cluster, run_file, undisturbed):
    live = Live(load_run(run_file()))
    live.wait_for_step(12)
    node_id = live.rows("started")[0]["node"]
    node = next(node for node in cluster.list_all_nodes() if node.node_id == node_id)
    killed = time.monotonic()
    cluster.remove_node(node, allow_graceful=False)
    try:
        live.wait_for(lambda: len(live.rows("started")) > 1, timeout_s=200)
        print(f"node: training again after {time.monotonic() - killed:.0f} s")
        live.end()
    finally:
        cluster.add_node(num_cpus=NODE_CPUS)
    assert live.rows("started")[1]["node"] != node_id
    assert repeated(live.folder) <= INTERVAL
    same_curve(live.folder, undisturbed)


def test_the_log_goes_on_after_the_process_that_passes_it_on_was_killed(cluster, tmp_path):
    class Told(Events):
        def pid(self):
            return os.getpid()

    events = ray.remote(num_cpus=0, max_restarts=-1)(Told).remote()
    folder = RunFolder(Storage(str(tmp_path)), "log")
    folder.begin({}, fresh=True)
    with Follower(events, folder, sinks=[]):
        os.kill(ray.get(events.pid.remote()), signal.SIGKILL)
        end = time.monotonic() + 60
        while not rows(folder, "phase"):
            events.put.remote({"kind": "phase", "text": "after"})
            assert time.monotonic() < end
            time.sleep(0.2)


def test_after_a_killed_driver_a_run_resumes_from_its_newest_complete_checkpoint_on_more_workers(
    cluster, run_file, undisturbed
):
    path = run_file()
    run = load_run(path)
    command = [sys.executable, "-m", "ftray.cli", "train", str(path), f"scale.address={cluster.address}"]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    live = None
    folder = RunFolder(_storage(run), run.name)
    end = time.monotonic() + 150
    while not any(row["step"] >= 12 for row in rows(folder, "train")):
        assert driver.poll() is None, driver.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.1)
    killed = time.monotonic()
    driver.kill()
    driver.wait()
    # its workers live a moment longer, in which they may still complete a checkpoint
    writer, end = rows(folder, "started")[0]["pid"], time.monotonic() + 60
    while psutil.pid_exists(writer):
        assert time.monotonic() < end
        time.sleep(0.1)

    # what a death in the middle of writing leaves: a newer folder without a marker, and one whose part was cut
    checkpoints = Checkpoints(folder.storage, run.name)
    good, *_ = checkpoints.complete()
    storage = folder.storage
    part = good.files[0].name
    data = storage.read_bytes(f"{good.folder}/{part}")
    storage.write_bytes(f"{checkpoints.folder(good.step + 1, 'half')}/{part}", data[: len(data) // 2])

    live = Live(load_run(path, ["scale.workers=3"]))
    live.wait_for(lambda: len(rows(folder, "started")) > 1)
    print(f"driver: training again after {time.monotonic() - killed:.0f} s")
    outcome = live.end()
    assert outcome.resumed
    assert rows(folder, "started")[1]["step"] == good.step
    assert repeated(folder) <= INTERVAL
    same_curve(folder, undisturbed)


def test_a_driver_that_is_asked_to_stop_leaves_a_checkpoint_of_that_step(cluster, run_file):
    path = run_file(optim__steps=5000, scale__checkpoint_every=100_000)
    run = load_run(path)
    folder = RunFolder(_storage(run), run.name)
    stops = []
    for start in range(1, 3):  # the second start goes on where the first was stopped
        command = [sys.executable, "-m", "ftray.cli", "train", str(path), f"scale.address={cluster.address}"]
        driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        end = time.monotonic() + 150
        while len(rows(folder, "started")) < start or max(curve(folder), default=0) < sum(stops) + 5:
            assert driver.poll() is None, driver.stderr.read()
            assert time.monotonic() < end
            time.sleep(0.1)
        driver.terminate()
        assert driver.wait(60) == 143, driver.stderr.read()
        stops = [row["step"] for row in rows(folder, "stopped")]
        assert f"stopped after step {stops[-1]}; the same command resumes it" in driver.stderr.read()
        assert folder.state()["status"] == "stopped"
    assert [row["step"] for row in rows(folder, "started")] == [0, stops[0]]
    assert stops[0] < stops[1] < 5000
    assert not repeated(folder), "no step is made twice"


def test_a_checkpoint_that_cannot_be_uploaded_costs_only_itself(cluster, run_file, undisturbed):
    run = load_run(run_file())
    blocked = _storage(run).local_path(f"runs/{run.name}/checkpoints")
    live = Live(run)
    live.wait_for(lambda: blocked.parent.joinpath("resolved.json").exists())
    blocked.write_text("in the way")
    live.wait_for(lambda: live.rows("warning"))
    blocked.unlink()
    live.end()
    assert "no checkpoint after step 5" in live.rows("warning")[0]["text"]
    assert [row["step"] for row in live.rows("checkpoint")][-1] == 30
    same_curve(live.folder, undisturbed)


def test_a_full_disk_stops_the_run_with_one_message_and_keeps_what_was(cluster, run_file, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.decode().strip()}")
    try:
        run = load_run(run_file(storage=str(small), method__kind="full", optim__lr=1e-3, scale__keep_checkpoints=1))
        with pytest.raises(StorageError, match=r"(?i)disk full|no space"):
            Live(run).end()
        assert RunFolder(_storage(run), run.name).state()["status"] == "failed"
        assert Checkpoints(_storage(run), run.name).newest().step >= INTERVAL
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_a_loss_that_is_not_a_number_names_the_step_and_its_rows(cluster, run_file):
    run = load_run(run_file(optim__lr=1e30, optim__schedule="constant", optim__warmup=0))
    with pytest.raises(TrainError, match=r"step \d+: the \w+ is not a number; rows of the batch: .*train\.jsonl:\d+"):
        Live(run).end()
    assert Registry(_storage(run)).names() == []


@pytest.mark.slow
def test_a_frozen_worker_leaves_the_others_stacks_and_the_run_goes_on(cluster, run_file, undisturbed):
    live = Live(load_run(run_file(scale__hang_timeout_s=12)))
    live.wait_for_step(7)
    os.kill(live.rows("started")[0]["pid"], signal.SIGSTOP)
    live.end()
    stacks = live.folder.storage.list(f"{live.folder.key}/stacks")
    assert stacks
    # The others wait in a step, for the gradients of the frozen one or for its part of a checkpoint.
    assert " in _step\n" in live.folder.storage.read_bytes(f"{live.folder.key}/stacks/{stacks[0]}").decode()
    same_curve(live.folder, undisturbed)


def _storage(run):
    return Storage(run.storage)


def test_a_node_that_is_taken_away_with_notice_costs_a_step_or_two(cluster, run_file, monkeypatch):
    """No checkpoint is due for a thousand steps: what saves the run is the one that the notice brings."""
    import ray
    from ray.core.generated import autoscaler_pb2

    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    live = Live(load_run(run_file(optim__steps=400, scale__checkpoint_every=1000)))
    live.wait_for_step(5)
    node_id = live.rows("started")[0]["node"]
    node = next(node for node in cluster.list_all_nodes() if node.node_id == node_id)
    noticed = time.monotonic()
    gcs = ray._raylet.GcsClient(address=cluster.address)
    reason = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
    accepted, why = gcs.drain_node(node_id, reason, "spot", int((time.time() + 60) * 1000))
    assert accepted, why
    try:
        saved = live.wait_for(lambda: live.rows("checkpoint"), timeout_s=50)[0]["step"]
        print(f"notice: checkpoint complete after {time.monotonic() - noticed:.0f} s, at step {saved}")
        assert saved < 400
        cluster.remove_node(node, allow_graceful=False)
        live.wait_for(lambda: len(live.rows("started")) > 1, timeout_s=200)
        print(f"notice: training again after {time.monotonic() - noticed:.0f} s")
        assert live.rows("started")[1]["step"] == saved
    finally:
        cluster.add_node(num_cpus=NODE_CPUS)
    assert live.end().version == "faults@v1"
