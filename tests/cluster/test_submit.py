"""`ray job submit` and `ftray submit` to a cluster whose workers are other nodes than the head."""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import openai
import psutil
import pytest

from tests.cluster.conftest import free_port
from tests.cluster.own_cluster import OwnCluster
from tests.cluster.serving_cluster import deployments, wait_until_ready

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[2]
CLUTTER = 40 * 2**20


@pytest.fixture
def cluttered_checkout(tmp_path):
    """A checkout as a user has it: the project's files, and heavy folders that git ignores."""
    checkout = tmp_path / "checkout"
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in names.splitlines():
        if (ROOT / name).is_file():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, checkout / name)
    for folder in ("data", "ftray-store/runs", ".venv/lib"):
        (checkout / folder).mkdir(parents=True)
        (checkout / folder / "heavy.bin").write_bytes(os.urandom(CLUTTER))
    return checkout


def test_a_submitted_job_trains_on_the_nodes_and_uploads_little(cluster, cluttered_checkout, run_file, tmp_path):
    path = cluttered_checkout / "jobs" / "runs" / "submitted.yaml"
    shutil.copy(run_file(name="submitted", optim__steps=4, scale__checkpoint_every=2), path)
    ray = Path(sys.executable).with_name("ray")
    address = f"http://{cluster.head_node.webui_url}"
    command = [str(ray), "job", "submit", "--address", address, "--working-dir", "."]
    command += ["--", sys.executable, "jobs/train.py", "jobs/runs/submitted.yaml"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    for _ in range(30):
        done = subprocess.run(
            command, cwd=cluttered_checkout, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        if "No available agent" not in done.stderr:  # the cluster is too young to take jobs
            break
        time.sleep(1)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "submitted@v1" in done.stdout
    assert (tmp_path / "store/adapters/submitted/v1/adapter_model.safetensors").exists()
    uploads = Path(cluster.head_node.get_session_dir_path(), "runtime_resources/working_dir_files")
    unpacked = [path for path in uploads.rglob("*") if path.is_file()]
    assert any(path.name == "train.py" for path in unpacked)
    assert sum(path.stat().st_size for path in unpacked) < CLUTTER


@pytest.fixture
def away(tmp_path, monkeypatch, orders):
    """A folder that is not on the cluster, with a run's data; the current one."""
    folder = tmp_path / "away"
    (folder / "rows").mkdir(parents=True)
    shutil.copy(orders / "train.jsonl", folder / "rows")
    monkeypatch.chdir(folder)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return folder


def ftray(cluster, *words, python=False):
    from ftray.cli import main

    more = ["--python", sys.executable] if python else []
    return main([*words, "--address", f"http://{cluster.head_node.webui_url}", *more])


def test_a_run_is_submitted_from_elsewhere_followed_and_listed(cluster, away, run_file, capfd):
    file = run_file(name="sent", data__sources=["rows/train.jsonl"], optim__steps=4, scale__checkpoint_every=2)
    shutil.move(file, away / "run.yaml")
    assert ftray(cluster, "submit", "run.yaml", "optim.lr=1e-3", python=True) == 0
    told = capfd.readouterr()
    assert "sent@v1" in told.out
    assert "ftray jobs stop sent-train-" in told.err
    assert ftray(cluster, "submit", "run.yaml", "optim.lr=1e-3", python=True) == 0  # by its name: it is finished
    assert "is finished" in capfd.readouterr().out
    assert ftray(cluster, "jobs", "list", "--json") == 0
    ours = [job for job in json.loads(capfd.readouterr().out) if job["run"] == "sent"]
    assert [(job["status"], job["code"]) for job in ours] == [("SUCCEEDED", 0)] * 2
    assert ftray(cluster, "jobs", "logs", "sent") == 0
    assert "is finished" in capfd.readouterr().out


def test_an_error_of_the_user_comes_back_with_its_message_and_code(cluster, away, run_file, capfd):
    (away / "rows" / "empty.jsonl").write_text("")
    shutil.move(run_file(name="wrong", data__sources=["rows/empty.jsonl"]), away / "run.yaml")
    assert ftray(cluster, "submit", "run.yaml", python=True) == 2
    told = capfd.readouterr()
    assert "empty.jsonl" in told.out
    assert "FAILED" in told.err


def test_a_job_that_goes_on_is_not_submitted_again_and_can_be_stopped_by_its_run(cluster, away, run_file, capfd):
    shutil.move(run_file(name="endless", data__sources=["rows/train.jsonl"], optim__steps=5000), away / "run.yaml")
    ids = []
    for _ in range(2):
        assert ftray(cluster, "submit", "run.yaml", "--no-wait", "--json", python=True) == 0
        ids.append(json.loads(capfd.readouterr().out)["job"])
    assert ids[0] == ids[1]
    assert ftray(cluster, "jobs", "stop", "endless") == 0
    assert "STOPPED" in capfd.readouterr().out
    end = time.monotonic() + 20
    while left := processes_of(ids[0]):
        assert time.monotonic() < end, left
        time.sleep(0.2)


def processes_of(job):
    """Those that Ray started for a job, and theirs."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if job in process.environ().get("RAY_JOB_CONFIG_JSON_ENV_VAR", ""):
                found.append((process.pid, process.cmdline()))
    return found


def test_a_sweep_is_submitted_with_the_run_it_varies(cluster, away, run_file, capfd):
    (away / "runs").mkdir()
    file = run_file(name="varied", data__sources=["rows/train.jsonl"], optim__steps=3, scale__workers=1)
    shutil.move(file, away / "runs" / "varied.yaml")
    sweep = {"name": "variants", "run": "runs/varied.yaml", "space": {"method.rank": [2, 4]}, "trials": 2}
    (away / "sweep.yaml").write_text(json.dumps(sweep))
    assert ftray(cluster, "submit", "sweep.yaml", python=True) == 0
    told = capfd.readouterr()
    assert "varied@v1" in told.out
    assert "ftray jobs stop variants-sweep-" in told.err


def test_a_server_is_submitted_answers_and_goes_with_its_job(cluster, away, small_base, tmp_path, capfd):
    url = f"http://127.0.0.1:{free_port()}"
    serving = {
        "name": "submitted",
        "storage": str(tmp_path / "store"),
        "model": {"base": str(small_base)},
        "http": {"port": int(url.rpartition(":")[2])},
    }
    (away / "serve.yaml").write_text(json.dumps(serving))
    assert ftray(cluster, "submit", "serve.yaml", "--no-wait", python=True) == 0
    wait_until_ready(url, replicas=1)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    answer = client.completions.create(model="base", prompt="two lattes", max_tokens=4)
    assert answer.usage.completion_tokens == 4
    capfd.readouterr()
    assert ftray(cluster, "jobs", "stop", "submitted") == 0
    end = time.monotonic() + 60
    while deployments(cluster, "submitted"):
        assert time.monotonic() < end
        time.sleep(0.5)


def test_with_a_token_a_run_goes_to_two_of_three_workers_and_a_stranger_is_refused(away, run_file, tmp_path):
    file = run_file(
        name="guarded", data__sources=["rows/train.jsonl"], optim__steps=3, scale__workers=2, scale__cpus_per_worker=1
    )
    shutil.move(file, away / "run.yaml")
    (tmp_path / "own").mkdir()
    own = OwnCluster(tmp_path / "own", workers=3, cpus=1)
    try:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_A", "RAY_J"))}
        command = [sys.executable, "-m", "ftray.cli", "submit", "run.yaml", "--address", own.dashboard]
        command += ["--python", sys.executable]
        stranger = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=120, check=False)
        assert (stranger.returncode, "RAY_AUTH_TOKEN" in stranger.stderr) == (2, True), stranger.stderr
        done = subprocess.run(command, env=clean | own.token, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
        assert "guarded@v1" in done.stdout
        assert own.secret not in done.stdout + done.stderr
    finally:
        own.close()
