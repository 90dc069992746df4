"""Trials that train in one pass give the losses and weights that each gives alone."""

import pytest
from fused_drill import apart, drill, weights, write_base

# Sums run over the same numbers in another order: a stack's products instead of each trial's.
LOSS, WEIGHT = 2e-5, 1e-4

FOUR = [
    {"method": {"kind": "lora", "rank": 4}, "optim": {"steps": 5, "batch_size": 6, "lr": 5e-3}, "seed": 1},
    {
        "method": {"kind": "lora", "rank": 8, "alpha": 8, "dropout": 0.2},
        "optim": {"steps": 5, "batch_size": 6, "lr": 1e-2, "schedule": "linear", "weight_decay": 0.1},
        "seed": 1,
    },
    {
        "method": {"kind": "lora", "rank": 3, "alpha": 12, "rslora": True},
        "optim": {"steps": 4, "batch_size": 6, "lr": 2e-3, "schedule": "constant", "max_grad_norm": 0.1},
        "seed": 2,
    },
    {
        "method": {"kind": "lora", "rank": 16, "targets": ["q_proj", "down_proj"]},
        "optim": {"steps": 6, "batch_size": 6, "lr": 2e-2, "warmup": 0.3, "betas": [0.8, 0.99]},
        "seed": 1,
    },
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fused")
    write_base(folder / "base")
    return folder


def same(folder, *, alone, fused, numbers=range(4)):
    """The losses and weights of trials in both."""
    for number in numbers:
        (losses, one), (others, other) = ((found[number], weights(folder, name, number)) for name, found in (alone, fused))
        assert losses.keys() == others.keys()
        assert others == pytest.approx(losses, abs=LOSS), f"trial {number}"
        assert apart(one, other) < WEIGHT, f"trial {number}"


def test_four_trials_of_different_ranks_rates_and_schedules_are_as_alone(folder):
    alone = drill(folder, name="alone", trials=FOUR)
    fused = drill(folder, name="fused", trials=FOUR, together=True)
    same(folder, alone=("alone", alone), fused=("fused", fused))
