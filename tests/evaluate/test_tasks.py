"""What is told of benchmarks before any worker is placed."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import pytest

from ftray.config.schema import Run
from ftray.errors import ConfigError
from ftray.evaluate.tasks import check_benchmarks

OWN = "task: choosing\ndataset_path: json\ntest_split: test\ndoc_to_text: prompt\ndoc_to_target: answer\n"
installed = pytest.mark.skipif(find_spec("lm_eval") is None, reason="the extra lm-eval is not installed")


def problems(gate="auto", **lm_eval):
    run = Run(name="a", data={"sources": "a.jsonl"}, evaluate={"lm_eval": lm_eval, "gate": gate})
    with pytest.raises(ConfigError) as error:
        check_benchmarks(run)
    return dict(error.value.problems)


def test_without_the_extra_the_way_to_it_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    assert "pip install 'ftray[lm-eval]'" in problems(tasks=["arc_easy"])["evaluate.lm_eval.tasks"]


def test_a_gate_on_a_benchmark_that_is_not_asked_is_refused():
    said = problems(gate=["loss < base", "lm_eval/arc_easy/acc >= 0.5"])
    assert "measured by no task of evaluate.lm_eval.tasks" in said["evaluate.gate.1"]


def test_a_run_without_benchmarks_needs_no_extra():
    check_benchmarks(Run(name="a", data={"sources": "a.jsonl"}))


@installed
def test_an_unknown_task_gets_the_near_ones(tmp_path):
    (tmp_path / "own.yaml").write_text(OWN)
    found = problems(tasks=["chosing", "choosing", "arc_esay"], folder=str(tmp_path))
    assert "did you mean 'choosing'" in found["evaluate.lm_eval.tasks.0"]
    assert "'arc_easy'" in found["evaluate.lm_eval.tasks.2"]
    assert len(found) == 2


@installed
def test_a_folder_that_is_not_there_and_a_rule_about_another_task_are_told(tmp_path):
    assert "no folder" in problems(tasks=["arc_easy"], folder=str(tmp_path / "none"))["evaluate.lm_eval.folder"]
    (tmp_path / "own.yaml").write_text(OWN)
    found = problems(tasks=["choosing"], folder=str(tmp_path), gate=["lm_eval/chosing/acc > base"])
    assert list(found) == ["evaluate.gate.0"]
    assert "did you mean lm_eval/choosing/<metric>?" in found["evaluate.gate.0"]


@installed
def test_a_task_that_two_names_ask_for_and_a_group_that_holds_itself_are_told(tmp_path):
    (tmp_path / "own.yaml").write_text(OWN)
    (tmp_path / "most.yaml").write_text("group: most\ntask: [choosing]\n")
    (tmp_path / "loop.yaml").write_text("group: loop\ntask: [around]\n")
    (tmp_path / "around.yaml").write_text("group: around\ntask: [loop]\n")
    found = problems(tasks=["most", "choosing"], folder=str(tmp_path))
    assert found == {"evaluate.lm_eval.tasks.1": "choosing is of 'most' too; leave one out"}
    assert "'loop' holds itself" in problems(tasks=["loop"], folder=str(tmp_path))["evaluate.lm_eval.tasks"]


@installed
def test_a_rule_may_be_about_a_group_that_sums_up_and_about_the_members_of_any(tmp_path):
    for name in ("first", "second", "third", "other"):
        tag = "tag: some\n" if name == "third" else ""
        (tmp_path / f"{name}.yaml").write_text(OWN.replace("choosing", name) + tag)
    (tmp_path / "sums.yaml").write_text(
        "group: sums\ntask: [first, {group: inner, task: [second]}, some]\naggregate_metric_list: [{metric: acc}]\n"
    )
    (tmp_path / "lists.yaml").write_text("group: lists\ntask: [other]\n")
    asked = {"tasks": ["sums", "lists"], "folder": str(tmp_path)}
    rules = [f"lm_eval/{name}/acc > base" for name in ("sums", "first", "second", "third", "other")]
    evaluate = {"lm_eval": asked, "gate": rules}
    check_benchmarks(Run(name="a", data={"sources": "a.jsonl"}, evaluate=evaluate))
    found = problems(**asked, gate=[f"lm_eval/{name}/acc > base" for name in ("lists", "some", "fourth")])
    assert found["evaluate.gate.0"].endswith("its tasks: other; name one of them")
    assert found["evaluate.gate.1"].endswith("its tasks: third; name one of them")
    assert "name 'fourth' there too" in found["evaluate.gate.2"]
