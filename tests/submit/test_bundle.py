"""What is sent to a cluster: the file, the data beside it and ftray, and nothing else."""

import json
from pathlib import Path

import pytest

from ftray.config.load import load_run
from ftray.errors import ClusterError, ConfigError
from ftray.submit import bundle
from ftray.submit.client import Jobs


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("data/a.jsonl", "data/b.jsonl", "secret.txt"):
        (tmp_path / name).write_text("{}\n")
    return tmp_path


def run_file(**keys):
    tree = {"name": "coffee", "storage": "s3://models/ftray", "data": {"sources": ["data/*.jsonl"]}} | keys
    Path("run.yaml").write_text(json.dumps(tree))
    return "run.yaml"


def wanted(file, *overrides, command=None):
    return bundle.wanted(file, overrides, command=command, root=Path.cwd())


def test_only_the_file_its_data_and_ftray_are_sent(folder):
    job = wanted(run_file())
    with bundle.bundled(job, folder) as sent:
        names = {str(path.relative_to(sent)) for path in sent.rglob("*") if path.is_file()}
        assert load_run(sent / "run.yaml").name == "coffee"
        assert "run('train')" in (sent / "job.py").read_text().replace('"', "'")
    own = {name for name in names if not name.startswith("ftray/")}
    assert own == {"job.py", "run.yaml", "data/a.jsonl", "data/b.jsonl"}
    assert "ftray/cli/job.py" in names
    assert not [name for name in names if "__pycache__" in name]
    assert not sent.exists()


def test_an_override_names_data_too(folder):
    assert wanted(run_file(), "data.sources=data/a.jsonl").files == ("run.yaml", "data/a.jsonl")


def test_what_the_cluster_has_stays_there(folder):
    job = wanted(run_file(data={"sources": ["s3://rows/a.jsonl", "/mnt/rows.jsonl", "builtin:orders", "some/hub-set"]}))
    assert job.files == ("run.yaml",)


def test_the_kind_of_file_says_what_to_do(folder):
    assert wanted(run_file()).command == "train"
    assert wanted(run_file(), command="evaluate").command == "evaluate"
    Path("serve.yaml").write_text("storage: s3://models/ftray\n")
    assert wanted("serve.yaml").command == "serve"
    Path("sweep.yaml").write_text("name: search\nrun: run.yaml\nspace: {optim.lr: [1.0e-4, 1.0e-3]}\n")
    sweep = wanted("sweep.yaml")
    assert (sweep.command, sweep.name, sweep.files[:2]) == ("sweep", "search", ("sweep.yaml", "run.yaml"))


def test_a_storage_that_only_the_job_would_see_is_refused(folder):
    with pytest.raises(ConfigError, match=r"storage: \./ftray-store would be a folder of the job alone"):
        wanted(run_file(storage="./ftray-store"))
    assert wanted(run_file(storage="./ftray-store"), "storage=gs://models").name == "coffee"


def test_a_file_outside_the_folder_is_refused(folder, monkeypatch):
    file = str(Path(run_file()).resolve())
    monkeypatch.chdir(folder / "data")
    with pytest.raises(ConfigError, match="submit from the folder that holds it"):
        wanted(file)


def test_too_much_is_refused_before_anything_is_sent(folder, monkeypatch):
    monkeypatch.setattr(bundle, "LIMIT_BYTES", 1000)
    with (
        pytest.raises(ConfigError, match=r"MiB to upload, .* the largest; a cluster takes 100"),
        bundle.bundled(wanted(run_file()), folder),
    ):
        pass


def test_an_address_is_asked_for(monkeypatch):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ConfigError, match="say --address http://HOST:8265"):
        Jobs(None)


def test_a_cluster_that_does_not_answer_is_an_error_with_a_way_out():
    with pytest.raises(ClusterError, match="kubectl port-forward"):
        Jobs("http://127.0.0.1:9")
