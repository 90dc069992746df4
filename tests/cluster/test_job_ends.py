"""How a job ends tells KubeRay whether to try it again: what a user must mend is stopped, what was lost has failed."""

import sys
import time
from pathlib import Path

import pytest
from ray.job_submission import JobSubmissionClient

from ftray.cli.job import ON_USER_ERROR
from ftray.store.paths import Storage
from ftray.store.runs import RunFolder
from tests.cluster.conftest import NODE_CPUS, rows

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[2]
OVER = ("SUCCEEDED", "FAILED", "STOPPED")


@pytest.fixture
def jobs(cluster):
    return JobSubmissionClient(f"http://{cluster.head_node.webui_url}")


def submit(jobs, path):
    """As the manifests' jobs are: a script of the image, a run file that lies there, no upload."""
    return jobs.submit_job(
        entrypoint=f"{sys.executable} {ROOT / 'jobs' / 'train.py'} {path}",
        runtime_env={"env_vars": {ON_USER_ERROR: "stop", "PYTHONPATH": str(ROOT)}},
    )


def ended(jobs, job, timeout_s=240):
    """(status, exit code, log)."""
    end = time.monotonic() + timeout_s
    while (status := jobs.get_job_status(job)) not in OVER:
        assert time.monotonic() < end, jobs.get_job_logs(job)[-3000:]
        time.sleep(0.2)
    return str(status.value), jobs.get_job_info(job).driver_exit_code, jobs.get_job_logs(job)


def test_a_wrong_key_ends_as_stopped_with_its_message_in_the_log(jobs, run_file):
    began = time.monotonic()
    status, code, log = ended(jobs, submit(jobs, run_file(name="typo", method__kind="lora", method__rnak=8)))
    print(f"stopped {time.monotonic() - began:.0f} s after it was submitted")
    assert (status, code) == ("STOPPED", None), log
    assert "method.rnak: unknown key; did you mean 'rank'?" in log


def test_data_that_cannot_be_used_end_as_stopped_with_their_name_in_the_log(jobs, run_file, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    file = run_file(name="wrong", data__sources=[str(tmp_path / "empty.jsonl")])
    status, code, log = ended(jobs, submit(jobs, file))
    assert (status, code) == ("STOPPED", None), log
    assert "empty.jsonl" in log


def test_a_node_lost_once_too_often_ends_as_failed(cluster, jobs, run_file, tmp_path):
    job = submit(jobs, run_file(name="lost", optim__steps=5000, scale__retries=0))
    folder = RunFolder(Storage(str(tmp_path / "store")), "lost")
    end = time.monotonic() + 200
    while not any(row["step"] > 1 for row in rows(folder, "train")):
        assert jobs.get_job_status(job) not in OVER, jobs.get_job_logs(job)[-3000:]
        assert time.monotonic() < end
        time.sleep(0.2)
    [started] = rows(folder, "started")
    cluster.remove_node(
        next(node for node in cluster.list_all_nodes() if node.node_id == started["node"]), allow_graceful=False
    )
    try:
        status, code, log = ended(jobs, job)
    finally:
        cluster.add_node(num_cpus=NODE_CPUS)
    assert (status, code) == ("FAILED", 75), log[-3000:]
    assert "run lost failed once, last with" in log
    print(log[log.index("run lost failed") :])
