"""The bank's arithmetic: what a step's tokens get from their slots, however they are spread."""

from __future__ import annotations

import pytest
import torch

from ftray.errors import AdapterError
from ftray.serve.bank import Bank, Mix, add
from ftray.serve.lora_files import LoraLayer

SLOTS, INPUTS, OUTPUTS, RANK = 6, 5, 7, 3


def by_hand(x, counts, pieces, a, b):
    """y for each token of the step by its slot alone."""
    y = torch.zeros(len(x), OUTPUTS)
    begin = 0
    for slot, count in counts.items():
        y[begin : begin + count] = x[begin : begin + count] @ a[slot].t() @ b[slot]
        begin += count
    for slot, first, last in pieces:
        y[first:last] = x[first:last] @ a[slot].t() @ b[slot]
    return y


@pytest.mark.parametrize(
    ("counts", "pieces", "tokens"),
    [
        ({0: 2, 1: 2, 2: 2}, [], 8),  # the same number for neighbours: as they lie, and two tokens of the base
        ({1: 1, 2: 3, 4: 2}, [], 6),  # ragged, with an empty slot between
        ({0: 1, 5: 1}, [], 2),  # far apart
        ({3: 20}, [], 20),  # many of one
        ({0: 20, 1: 1, 2: 17, 3: 2}, [], 41),
        ({0: 1}, [(2, 1, 6), (0, 8, 10)], 10),  # an answer, and pieces of prompts with the base's between
        ({}, [(4, 3, 5)], 9),
    ],
)
def test_each_token_gets_its_slots_update_and_the_bases_get_none(counts, pieces, tokens):
    torch.manual_seed(0)
    a, b = torch.randn(SLOTS, RANK, INPUTS), torch.randn(SLOTS, RANK, OUTPUTS)
    x = torch.randn(tokens, INPUTS)
    y = torch.zeros(tokens, 2 * OUTPUTS)[:, :OUTPUTS]  # a joint layer's part is a strided view
    add(y, x, Mix(counts, pieces, rank=RANK, size=tokens), a, b)
    torch.testing.assert_close(y, by_hand(x, counts, pieces, a, b))


def model():
    torch.manual_seed(0)
    holder = torch.nn.Module()
    holder.layer = torch.nn.Linear(INPUTS, OUTPUTS, bias=False)
    holder.get_output_embeddings = lambda: None
    return holder


def lora(rank, seed):
    torch.manual_seed(seed)
    return {"layer": LoraLayer(torch.randn(rank, INPUTS), torch.randn(OUTPUTS, rank), scale=0.5)}


def answer(made, bank, key, x):
    bank.mix = bank.mixed({bank.slot(key): len(x)}, size=len(x))
    return made.layer(x[None])[0]


def wanted(made, one, x):
    return made.layer.base(x) + one.scale * (x @ one.a.t() @ one.b.t())


def test_a_larger_rank_makes_the_bank_grow_and_leaves_what_is_there_as_it_was():
    made = model()
    bank = Bank(made, slots=3, max_rank=32, dtype=torch.float32, device="cpu")
    x = torch.randn(4, INPUTS)
    small, large = lora(2, 1), lora(12, 2)
    bank.load("small", small)
    before = answer(made, bank, "small", x)
    bank.load("large", large)
    assert bank.rank == 12
    torch.testing.assert_close(answer(made, bank, "small", x), before)
    torch.testing.assert_close(before, wanted(made, small["layer"], x))
    torch.testing.assert_close(answer(made, bank, "large", x), wanted(made, large["layer"], x))


def test_a_slot_taken_again_has_nothing_left_of_the_version_before():
    made = model()
    bank = Bank(made, slots=1, max_rank=8, dtype=torch.float32, device="cpu")
    x = torch.randn(4, INPUTS)
    bank.load("old", lora(8, 1))
    bank.unload("old")
    new = lora(2, 3)
    bank.load("new", new)
    torch.testing.assert_close(answer(made, bank, "new", x), wanted(made, new["layer"], x))


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ({"layer": LoraLayer(torch.zeros(9, INPUTS), torch.zeros(OUTPUTS, 9), 1.0)}, "max_rank = 8"),
        ({"layer": LoraLayer(torch.zeros(2, 4), torch.zeros(OUTPUTS, 2), 1.0)}, "4 -> 7"),
        ({"other": LoraLayer(torch.zeros(2, 4), torch.zeros(4, 2), 1.0)}, "other is no linear layer"),
        ({"layer": LoraLayer(torch.full((2, INPUTS), torch.nan), torch.zeros(OUTPUTS, 2), 1.0)}, "NaN"),
    ],
)
def test_what_does_not_fit_is_refused_and_takes_no_slot(layers, reason):
    bank = Bank(model(), slots=1, max_rank=8, dtype=torch.float32, device="cpu")
    with pytest.raises(AdapterError, match=reason):
        bank.load("bad", layers)
    assert "bad" not in bank
    bank.load("good", lora(2, 1))
