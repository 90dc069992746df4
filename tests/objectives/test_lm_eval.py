"""Benchmarks by lm-evaluation-harness in whole runs: tasks of one's own over local files, base and tuned, on one worker
and on two."""

from __future__ import annotations

import json

import pytest
import torch
from run_drill import run_all, run_of, write_base

from ftray.config.schema import Model, Run
from ftray.errors import ConfigError
from ftray.evaluate.compare import Scores, compare
from ftray.models.load import load_frozen
from ftray.train.launch import check

pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")

# no word begins as w1 and w2 do, which are special tokens and found in any text
CHOICES = ["w33", "w36", "w39"]
ROWS = [{"prompt": f"w{3 + n % 7} w{30 + n % 3} w{4 + n % 5}", "answer": CHOICES[n % 7 % 3]} for n in range(30)]
CHOOSING = """
task: choosing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: prompt
doc_to_choice: {choices}
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
SAYING = """
task: saying
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_text: prompt
doc_to_target: answer
generation_kwargs: {{until: ["w1"], max_gen_toks: 3}}
metric_list: [{{metric: exact_match}}]
filter_list:
  - name: first
    filter: [{{function: regex, regex_pattern: "(w[0-9]+)"}}, {{function: take_first}}]
"""
BOTH = """
group: both
task: [choosing, again]
aggregate_metric_list: [{metric: acc}]
"""
VIRTUAL = ("prompt", "prefix")
LM_EVAL = {"tasks": ["both", "saying"], "limit": 21}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    write_base(folder / "base")
    rows = "".join(json.dumps(row) + "\n" for row in ROWS)
    (folder / "rows.jsonl").write_text(rows)
    (folder / "tasks").mkdir()
    again = CHOOSING.replace("task: choosing", "task: again")
    for name, task in {"choosing": CHOOSING, "again": again, "saying": SAYING}.items():
        text = task.format(rows=folder / "rows.jsonl", choices=json.dumps(CHOICES))
        (folder / "tasks" / f"{name}.yaml").write_text(text)
    (folder / "tasks" / "both.yaml").write_text(BOTH)
    return folder


def asked_of(folder, name, method):
    run = run_of(
        folder,
        name,
        {"kind": "sft"},
        method=method,
        data={"eval_fraction": 0.2},
        optim={"steps": 40, "batch_size": 8},
        evaluate={"generate_rows": 0, "lm_eval": {**LM_EVAL, "folder": str(folder / "tasks")}},
    )
    del run["objective"]["max_new_tokens"]
    return run


@pytest.fixture(scope="module")
def measured(folder):
    """Scores before and after by the name of a run; `shared` is `lora` on two workers."""
    methods = {"lora": {"kind": "lora", "rank": 8}} | {kind: {"kind": kind, "tokens": 3} for kind in VIRTUAL}
    logs = run_all(folder, [asked_of(folder, name, method) for name, method in methods.items()])
    logs |= run_all(folder, [asked_of(folder, "shared", methods["lora"])], workers=2)
    kept = {name: {row["kind"]: row for row in rows} for name, rows in logs.items()}
    return {
        name: tuple(Scores.from_json(rows[side]["scores"]) for side in ("before", "after"))
        for name, rows in kept.items()
    }


def right_choices(folder) -> float:
    """The share of rows whose answer is the likeliest of the choices, computed without lm_eval."""
    model = load_frozen(Model(base=str(folder / "base")), dtype=torch.float32, attention="sdpa")
    hits = 0
    for row in ROWS[: LM_EVAL["limit"]]:
        ids = torch.tensor([[int(word[1:]) for word in row["prompt"].split()]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, -1]
        likely = max(CHOICES, key=lambda word: float(logits[int(word[1:])]))
        hits += likely == row["answer"]
    return hits / LM_EVAL["limit"]


def test_base_and_tuned_version_are_scored_and_training_shows(folder, measured):
    before, after = measured["lora"]
    assert before.lm_eval["lm_eval/choosing/acc"] == pytest.approx(right_choices(folder))
    comparison = compare(before, after, ["lm_eval/choosing/acc > base", "lm_eval/saying/exact_match/first > base"])
    assert comparison.passed
    assert comparison.from_json(json.loads(json.dumps(comparison.to_json()))) == comparison


def test_a_group_has_its_score_and_those_of_its_members(measured):
    scores = measured["lora"][0].lm_eval
    accuracies = {f"lm_eval/{task}/acc" for task in ("both", "choosing", "again")}
    assert scores.keys() == accuracies | {"lm_eval/saying/exact_match/first"}
    assert scores["lm_eval/both/acc"] == pytest.approx(scores["lm_eval/choosing/acc"])


def test_workers_share_the_questions_and_score_the_same(measured):
    assert measured["shared"][0].lm_eval == measured["lora"][0].lm_eval
    assert measured["shared"][1].lm_eval["lm_eval/choosing/acc"] > measured["shared"][0].lm_eval["lm_eval/choosing/acc"]


def test_zero_3_is_refused_before_anything_is_placed(folder):
    run = asked_of(folder, "sharded", {"kind": "full"}) | {"scale": {"workers": 2, "cpus_per_worker": 1, "zero": 3}}
    with pytest.raises(ConfigError, match=r"evaluate\.lm_eval\.tasks: under ZeRO 3"):
        check(Run.model_validate(run))


@pytest.mark.parametrize("kind", VIRTUAL)
def test_virtual_tokens_are_left_away_for_the_base(measured, kind):
    before, after = measured[kind]
    assert before.lm_eval == measured["lora"][0].lm_eval
    assert after.lm_eval != before.lm_eval
