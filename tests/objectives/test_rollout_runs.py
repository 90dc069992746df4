"""Whole runs: they learn what is rewarded, the same however they are cut, and go on where they stopped."""

from __future__ import annotations

import numpy as np
import pytest
from run_drill import run_all, run_of

WORD = [{"kind": "regex", "pattern": r"\bw9\b"}]
KINDS = {
    "grpo": {"kind": "grpo", "samples": 4, "rewards": WORD, "minibatches": 2},
    "rloo": {"kind": "rloo", "samples": 4, "rewards": WORD},
    "ppo": {"kind": "ppo", "samples": 4, "rewards": WORD, "epochs": 2, "minibatches": 2, "kl_target": 0.1},
}
STAGES = {"grpo": (2, 3), "rloo": (2,), "ppo": (0, 2, 3)}
FIGURES = ("loss", "reward", "kl", "entropy", "clip_fraction", "value_loss", "beta", "answer_tokens", "grad_norm")


def curve(rows):
    """[steps, figures] of a run's log."""
    steps = [row for row in rows if row["kind"] == "train"]
    return np.array([[row[name] for name in FIGURES if name in row] for row in steps])


def scores(rows, when):
    return next(row["scores"] for row in rows if row["kind"] == when)


@pytest.fixture(scope="module")
def one(rollout_folder):
    """Each objective on one worker, and other methods under grpo; then what goes on after two steps."""
    methods = {
        "full": {"kind": "full"},
        "prefix": {"kind": "prefix", "tokens": 3},
        "adalora": {"kind": "adalora", "rank": 2},
        "freeze": {"kind": "freeze", "last_layers": 1},
    }
    runs = [run_of(rollout_folder, name, section) for name, section in KINDS.items()]
    runs += [run_of(rollout_folder, name, KINDS["grpo"], method=method) for name, method in methods.items()]
    runs += [
        run_of(rollout_folder, "ppo-p-tuning", KINDS["ppo"], method={"kind": "p_tuning", "tokens": 3, "width": 8}),
        run_of(rollout_folder, "ppo-full", KINDS["ppo"], method={"kind": "full"}, optim={"lr": 1e-3}),
        run_of(rollout_folder, "padded", KINDS["grpo"], data={"packing": "off"}, optim={"micro_batch_size": 2}),
        *(
            run_of(
                rollout_folder,
                f"learns-{name}",
                {**section, "samples": 8, "beta": 0.01} | ({"kl_target": None} if name == "ppo" else {}),
                optim={"steps": 25, "lr": 2e-2},
            )
            for name, section in KINDS.items()
        ),
        *(
            run_of(rollout_folder, f"{name}-again", KINDS[name]) | until
            for name in ("grpo", "ppo")
            for until in ({"until": 2}, {})
        ),
    ]
    return run_all(rollout_folder, runs)


@pytest.mark.parametrize("name", KINDS)
def test_a_wanted_word_is_learnt(one, name):
    rows = one[f"learns-{name}"]
    rewards = [row["reward"] for row in rows if row["kind"] == "train"]
    assert rewards[0] < 0.4
    assert np.mean(rewards[-5:]) > 0.8
    assert scores(rows, "after")["reward"] > 0.9
    assert np.isfinite(curve(rows)).all()


def test_the_base_is_no_distance_from_itself_and_a_tuned_version_is(one):
    for name in (*KINDS, "full", "prefix", "adalora", "freeze", "ppo-p-tuning"):
        assert scores(one[name], "before")["kl"] == pytest.approx(0, abs=1e-6), name
        assert scores(one[name], "after")["kl"] > 1e-4, name


def test_the_first_answers_are_the_bases_own_unless_tokens_are_put_before_them(one):
    for name in (*KINDS, "full", "adalora", "freeze", "ppo-full"):
        assert next(row["kl"] for row in one[name] if row["kind"] == "train") == pytest.approx(0, abs=1e-5), name


def test_packed_or_padded_the_curve_is_the_same(one):
    np.testing.assert_allclose(curve(one["padded"]), curve(one["grpo"]), atol=1e-4)


@pytest.fixture(scope="module")
def two(rollout_folder):
    """The same on two workers, under several ZeRO stages."""
    runs = [
        run_of(rollout_folder, f"{name}-z{zero}", section, scale={"zero": zero, "cpus_per_worker": 1})
        for name, section in KINDS.items()
        for zero in STAGES[name]
    ]
    return run_all(rollout_folder, runs, workers=2)


@pytest.mark.parametrize(("name", "zero"), [(name, zero) for name, stages in STAGES.items() for zero in stages])
def test_two_workers_give_the_curve_of_one(one, two, name, zero):
    np.testing.assert_allclose(curve(two[f"{name}-z{zero}"]), curve(one[name]), atol=1e-4)
    for when in ("before", "after"):
        assert scores(two[f"{name}-z{zero}"], when) == pytest.approx(scores(one[name], when), abs=1e-4)


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(one, name):
    resumed = one[f"{name}-again"]
    assert [row["step"] for row in resumed if row["kind"] == "started"] == [0, 2]
    np.testing.assert_allclose(curve(resumed), curve(one[name]), atol=1e-6)
    assert [row for row in resumed if row["kind"] == "after"][-1]["scores"] == pytest.approx(
        scores(one[name], "after"), abs=1e-6
    )
