"""A file with stages: what each becomes, and where a mistake in one is told."""

from __future__ import annotations

import pytest

from ftray.config.load import load_run, load_runs
from ftray.errors import ConfigError

FILE = """
name: coffee
model: {base: some/base, revision: abc, dtype: fp32}
data: {sources: rows.jsonl, max_length: 512}
method: {kind: lora, rank: 4}
optim: {lr: 1e-3, batch_size: 8}
stages:
  - objective: {kind: pretrain}
    data: {sources: menus.txt}
  - name: coffee-orders
    optim: {lr: 1e-4}
    method: {rank: 8}
  - method: {kind: full}
    evaluate: {gate: [loss < base, forgetting < 1]}
"""


def written(folder, text):
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(folder, text, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_runs(written(folder, text), overrides)
    return dict(caught.value.problems)


def test_each_stage_is_a_run_from_the_version_of_the_one_before(tmp_path):
    runs = load_runs(written(tmp_path, FILE))
    assert [run.name for run in runs] == ["coffee-1", "coffee-orders", "coffee-3"]
    assert [run.model.base for run in runs] == ["some/base", "adapters:coffee-1", "adapters:coffee-orders"]
    assert [run.model.revision for run in runs] == ["abc", None, None]
    assert {run.model.dtype for run in runs} == {"fp32"}


def test_a_stage_changes_keys_of_a_section_and_another_kind_replaces_it(tmp_path):
    first, second, third = load_runs(written(tmp_path, FILE))
    assert (first.data.sources[0].path, first.data.max_length) == ("menus.txt", 512)
    assert (second.optim.lr, second.optim.batch_size, second.method.rank) == (1e-4, 8, 8)
    assert (third.method.kind, third.optim.lr) == ("full", 1e-3)
    assert first.method.rank == 4


def test_overrides_reach_what_all_share_and_single_stages(tmp_path):
    first, second, _ = load_runs(written(tmp_path, FILE), ["optim.batch_size=4", "stages.0.optim.lr=5e-4"])
    assert (first.optim.lr, first.optim.batch_size) == (5e-4, 4)
    assert (second.optim.lr, second.optim.batch_size) == (1e-4, 4)


def test_a_file_without_stages_is_one_run(tmp_path):
    path = written(tmp_path, "name: a\ndata: {sources: rows.jsonl}\n")
    assert load_runs(path, ["optim.lr=1"]) == [load_run(path, ["optim.lr=1"])]


def test_every_mistake_is_told_once_where_it_stands(tmp_path):
    text = FILE.replace("rank: 8", "rnak: 8").replace("batch_size: 8", "batch_sise: 8").replace("1e-4", "-1")
    assert problems(tmp_path, text) == {
        "optim.batch_sise": "unknown key; did you mean 'batch_size'? (line 6)",
        "stages.1.method.rnak": "unknown key; did you mean 'rank'? (line 12)",
        "stages.1.optim.lr": "must be greater than 0, or 'auto' (line 11)",
    }


@pytest.mark.parametrize(
    ("stages", "key", "told"),
    [
        ("[]", "stages", "expected a list of sections"),
        ("{objective: {kind: sft}}", "stages", "expected a list of sections"),
        ("[sft]", "stages.0", "expected keys of a run"),
        ("[{model: {base: b}}]", "stages.0.model", "the first one's stands at the top"),
        ("[{metod: {kind: full}}]", "stages.0.metod", "did you mean 'method'?"),
        ("[{name: a}, {name: a}]", "stages.1.name", "'a' is an earlier stage's"),
        ("[{name: A}]", "stages.0.name", "'A' is not a name"),
    ],
)
def test_stages_that_are_none_are_refused(tmp_path, stages, key, told):
    found = problems(tmp_path, f"name: a\ndata: {{sources: rows.jsonl}}\nstages: {stages}\n")
    assert told in found[key]


def test_where_one_run_is_meant_stages_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="here one run is meant"):
        load_run(written(tmp_path, FILE))


@pytest.mark.parametrize("base", ["adapters:", "adapters:Coffee", "adapters:a@", "adapters:a@v1@v2", "adapters:a/b"])
def test_a_base_that_names_no_version_is_refused(tmp_path, base):
    text = f"name: a\nmodel: {{base: '{base}'}}\ndata: {{sources: rows.jsonl}}\n"
    assert "write adapters:name, adapters:name@v2" in problems(tmp_path, text)["model.base"]


def test_a_revision_beside_a_version_is_refused(tmp_path):
    text = "name: a\nmodel: {base: 'adapters:b@v1', revision: abc}\ndata: {sources: rows.jsonl}\n"
    assert "say the version in the base, adapters:b@v1" in problems(tmp_path, text)["model.revision"]
