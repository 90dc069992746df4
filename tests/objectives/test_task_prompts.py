"""A prompt for each of several tasks: only its task tells a row how to answer, and each task's prompt serves alone."""

import json

import numpy as np
import pytest
import torch
from every_run import publish
from run_drill import ASKED, run_all, run_of, write_base
from safetensors.torch import load_file

from ftray.config.methods import Prompt
from ftray.config.schema import Run
from ftray.errors import ModelError, RegistryError
from ftray.evaluate.compare import metric_of
from ftray.models import chain
from ftray.models.merge import load_version
from ftray.models.task_prompts import TaskPrompts
from ftray.store.paths import Storage
from ftray.store.registry import Registry

ANSWERS = {"red": "w5", "blue": "w9", "green": "w5"}  # green comes later
STEPS = 60


def write_tasks(folder):
    """The same prompts in each task's file; what is answered depends on the task alone."""
    for task, word in ANSWERS.items():
        rows = [{"prompt": f"w{3 + n % 30} w{3 + n * 7 % 30}", "answer": word} for n in range(24)]
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def desks(folder, name, **sections):
    sources = [{"path": str(folder / f"{task}.jsonl"), "task": task} for task in ("red", "blue")]
    run = run_of(
        folder,
        name,
        {"kind": "sft"},
        method={"kind": "multitask_prompt", "tokens": 4, "rank": 4},
        data={"sources": sources, "eval_fraction": 0.2},
        optim={"steps": STEPS, "batch_size": 8, "lr": 0.1},
        evaluate={"every": 0, "forgetting": False, "generate_rows": 8, "max_new_tokens": 2},
        **sections,
    )
    del run["objective"]["max_new_tokens"]
    return run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(folder, log rows of the run of two tasks); its versions are published: desks@v1, desks-red@v1, desks-blue@v1."""
    folder = tmp_path_factory.mktemp("tasks")
    write_base(folder / "base")
    write_tasks(folder)
    rows = run_all(folder, [desks(folder, "desks")])["desks"]
    publish(desks(folder, "desks"))
    return folder, rows


@pytest.fixture(scope="module")
def storage(world):
    return Storage(str(world[0] / "store"))


def output_of(folder):
    return folder / "store" / "runs" / "desks" / "output"


def losses(rows):
    return [row["loss"] for row in rows if row["kind"] == "train"]


def test_the_run_learns_and_scores_each_task_with_its_own_prompt(world):
    folder, rows = world
    assert np.mean(losses(rows)[-8:]) < 0.85 * np.mean(losses(rows)[:8])
    before, after = (
        next(row for row in rows if row["kind"] == kind)["scores"]["tasks"] for kind in ("before", "after")
    )
    for task in ("red", "blue"):
        assert after[task]["loss"] < before[task]["loss"]
    answers = next(row for row in rows if row["kind"] == "after")["answers"]
    red, blue = ([(a["prompt"], a["given"]) for a in answers if a["task"] == task] for task in ("red", "blue"))
    assert [prompt for prompt, _ in red] == [prompt for prompt, _ in blue]
    assert all(one != other for one, other in zip(red, blue, strict=True))
    assert sorted(load_file(output_of(folder) / "tasks.safetensors")) == ["blue", "red"]


def test_each_tasks_card_has_its_own_sources_scores_and_gate(world, storage):
    folder, rows = world
    registry = Registry(storage)
    whole = registry.resolve("desks@v1").card
    assert whole["tasks"] == {"red": "desks-red@v1", "blue": "desks-blue@v1"}
    scores = next(row for row in rows if row["kind"] == "after")["scores"]["tasks"]
    assert scores["red"]["loss"] != scores["blue"]["loss"]
    for task, ref in whole["tasks"].items():
        card = registry.resolve(ref).card
        assert card["of_task"] == task
        assert card["method"] == {"kind": "prompt", "tokens": 4}
        assert card["data"]["sources"] == [str(folder / f"{task}.jsonl")]
        assert card["metrics"]["after"]["loss"] == scores[task]["loss"]
        [rule] = card["gate"]["rules"]
        assert rule["value"] == card["metrics"]["after"][metric_of(rule["rule"])]


def test_each_tasks_version_is_a_prompt_that_answers_as_its_task(world, storage):
    """Both tasks ask the same: what tells their answers apart is the prompt alone."""
    folder, _ = world
    base = Run.model_validate(desks(folder, "desks")).model
    red, blue = 5, 9
    leans = {}
    for task in ("red", "blue"):
        version = Registry(storage).resolve(f"desks-{task}@v1")
        files = Registry(storage).fetch(version, folder / "fetched" / task)
        assert not (files / "tasks.safetensors").exists()
        model, _ = load_version(base, files, version.card, torch.float32)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(ASKED)).logits[0, -1]
        leans[task] = float(logits[red] - logits[blue])
    assert leans["blue"] < leans["red"] - 0.1


def test_two_workers_learn_what_one_does_and_a_resumed_run_too(world):
    folder, rows = world
    two = run_all(folder, [desks(folder, "two")], workers=2)["two"]
    np.testing.assert_allclose(losses(two), losses(rows), rtol=2e-3, atol=2e-3)
    stopped = desks(folder, "again")
    resumed = run_all(folder, [stopped | {"until": 20}, stopped])["again"]
    np.testing.assert_allclose(losses(resumed), losses(rows), rtol=1e-4, atol=1e-4)


def test_a_new_task_begins_with_what_the_others_share(world, storage):
    folder, _ = world
    runs = []
    for name, begin in (("warm", {"begin": "desks@v1"}), ("cold", {})):
        run = desks(folder, name)
        run["method"] = {"kind": "prompt", "tokens": 4, **begin}
        run["data"]["sources"] = [{"path": str(folder / "green.jsonl")}]
        run["optim"]["steps"] = 15
        runs.append(run)
    logs = run_all(folder, runs)
    assert losses(logs["warm"])[0] < losses(logs["cold"])[0] - 0.2
    lineage = chain.lineage([Run.model_validate(runs[0]).begins_as], storage)
    assert [made["version"] for made in lineage] == ["desks@v1"]


def test_a_prompt_that_a_run_cannot_begin_with_is_refused(world, storage):
    folder, _ = world
    with pytest.raises(ModelError, match=r"method.tokens: desks@v1 has 4 virtual tokens, not 20; use 4"):
        chain.first_prompt(Prompt(begin="desks"), storage, width=32)
    with pytest.raises(ModelError, match=r"method.begin: desks@v1 is a prompt for .*, 32 wide, and the base is 64"):
        chain.first_prompt(Prompt(begin="desks@v1", tokens=4), storage, width=64)
    with pytest.raises(RegistryError, match=r"method.begin: .*nobody"):
        chain.first_prompt(Prompt(begin="nobody@v1"), storage, width=32)
    lora = desks(folder, "words")
    lora["method"] = {"kind": "lora", "rank": 4}
    lora["optim"]["steps"] = 1
    run_all(folder, [lora])
    output = folder / "store" / "runs" / "words" / "output"
    Registry(storage).publish("words", output, {"base": str(folder / "base")}, "k")
    with pytest.raises(ModelError, match=r"method.begin: words@v1 has no prompt, it is LORA"):
        chain.first_prompt(Prompt(begin="words"), storage, width=32)


def test_every_task_begins_with_the_shared_prompt_and_rows_of_none_get_the_mean():
    torch.manual_seed(0)
    prompts = TaskPrompts(["red", "blue"], tokens=3, width=8, rank=2)
    indices = torch.arange(3).expand(2, 3)
    for row in prompts(indices):
        assert torch.equal(row, prompts.embedding.weight)
    with torch.no_grad():
        prompts.task_rows.add_(torch.randn_like(prompts.task_rows))
    own = [prompts.task_cols[k] @ prompts.task_rows[k] for k in (0, 1)]
    with prompts.asked(["blue", "red"]):
        read = prompts(indices)
    for row, k in zip(read, (1, 0), strict=True):
        torch.testing.assert_close(row, prompts.embedding.weight * own[k])
    torch.testing.assert_close(prompts(indices)[0], prompts.embedding.weight * (own[0] + own[1]) / 2)
