"""Benchmarks by lm-evaluation-harness in whole runs: tasks of one's own over local files, base and tuned, on one worker
and on two."""

from __future__ import annotations

import json
import random
import time
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.distributed as dist
from run_drill import run_all, run_of, write_base

from ftray.config.schema import LmEval, Model, Run
from ftray.errors import ConfigError, TrainError
from ftray.evaluate.compare import Scores, compare
from ftray.models.load import load_frozen, load_tokenizer
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
OWN = """
import time
from pathlib import Path
import torch.distributed as dist
from datasets import Dataset

def rows(**keys):
    began = time.monotonic()
    time.sleep(2.5)
    Path(__file__).with_name("fetched").write_text(f"{began} {time.monotonic()}")
    return {"test": Dataset.from_list([{"prompt": "w5 w31", "answer": 0}])}

def lost(**keys):
    dist.destroy_process_group()
    return {"test": Dataset.from_list([{"prompt": "w5 w31", "answer": 0}])}

def failing(doc, results):
    return {"acc": doc["colour"]}
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


@pytest.fixture
def benchmarked(folder, tmp_path):
    """Scores of a task that is told as its file, in a process group of one."""
    from ftray.evaluate.benchmarks import benchmarks

    base = Model(base=str(folder / "base"))
    frozen = load_frozen(base, dtype=torch.float32, attention="sdpa")
    (tmp_path / "own.py").write_text(OWN)

    def measured(task, *, beat=lambda: None, model=frozen):
        (tmp_path / "choosing.yaml").write_text(task)
        asked = LmEval(tasks=["choosing"], folder=str(tmp_path), limit=4)
        return benchmarks(model, load_tokenizer(base), asked=asked, batch_size=4, computing=nullcontext, beat=beat)

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield measured
    if dist.is_initialized():
        dist.destroy_process_group()


def choosing(folder, **keys):
    text = CHOOSING.format(rows=folder / "rows.jsonl", choices=json.dumps(CHOICES))
    return text + "".join(f"{key}: {value}\n" for key, value in keys.items())


@pytest.mark.parametrize("path", ["json", "nobody/nothing"])
def test_data_that_cannot_be_had_are_told_with_the_way_to_them(benchmarked, tmp_path, path):
    task = choosing(tmp_path).replace("dataset_path: json", f"dataset_path: {path}")
    with pytest.raises(TrainError) as told:
        benchmarked(task)
    assert "evaluate.lm_eval.tasks: choosing: " in str(told.value)
    assert f"without HF_HUB_OFFLINE, or name its files by absolute paths in {tmp_path}/choosing.yaml" in str(told.value)


def test_a_task_that_cannot_be_made_is_told_with_its_file(benchmarked, folder, tmp_path):
    with pytest.raises(
        TrainError, match=rf"TypeError: .*; look at {tmp_path}/choosing.yaml on .*, or leave the task out"
    ):
        benchmarked(choosing(folder, no_such_key=1))


def test_python_of_a_task_that_fails_is_told_with_its_place(benchmarked, folder, tmp_path):
    with pytest.raises(TrainError, match=rf"choosing: KeyError: 'colour' \({tmp_path}/own.py:18\)"):
        benchmarked(choosing(folder, process_results="!function own.failing"))


def test_what_the_model_cannot_do_is_no_fault_of_a_task(benchmarked, folder):
    model = load_frozen(Model(base=str(folder / "base")), dtype=torch.float32, attention="sdpa")

    def too_large(*inputs):
        raise MemoryError("no room")

    model.register_forward_pre_hook(too_large)
    with pytest.raises(MemoryError, match="no room"):
        benchmarked(choosing(folder), model=model)


def test_a_worker_that_is_lost_while_data_are_fetched_is_no_fault_of_a_task(benchmarked, folder):
    with pytest.raises(ValueError, match="process group"):
        benchmarked(choosing(folder, custom_dataset="!function own.lost"))


def test_fetching_data_gives_signs_of_life_and_no_longer(benchmarked, folder, tmp_path):
    beats = []
    slow = choosing(folder, custom_dataset="!function own.rows")
    assert benchmarked(slow, beat=lambda: beats.append(time.monotonic()))
    began, ended = map(float, (tmp_path / "fetched").read_text().split())
    assert sum(began < beat < ended for beat in beats) >= 2
    told = len(beats)
    time.sleep(1.5)
    assert len(beats) == told


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_every_generator_goes_on_where_it_was(device):
    from ftray.evaluate.benchmarks import _random_state_kept

    def drawn():
        torchs = [torch.rand(2, device=device).tolist(), torch.rand(2, device="cpu").tolist()]
        return [random.random(), np.random.random(), *torchs]

    def seeded(seed):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)

    seeded(5)
    expected = drawn()
    seeded(5)
    with _random_state_kept():
        seeded(1234)
        drawn()
    assert drawn() == expected
