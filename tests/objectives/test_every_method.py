"""Each method under each objective that allows it: a whole run learns and is published. A process that has seen none of
it finds the version in the registry, loads it, merges it where it merges, serves it, and gets the same outputs."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import every_version
import numpy as np
import pytest
from every_run import CASES, LABELS, SAMPLED, TASKS, publish, run_for, write_world
from pydantic import ValidationError
from run_drill import run_all

from ftray.config.schema import Run

MERGED = ("lora", "adalora", "loha", "lokr", "ia3", "oft", "vera", "norms", "tokens")
BESIDE = ("bottleneck", "prefix", "prompt", "p_tuning", "multitask_prompt")
HEADS = {"token_classification": "TOKEN_CLS"}
ROOMS = {"adapter": "bank", "merge": "own", "beside": "own", "model": "own"}
"""Where an engine that writes holds a version: a whole model is one of its own beside the base."""
ALLOWED = [case for case in CASES if not case.refused]


def served_as(case):
    """What the card must say of how the version is served."""
    if case.reads and (case.base == "causal" or case.method in BESIDE):
        return "none"
    if case.method in ("full", "freeze"):
        return "model"
    if case.reads:
        return "merge" if case.method == "vera" else "adapter"
    if case.method in BESIDE:
        return "beside"
    return "adapter" if case.method in ("lora", "adalora") else "merge"


def of(case, world):
    """(log rows of the run, what is said of its version)."""
    if case.refused:
        pytest.skip(case.refused)
    logs, said = world
    return logs[case.name], said[case.name]


def outputs(log, kind):
    return np.array(next(row["values"] for row in log if row["kind"] == kind))


def scores(logits, scoring):
    """What a reading engine says, from logits with the labels on the last axis."""
    if scoring == "value":
        return logits
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def assert_answers_as_loaded(said):
    """Greedily and to the same probabilities, by the engine and by the model that was loaded without it."""
    for answer, wanted in zip(said["served"], said["wanted"], strict=True):
        assert answer["ids"] == wanted["ids"]
        assert np.abs(np.subtract(answer["logprobs"], wanted["logprobs"])).max() < 1e-4


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """What every allowed run logged, and what a fresh process says of the versions: two dicts by name."""
    folder = tmp_path_factory.mktemp("every")
    write_world(folder)
    runs = [run_for(folder, case) for case in ALLOWED]
    logs = run_all(folder, runs)
    for run in runs:
        publish(run)
    reader = [sys.executable, every_version.__file__, str(folder / "store")]
    done = subprocess.run(reader, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return logs, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_run_learns_and_its_version_is_the_same_in_a_fresh_process(world, case):
    log, said = of(case, world)
    losses = [row["loss"] for row in log if row["kind"] == "train"]
    assert np.isfinite(losses).all()
    if case.objective not in SAMPLED:
        assert np.mean(losses[-4:]) < np.mean(losses[:4])  # two steps see every row once
    begun, live = outputs(log, "begun"), outputs(log, "logits")
    assert np.abs(live - begun).max() > 1e-4, "nothing was learnt"
    assert np.abs(live - np.array(said["loaded"])).max() < 1e-4
    assert ("merged" in said) == (case.method in MERGED), said.get("unmerged")
    if "merged" in said:
        assert np.abs(live - np.array(said["merged"])).max() < 1e-4


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_version_is_served_as_its_card_says_with_the_same_outputs(world, case):
    log, said = of(case, world)
    assert said["servability"] == served_as(case)
    assert said.get("task") == (HEADS.get(case.objective, "SEQ_CLS") if case.reads else None)
    assert said.get("labels") == LABELS.get(case.objective)
    if said["servability"] == "none":
        assert "refused" in said, "it is served, and its card says that it is not"
        return
    assert "refused" not in said, said["refused"]
    merged_first = case.reads and said["servability"] == "merge"
    assert said["room"] == ("own" if merged_first else ROOMS[said["servability"]])
    if case.reads:
        assert np.abs(np.array(said["served"]) - scores(outputs(log, "logits"), said["scoring"])).max() < 1e-4
    else:
        assert_answers_as_loaded(said)


def test_each_tasks_own_version_is_served_beside_the_bank(world):
    _, said = world
    for objective, task in itertools.product(("sft", "pretrain", "distill"), TASKS):
        one = said[f"{objective}-multitask-prompt-causal-{task}"]
        assert (one["servability"], one["room"]) == ("beside", "own")
        assert_answers_as_loaded(one)


def test_what_is_skipped_is_refused(tmp_path):
    for case in CASES:
        if case.refused:
            with pytest.raises(ValidationError, match=r"method\.kind"):
                Run.model_validate(run_for(tmp_path, case))
