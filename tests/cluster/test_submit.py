"""`ray job submit` from a folder full of data and caches, to a cluster whose workers are other nodes than the head."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
    done = subprocess.run(
        command, cwd=cluttered_checkout, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "submitted@v1" in done.stdout
    assert (tmp_path / "store/adapters/submitted/v1/adapter_model.safetensors").exists()
    uploads = Path(cluster.head_node.get_session_dir_path(), "runtime_resources/working_dir_files")
    unpacked = [path for path in uploads.rglob("*") if path.is_file()]
    assert any(path.name == "train.py" for path in unpacked)
    assert sum(path.stat().st_size for path in unpacked) < CLUTTER
