"""The mathematics of learning from rewards, with values worked by hand."""

import math

import pytest
import torch

from ftray.objectives import policy_losses as pl


def close(found, wanted, **more):
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=found.dtype), **{"atol": 1e-6, "rtol": 1e-6, **more})


def test_an_advantage_is_a_reward_against_its_group():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    close(pl.group_advantages(rewards, scale=False), [[0.5, -0.5, -0.5, 0.5], [0.0] * 4])
    deviation = math.sqrt(1 / 3) + 1e-4  # four squares of 0.5 over 3
    close(pl.group_advantages(rewards, scale=True)[0], [0.5 / deviation * sign for sign in (1, -1, -1, 1)])
    assert not pl.group_advantages(rewards, scale=True)[1].any()


def test_an_answer_is_compared_with_the_others_and_not_with_itself():
    close(pl.leave_one_out(torch.tensor([[3.0, 0.0, 6.0]])), [[0.0, -4.5, 4.5]])


def test_a_score_is_given_at_the_last_token_and_the_kl_penalty_at_each():
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    kl = torch.tensor([[0.5, -1.0, 2.0], [1.0, 9.0, 9.0]])
    close(
        pl.token_rewards(torch.tensor([10.0, 5.0]), kl, mask, beta=0.1),
        [[-0.05, 0.1, 9.8], [4.9, 0.0, 0.0]],
    )


def test_gae_by_hand():
    # gamma 0.5, lam 0.5: delta = (1 + 0.5*4 - 2, 0 + 0.5*8 - 4, 2 - 8) = (1, 0, -6); A2 = -6, A1 = -1.5, A0 = 0.625
    rewards, values = torch.tensor([[1.0, 0.0, 2.0, 7.0]]), torch.tensor([[2.0, 4.0, 8.0, 5.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    close(pl.gae(rewards, values, mask, gamma=0.5, lam=0.5), [[0.625, -1.5, -6.0, 0.0]])


def test_gae_with_lam_1_is_what_came_against_what_was_expected():
    rewards, values = torch.tensor([[0.0, 0.0, 3.0]]), torch.tensor([[1.0, 2.0, 4.0]])
    close(pl.gae(rewards, values, torch.ones(1, 3), gamma=1.0, lam=1.0), [[2.0, 1.0, -1.0]])


def test_whitened_values_have_mean_0_and_variance_1_where_the_mask_is():
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    white = pl.whiten(torch.tensor([[1.0, 2.0, 99.0], [3.0, 4.0, 5.0]]), mask)
    root = math.sqrt(2)
    close(white, [[-2 / root, -1 / root, 0.0], [0.0, 1 / root, 2 / root]])


def test_a_ratio_counts_inside_the_clip_and_never_against_the_sign_of_the_advantage():
    ratio = torch.tensor([1.0, 1.5, 0.5, 1.5, 0.5])
    advantage = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0])
    loss = pl.clipped_policy_loss(ratio.log(), advantage, low=0.2, high=0.28)
    close(loss, [-2.0, -2.56, -1.0, 3.0, 1.6])
    clipped = pl.is_clipped(ratio.log(), advantage, low=0.2, high=0.28)
    assert clipped.tolist() == [False, True, False, False, True]


def test_a_ratio_without_bound_stays_finite():
    assert torch.isfinite(pl.clipped_policy_loss(torch.tensor([500.0]), torch.tensor([-1.0]), low=0.2, high=0.2)).all()


def test_a_value_is_held_near_its_old_one():
    values, old, returns = torch.tensor([1.0, 3.0, 0.5]), torch.tensor([1.0, 1.0, 1.0]), torch.tensor([2.0, 3.0, 0.0])
    # held: 1, 1.2, 0.8; squares 1 and 1, 0 and 3.24, 0.25 and 0.64
    close(pl.clipped_value_loss(values, old, returns, clip=0.2), [0.5, 1.62, 0.32])


def test_estimators_of_the_kl_divergence():
    logprobs, reference = torch.tensor([0.5, 0.25]).log(), torch.tensor([0.25, 0.5]).log()
    close(pl.k1(logprobs, reference), [math.log(2), -math.log(2)])
    close(pl.k3(logprobs, reference), [0.5 + math.log(2) - 1, 2 - math.log(2) - 1])


def test_both_estimators_are_right_on_average():
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.25, 0.25])
    exact = (p * (p / q).log()).sum().item()
    for estimate in (pl.k1, pl.k3):
        assert (p * estimate(p.log(), q.log())).sum().item() == pytest.approx(exact, abs=1e-6)
    close(pl.full_kl(p.log()[None], q.log()[None]), [exact])
    close(pl.full_kl(p.log().expand(1200, 3), q.log().expand(1200, 3)), [exact] * 1200)


def test_entropy_of_an_even_choice_is_its_logarithm():
    close(pl.entropy(torch.zeros(2, 8)), [math.log(8)] * 2)


def test_the_kl_coefficient_moves_a_little_towards_its_target():
    assert pl.adapted(0.1, kl=6.3, target=6.0) == pytest.approx(0.1 * (1 + 0.1 * 0.05))
    assert pl.adapted(0.1, kl=60.0, target=6.0) == pytest.approx(0.1 * 1.02)
    assert pl.adapted(0.1, kl=0.0, target=6.0) == pytest.approx(0.1 * 0.98)
