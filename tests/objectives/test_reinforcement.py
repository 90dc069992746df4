"""One step of each objective against a reference that is written out here, on tokens one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from run_drill import run_of, stand

from ftray.models import generate
from ftray.models.adapt import trainable
from ftray.objectives.ppo import USUAL

REWARDS = [{"kind": "regex", "pattern": r"w9\b"}, {"kind": "length", "tokens": 4, "weight": 0.3}]


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def logits_of(model, prompt, answer, temperature):
    """[tokens of the answer, V], of one answer alone."""
    logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, -len(answer) - 1 : -1]
    return logits.float() / temperature


def logprobs_of(model, prompt, answer, temperature=1.0):
    return logits_of(model, prompt, answer, temperature).log_softmax(-1)[range(len(answer)), answer]


def base_logprobs(model, prompt, answer, temperature=1.0):
    with torch.no_grad(), model.disable_adapter():
        return logprobs_of(model, prompt, answer, temperature)


def gradients(model, loss):
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss, learnt, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(learnt, found, strict=True)])


def stepped_away(model, size=0.03):
    """The policy after an update: then ratios are not 1."""
    torch.manual_seed(8)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(size * torch.randn_like(parameter))


def ours(objective, whole, rollout, part):
    """The loss of an update, in micro-batches as a worker cuts it."""
    hands = objective.stage.deal(rollout.lengths[part])
    total = sum(objective.loss_sum(whole, objective.batch(rollout, part[hand], spare=0)) for hand in hands)
    return total / objective.count(rollout, part)


def same(one, other):
    torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-4)


def clipped(ratio, advantage, low, high):
    return -min(ratio * advantage, max(1 - low, min(1 + high, ratio)) * advantage)


@pytest.mark.parametrize("loss", ["token", "sequence"])
@pytest.mark.parametrize("scale", [True, False])
def test_a_step_of_grpo(group, rollout_folder, loss, scale):
    section = {"kind": "grpo", "samples": 4, "rewards": REWARDS, "loss": loss, "scale_rewards": scale}
    section |= {"beta": 0.1, "clip": 0.1, "clip_high": 0.15, "temperature": 1.2}
    objective, model, whole = stand(rollout_folder, run_of(rollout_folder, "grpo", section))
    rollout, parts = objective.lessons(0, np.array([0, 1, 2]))
    assert [len(part) for part in parts] == [12]
    scores = rollout.rewards @ np.array([1.0, 0.3])
    assert len(set(scores.tolist())) > 2, "all rewards alike would teach nothing"
    with torch.no_grad():
        old = [logprobs_of(model, p, a, 1.2) for p, a in zip(rollout.prompts, rollout.answers, strict=True)]
    stepped_away(model)
    total, count, beyond = torch.tensor(0.0), 0, 0
    for i, (prompt, answer) in enumerate(zip(rollout.prompts, rollout.answers, strict=True)):
        mates = scores[i // 4 * 4 : i // 4 * 4 + 4]
        advantage = scores[i] - mates.mean()
        advantage = advantage / (mates.std(ddof=1) + 1e-4) if scale else advantage
        now, base = logprobs_of(model, prompt, answer, 1.2), base_logprobs(model, prompt, answer, 1.2)
        terms = []
        for t in range(len(answer)):
            ratio = (now[t] - old[i][t]).exp()
            beyond += not 0.9 < ratio < 1.15
            log_r = base[t] - now[t]
            terms.append(clipped(ratio, advantage, 0.1, 0.15) + 0.1 * (log_r.exp() - log_r - 1))
        total = total + (sum(terms) if loss == "token" else sum(terms) / len(terms))
        count += len(terms) if loss == "token" else 1
    assert beyond > 3, "nothing was clipped"
    mine = ours(objective, whole, rollout, parts[0])
    same(mine, total / count)
    same(gradients(whole, mine), gradients(whole, total / count))


def test_a_step_of_rloo(group, rollout_folder):
    section = {"kind": "rloo", "samples": 3, "rewards": REWARDS, "beta": 0.2, "clip": 0.2}
    objective, model, whole = stand(rollout_folder, run_of(rollout_folder, "rloo", section))
    rollout, parts = objective.lessons(2, np.array([4, 5, 6]))
    scores = rollout.rewards @ np.array([1.0, 0.3])
    pairs = list(zip(rollout.prompts, rollout.answers, strict=True))
    with torch.no_grad():
        old = [logprobs_of(model, p, a).sum() for p, a in pairs]
        worth = [
            s - 0.2 * (o - base_logprobs(model, p, a).sum()) for s, o, (p, a) in zip(scores, old, pairs, strict=True)
        ]
    at_once = ours(objective, whole, rollout, parts[0])
    others = [(sum(worth[i // 3 * 3 : i // 3 * 3 + 3]) - worth[i]) / 2 for i in range(9)]
    plain = -sum((worth[i] - others[i]) * logprobs_of(model, p, a).sum() for i, (p, a) in enumerate(pairs)) / 9
    same(gradients(whole, at_once), gradients(whole, plain))
    stepped_away(model, 0.01)
    ratios = [(logprobs_of(model, p, a).sum() - old[i]).exp() for i, (p, a) in enumerate(pairs)]
    wanted = sum(clipped(ratio, worth[i] - others[i], 0.2, 0.2) for i, ratio in enumerate(ratios)) / 9
    mine = ours(objective, whole, rollout, parts[0])
    same(mine, wanted)
    same(gradients(whole, mine), gradients(whole, wanted))


def test_a_step_of_ppo(group, rollout_folder):
    section = {"kind": "ppo", "samples": 2, "rewards": REWARDS, "beta": 0.1, "epochs": 2, "minibatches": 2}
    section |= {"gamma": 0.97, "lam": 0.9, "clip": 0.1, "value_clip": 0.05, "value_weight": 0.4}
    objective, model, whole = stand(rollout_folder, run_of(rollout_folder, "ppo", section))
    rollout, parts = objective.lessons(1, np.array([0, 1, 2]))
    assert [len(part) for part in parts] == [3, 3, 3, 3]
    assert sorted([*parts[0], *parts[1]]) == sorted([*parts[2], *parts[3]]) == list(range(6))
    scores = rollout.rewards @ np.array([1.0, 0.3])
    scores -= scores.mean()  # this is the first step
    pairs = list(zip(rollout.prompts, rollout.answers, strict=True))
    head = whole.value_head

    def values_of(prompt, answer):
        hidden = model(input_ids=torch.tensor([[*prompt, *answer]]), output_hidden_states=True).hidden_states[-1]
        return head(hidden[0, -len(answer) - 1 : -1])[:, 0]

    advantages, returns, old, old_values = [], [], [], []
    for i, (prompt, answer) in enumerate(pairs):
        with torch.no_grad():
            old.append(logprobs_of(model, prompt, answer))
            old_values.append(values_of(prompt, answer))
        kl = old[i] - base_logprobs(model, prompt, answer)
        rewards = [-0.1 * kl[t].item() for t in range(len(answer))]
        rewards[-1] += scores[i]
        values = [*old_values[i].tolist(), 0.0]
        deltas = [rewards[t] + 0.97 * values[t + 1] - values[t] for t in range(len(answer))]
        advantages.append(
            [sum((0.97 * 0.9) ** (k - t) * deltas[k] for k in range(t, len(answer))) for t in range(len(answer))]
        )
        returns.append([a + v for a, v in zip(advantages[i], values, strict=False)])
    every = np.array([a for one in advantages for a in one])
    advantages = [[(a - every.mean()) / math.sqrt(every.var() + 1e-8) for a in one] for one in advantages]
    stepped_away(model)
    total, count = torch.tensor(0.0), 0
    for i in parts[0]:
        prompt, answer = pairs[i]
        now, values = logprobs_of(model, prompt, answer), values_of(prompt, answer)
        for t in range(len(answer)):
            v, before, wanted = values[t], old_values[i][t], returns[i][t]
            held = max(before - 0.05, min(before + 0.05, v))
            loss = 0.5 * max((v - wanted) ** 2, (held - wanted) ** 2)
            total = total + clipped((now[t] - old[i][t]).exp(), advantages[i][t], 0.1, 0.1) + 0.4 * loss
            count += 1
    mine = ours(objective, whole, rollout, parts[0])
    same(mine, total / count)
    same(gradients(whole, mine), gradients(whole, total / count))


def test_a_reward_that_every_answer_gets_teaches_nothing_and_no_length(group, rollout_folder):
    section = {"kind": "ppo", "samples": 2, "rewards": [{"kind": "regex", "pattern": ""}], "beta": 0.0}
    objective, _, whole = stand(rollout_folder, run_of(rollout_folder, "ppo-even", section))
    torch.nn.init.zeros_(whole.value_head.weight)
    torch.nn.init.zeros_(whole.value_head.bias)
    rollout, _ = objective.lessons(0, np.array([0, 1, 2]))
    assert (rollout.scores == 1).all()
    assert not rollout.columns["advantage"].any()


def test_a_resumed_ppo_scores_as_it_began_to(group, rollout_folder):
    objective, _, _ = stand(rollout_folder, run_of(rollout_folder, "ppo-again", {"kind": "ppo", "rewards": REWARDS}))
    objective.restore(objective.tensors())
    assert objective.usual is None
    objective.beta, objective.usual = 0.3, 0.7
    kept = objective.tensors()
    objective.beta, objective.usual = 0.1, None
    objective.restore(kept)
    assert (objective.beta, objective.usual) == (0.3, 0.7)
    del kept[USUAL]
    objective.restore(kept)
    assert objective.usual == 0.0


def test_an_answer_ends_with_the_token_that_stopped_it_and_is_drawn_again_alike(group, rollout_folder):
    section = {"kind": "grpo", "samples": 40, "rewards": REWARDS}
    objective, _, _ = stand(rollout_folder, run_of(rollout_folder, "ends", section))
    rollout, _ = objective.lessons(0, np.array([3, 9]))
    stopped = [ids for ids in rollout.answers if len(ids) < 6]
    assert stopped
    assert all(ids[-1] == 1 and 1 not in ids[:-1] for ids in stopped)
    assert objective.lessons(0, np.array([3, 9]))[0].answers == rollout.answers
    assert objective.lessons(1, np.array([3, 9]))[0].answers != rollout.answers
    alone = objective.lessons(0, np.array([3]))[0]
    assert alone.answers == rollout.answers[:40]


def test_held_out_answers_are_judged_and_the_distance_to_the_base_is_exact(group, rollout_folder):
    section = {"kind": "grpo", "samples": 2, "rewards": [*REWARDS, {"kind": "exact_match", "weight": 0.0}]}
    objective, model, _ = stand(rollout_folder, run_of(rollout_folder, "judged", section))

    questions = objective.data.questions
    given = generate.answer(model, objective.stage.tokenizer, [q.prompt_ids for q in questions], max_new_tokens=6)
    observed = objective.judge(questions, given)
    for (question, one), (reward, kl, right) in zip(zip(questions, given, strict=True), observed, strict=True):
        ids = [*one.ids, *([] if one.stop is None else [one.stop])]
        with torch.no_grad():
            here = logits_of(model, question.prompt_ids, ids, 1.0).log_softmax(-1)
            with model.disable_adapter():
                there = logits_of(model, question.prompt_ids, ids, 1.0).log_softmax(-1)
        assert kl == pytest.approx((here.exp() * (here - there)).sum().item(), rel=1e-4)
        words = [f"w{id}" for id in one.ids]
        assert reward == pytest.approx(float("w9" in words) - 0.3 * max(0, len(words) - 4) / 4)
        assert right == float(words == [question.answer])
    scores = objective.scores(observed)
    assert scores.keys() == {"reward", "kl", "pass_at_1"}
    assert np.mean(objective.right(observed)) == pytest.approx(scores["pass_at_1"])
    assert scores["kl"] > 0
