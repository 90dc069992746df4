"""Fused LoRA layers give PEFT's outputs and gradients, and step aside where they cannot."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from ftray.models.fused import _LoraLinear, fuse


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(6, 10)
        self.second = torch.nn.Linear(10, 4, bias=False)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


@pytest.fixture
def pair():
    """A model as PEFT computes it, and its fused copy; B is no longer zero."""

    def make(**keys):
        torch.manual_seed(0)
        config = LoraConfig(r=3, lora_alpha=6, target_modules=["first", "second"], init_lora_weights=False, **keys)
        model = get_peft_model(Net(), config)
        twin = copy.deepcopy(model)
        return model, twin, fuse(twin)

    return make


@pytest.fixture
def calls(monkeypatch):
    """How often a layer was computed in one step."""
    made = []
    apply = _LoraLinear.apply
    monkeypatch.setattr(_LoraLinear, "apply", lambda *args: made.append(1) or apply(*args))
    return made


def gradients(model, x):
    x = x.clone().requires_grad_()
    output = model(x)
    (output**3).sum().backward()
    return output.detach(), x.grad, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6)])
@pytest.mark.parametrize("rslora", [False, True])
def test_outputs_and_gradients_are_pefts(pair, calls, shape, rslora):
    model, twin, count = pair(use_rslora=rslora)
    x = torch.randn(shape)
    (ours, to_x, ours_by_name), (theirs, to_x_theirs, by_name) = gradients(twin, x), gradients(model, x)
    assert (count, len(calls)) == (2, 2)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(to_x, to_x_theirs)
    assert ours_by_name.keys() == by_name.keys()
    for name, gradient in by_name.items():
        torch.testing.assert_close(ours_by_name[name], gradient)


def test_an_adapter_that_is_switched_off_or_merged_is_computed_as_before(pair, calls):
    model, twin, _ = pair()
    x = torch.randn(5, 6)
    with model.disable_adapter(), twin.disable_adapter():
        torch.testing.assert_close(twin(x), model(x))
    twin.merge_adapter()
    torch.testing.assert_close(twin(x), model(x))
    assert not calls
    twin.unmerge_adapter()
    torch.testing.assert_close(twin(x), model(x))
    assert len(calls) == 2


def test_dropout_and_autocast_are_pefts(pair, calls):
    _, twin, _ = pair(lora_dropout=0.5)
    x = torch.randn(5, 6)
    twin.train()(x)
    assert not calls
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert twin.eval()(x).dtype == torch.bfloat16
    assert not calls
    twin.eval()(x)
    assert len(calls) == 2


def test_dora_is_left_alone(pair):
    assert pair(use_dora=True)[2] == 0
