"""Losses of compared answers, worked by hand."""

import math

import pytest
import torch

from ftray.config.objectives import Dpo, Kto, Orpo
from ftray.objectives.preference_losses import Ratios, auc, dpo, kto, orpo, shift

# one pair: the chosen answer gained 3 nats over 4 tokens, the rejected one lost 1 over 2; 4 apart, 1.25 a token
PAIR = Ratios(*(torch.tensor([value]) for value in (3.0, -1.0, 4, 2)))


def log_sigmoid(x):
    return -math.log(1 + math.exp(-x))


@pytest.mark.parametrize(
    ("section", "loss"),
    [
        (Dpo(beta=0.5), -log_sigmoid(2)),
        (Dpo(beta=0.5, label_smoothing=0.25), -0.75 * log_sigmoid(2) - 0.25 * log_sigmoid(-2)),
        (Dpo(beta=0.5, loss="robust", label_smoothing=0.25), (-0.75 * log_sigmoid(2) + 0.25 * log_sigmoid(-2)) / 0.5),
        (Dpo(beta=0.5, loss="robust"), -log_sigmoid(2)),
        (Dpo(beta=0.125, loss="hinge"), 0.5),
        (Dpo(beta=0.5, loss="hinge"), 0.0),
        (Dpo(beta=0.5, loss="ipo"), 0.0625),  # (1.25 - 1)^2
        (Dpo(beta=0.4, loss="normalised"), -log_sigmoid(0.5)),
    ],
    ids=str,
)
def test_a_pair_costs(section, loss):
    assert dpo(PAIR, section).tolist() == pytest.approx([loss])


def test_before_anything_is_learnt_a_pair_costs_log_2():
    still = Ratios(*(torch.tensor([value]) for value in (0.0, 0.0, 4, 2)))
    assert dpo(still, Dpo()).item() == pytest.approx(math.log(2))
    assert dpo(still, Dpo(loss="normalised", label_smoothing=0.1)).item() == pytest.approx(math.log(2))
    assert dpo(still, Dpo(loss="robust", label_smoothing=0.1)).item() == pytest.approx(math.log(2))


def test_robust_dpo_is_right_on_average_over_flipped_labels():
    section = Dpo(loss="robust", label_smoothing=0.2)
    flipped = Ratios(PAIR.rejected, PAIR.chosen, PAIR.rejected_tokens, PAIR.chosen_tokens)
    seen = 0.8 * dpo(PAIR, section) + 0.2 * dpo(flipped, section)
    assert seen.item() == pytest.approx(dpo(PAIR, Dpo()).item())


def test_orpo_is_the_chosen_answers_loss_and_the_odds_that_it_is_given_rather_than_the_other():
    chosen, rejected = math.log(0.8), math.log(0.5)  # odds 4 and 1
    loss = orpo(torch.tensor([chosen]), torch.tensor([rejected]), Orpo(beta=0.5))
    assert loss.item() == pytest.approx(-chosen - 0.5 * math.log(4 / 5))


def test_orpo_stays_finite_where_an_answer_is_certain_or_all_but_impossible():
    sure, never = torch.zeros(1, requires_grad=True), torch.full((1,), -200.0, requires_grad=True)
    loss = orpo(sure, never, Orpo()) + orpo(never, sure, Orpo())
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(sure.grad)
    assert torch.isfinite(never.grad)


def test_kto_draws_good_answers_above_the_shift_and_bad_ones_below():
    section = Kto(beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)
    losses = kto(torch.tensor([3.0, 3.0]), torch.tensor([True, False]), torch.tensor(1.0), section)
    sigmoid = 1 / (1 + math.exp(-1.0))
    assert losses.tolist() == pytest.approx([2 * (1 - sigmoid), 3 * sigmoid])


def test_the_shift_is_a_mean_that_is_never_negative():
    assert shift(torch.tensor([1.0, -0.5, 0.25])).item() == 0.25
    assert shift(torch.tensor([1.0, -2.0])).item() == shift(torch.zeros(0)).item() == 0


@pytest.mark.parametrize(
    ("rewards", "good", "area"),
    [
        ([3, 2, 1], [True, False, False], 1.0),
        ([1, 2, 3], [True, False, False], 0.0),
        ([0, 0, 0], [True, False, False], 0.5),
        ([2, 1, 1, 0], [False, True, False, True], 0.5 / 4),  # of four couples only the tie counts, half
        ([1, 2], [True, True], None),
    ],
)
def test_the_area_counts_couples_that_stand_right(rewards, good, area):
    assert auc(torch.tensor(rewards, dtype=torch.float64), torch.tensor(good)) == area
