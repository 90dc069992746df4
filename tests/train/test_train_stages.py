"""Stages without a cluster: what is checked before the first starts, what is skipped, and which version is the base."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from ftray.config.schema import Run
from ftray.errors import ConfigError, DataError
from ftray.store.paths import Storage
from ftray.store.registry import Registry
from ftray.store.runs import RunFolder
from ftray.train.launch import based
from ftray.train.stages import check_all, train_all

ROWS = "".join(json.dumps({"prompt": f"question {n}", "completion": f"answer {n}"}) + "\n" for n in range(40))
COMPARISON = {"before": {}, "after": {}, "forgetting": None, "gate": {"passed": True, "rules": []}}


@pytest.fixture
def storage(tmp_path):
    return Storage(str(tmp_path / "store"))


@pytest.fixture
def stages(storage, tmp_path):
    """Two runs as a file's stages are; the rows of the second may be given."""

    def make(rows=ROWS):
        found = []
        for name, base, text in (("one", "builtin:tiny", ROWS), ("two", "adapters:one", rows)):
            path = tmp_path / f"{name}.jsonl"
            path.write_text(text, encoding="utf-8")
            run = {"name": name, "storage": storage.root, "model": {"base": base}, "data": {"sources": str(path)}}
            found.append(Run.model_validate({**run, "optim": {"batch_size": 1, "steps": 2}}))
        return found

    return make


def published(storage, name, folder):
    """A version that nobody reads, in a new folder."""
    folder.mkdir()
    save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    return Registry(storage).publish(name, folder, {"base": "builtin:tiny"}, folder.name)


def finish(storage, run, version):
    folder = RunFolder(storage, run.name)
    folder.begin({"run": run.model_dump(mode="json")}, fresh=False)
    folder.set_state(status="done", version=version, report=None, comparison=COMPARISON)


def with_base(run, base):
    return run.model_copy(update={"model": run.model.model_copy(update={"base": base})})


def test_a_mistake_in_the_last_stages_rows_shows_before_the_first_starts(storage, stages):
    with pytest.raises(DataError, match=r"two\.jsonl"):
        train_all(stages(rows='{"neither": "nor"}\n'), as_json=True)
    assert not storage.list("runs")


def test_every_stage_is_checked_though_no_version_is_there_yet(stages):
    first, second = check_all(stages())
    assert (first.run["model"]["base"], second.run["model"]["base"]) == ("builtin:tiny", "adapters:one")
    assert second.plan.fits
    assert second.data.rows_kept == 40


def test_finished_stages_are_skipped_and_the_next_ones_base_is_what_they_left(storage, stages, tmp_path):
    first, second = stages()
    finish(storage, first, published(storage, "one", tmp_path / "run-1").id)
    finish(storage, with_base(second, "adapters:one@v1"), "two@v1")
    published(storage, "one", tmp_path / "by-hand")
    Registry(storage).promote("one@v2")  # no part of this chain
    outcomes = train_all([first, second], as_json=True)
    assert [(one.version, one.resumed) for one in outcomes] == [("one@v1", True), ("two@v1", True)]


def test_another_version_of_the_stage_before_is_another_run(storage, stages, tmp_path):
    first, second = stages()
    published(storage, "one", tmp_path / "run-1")
    finish(storage, first, published(storage, "one", tmp_path / "run-2").id)
    finish(storage, with_base(second, "adapters:one@v1"), "two@v1")
    with pytest.raises(ConfigError, match="adapters:one@v1"):
        train_all([first, second], as_json=True)


def test_a_resumed_run_keeps_the_version_that_it_began_with(storage, stages, tmp_path):
    _, run = stages()
    published(storage, "one", tmp_path / "run-1")
    folder = RunFolder(storage, "two")
    began = based(run, folder)
    assert began.model.base == "adapters:one@v1"
    folder.begin({"run": began.model_dump(mode="json")}, fresh=False)
    published(storage, "one", tmp_path / "run-2")
    assert based(run, folder).model.base == "adapters:one@v1"
    assert based(run, folder, fresh=True).model.base == "adapters:one@v2"
