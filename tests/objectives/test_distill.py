"""Distillation: the divergence worked by hand and against TRL's, and a student that comes nearer to its teacher."""

import math

import numpy as np
import pytest
import torch

from ftray.config.methods import Full
from ftray.config.objectives import Distill as Section
from ftray.config.schema import Model
from ftray.models.load import load_base
from ftray.objectives.distill import Distill, divergence_sum
from ftray.objectives.language import pad

ROWS = [np.arange(5, 25), np.arange(40, 52)]


@pytest.fixture
def student():
    return load_base(Model(base="builtin:tiny"), method=Full(), dtype=torch.float32, attention="sdpa")


@pytest.fixture
def batch():
    return pad(ROWS, [np.arange(len(ids)) > 3 for ids in ROWS], range(2), pad_id=0)


def test_the_divergence_is_that_of_two_coins():
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])  # 1/2, 1/2 and 3/4, 1/4
    forward = divergence_sum(student, teacher, temperature=1.0, reverse=False)
    assert forward.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    reverse = divergence_sum(student, teacher, temperature=1.0, reverse=True)
    assert reverse.item() == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2))


@pytest.mark.parametrize(("reverse", "beta"), [(False, 0), (True, 1)])
def test_the_divergence_is_trls(reverse, beta):
    from trl.experimental.gkd import GKDTrainer

    student, teacher = torch.randn(2, 7, 11).unbind(0)
    ours = divergence_sum(student, teacher, temperature=1.0, reverse=reverse)
    theirs = GKDTrainer.generalized_jsd_loss(student[None], teacher[None], beta=beta, reduction="sum")
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


def test_the_gradient_is_as_large_at_any_temperature():
    norms = []
    for temperature in (8.0, 16.0):
        student = torch.zeros(1, 5, requires_grad=True)
        divergence_sum(student, torch.tensor([[1.0, 0, 0, 0, -1]]), temperature=temperature, reverse=False).backward()
        norms.append(student.grad.norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=0.02)


def test_a_model_that_is_its_own_teacher_has_nothing_to_learn_from_it(student, batch):
    objective = Distill(Section(teacher="builtin:tiny", weight=1.0), packed=False, data=None)
    assert objective.loss_sum(student, batch).item() == pytest.approx(0, abs=1e-4)
    assert objective.scores(objective.observe(student, batch))["teacher_kl"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_a_student_comes_nearer_to_its_teacher_and_leaves_it_alone(student, batch, divergence):
    objective = Distill(Section(teacher="builtin:tiny", weight=1.0, divergence=divergence), packed=False, data=None)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=noise))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    before = objective.loss_sum(student, batch).item()
    weights = {name: tensor.clone() for name, tensor in objective.teacher.named_parameters()}
    for _ in range(12):
        objective.loss_sum(student, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert objective.loss_sum(student, batch).item() < 0.7 * before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in objective.teacher.named_parameters())
