"""Objectives that compare answers, on a small random model: what they learn, under which methods, in every cut."""

import math

import numpy as np
import pytest
import torch

from ftray.config.methods import (
    AdaLora,
    Bottleneck,
    Freeze,
    Full,
    Ia3,
    LoHa,
    LoKr,
    Lora,
    Norms,
    Oft,
    Prefix,
    Prompt,
    PTuning,
    Tokens,
    Vera,
)
from ftray.config.objectives import Dpo, Kto, Orpo
from ftray.models import virtual
from ftray.models.adapt import default_lr, trainable
from ftray.models.load import load_tokenizer
from ftray.models.save import load_state_into, save_version
from ftray.objectives.preferences import as_base, logprobs, mismatched, partners
from tests.objectives.answers import begun, built, moved, objective_over, window_loss, write_judged, write_rows

OBJECTIVES = [Dpo(), Dpo(loss="ipo", sft_weight=0.5), Orpo(), Kto()]
LEARNT = [Full(), Lora(rank=4), Lora(rank=4, init="pissa"), Prefix(tokens=4)]
METHODS = [
    *LEARNT,
    Freeze(last_layers=1),
    Lora(rank=4, dora=True),
    Lora(rank=4, init="orthogonal", modules_to_save=["norm"]),
    AdaLora(rank=2),
    LoHa(rank=4),
    LoKr(rank=4),
    Ia3(),
    Oft(block=16),
    Vera(rank=16),
    Norms(),
    Tokens(tokens=[5, 7, *range(20, 60)]),
    Bottleneck(size=8),
    Prompt(tokens=4),
    PTuning(tokens=4, width=16),
]
PROMPTS = (Prefix, Prompt, PTuning)
WINDOW = [[0, 1, 2], [3, 4], [5, 6, 7, 8]]


def kinds(sections):
    return pytest.mark.parametrize("section", sections, ids=lambda s: f"{s.kind}-{getattr(s, 'loss', '')}".strip("-"))


@pytest.fixture(scope="module")
def store_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    stores = {kind: write_rows(folder / kind, kind) for kind in ("dpo", "orpo", "kto")}
    return lambda section: stores[section.kind]


def ready(base, store, section, method, *, packed=False):
    model = built(base, method, packed=packed)
    return begun(objective_over(store, section, packed=packed), model, method, store), model


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_reference_is_the_base_whatever_was_learnt(base, store_of, method):
    store = store_of(Dpo())
    objective, model = ready(base, store, Dpo(), method)
    batch = objective.batch(store, np.arange(len(store)), spare=0)
    with torch.no_grad():
        wanted = logprobs(built(base), batch)
    learning = set(trainable(model))
    moved(model)
    if batch.reference is None:
        with as_base(model) as found:
            reference = logprobs(found, batch)
    else:
        reference = batch.reference
    torch.testing.assert_close(reference, wanted, atol=1e-4, rtol=1e-5)
    assert set(trainable(model)) == learning, "looking at the base changed what learns"
    assert model.training
    with torch.no_grad():
        assert (logprobs(model, batch) - wanted).abs().max() > 1e-3, "nothing was moved"


@kinds(OBJECTIVES)
@pytest.mark.parametrize("method", LEARNT, ids=str)
def test_a_few_steps_lower_the_loss_and_the_version_scores_the_same_when_read_back(
    base, store_of, tmp_path, section, method
):
    store = store_of(section)
    objective, model = ready(base, store, section, method)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=section.pace * default_lr(method, 100_000))
    losses = []
    for _ in range(6):
        loss = window_loss(objective, model, store, WINDOW)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(parameter.grad is not None for parameter in trainable(model).values())

    state = {name: parameter.detach().float() for name, parameter in trainable(model).items()}
    save_version(model, tmp_path / "v1", method=method, state=state, tokenizer=load_tokenizer(base))
    again, fresh = ready(base, store, section, method)
    load_state_into(fresh, tmp_path / "v1", method)
    assert measured(again, fresh, store) == pytest.approx(measured(objective, model, store), abs=1e-5)


def measured(objective, model, store):
    model.eval()
    batch = objective.batch(store, np.arange(len(store)), spare=0)
    with torch.no_grad():
        return objective.scores(objective.observe(model, batch))


@kinds(OBJECTIVES)
@pytest.mark.parametrize("method", LEARNT, ids=str)
def test_the_untouched_base_has_no_rewards(base, store_of, section, method):
    store = store_of(section)
    objective, model = ready(base, store, section, method)
    with virtual.left_away(model):
        found = measured(objective, model, store)
    if section.kind == "orpo":  # without a reference, a reward is how likely an answer is
        assert found["reward_margin"] != 0
        return
    assert found["reward_margin"] == pytest.approx(0, abs=1e-4)
    if section.kind == "kto":
        assert found["loss"] == pytest.approx(0.5, abs=1e-5)
    elif section.loss == "sigmoid":
        assert found["loss"] == pytest.approx(math.log(2), abs=1e-5)
    if not isinstance(method, Lora) or method.init != "pissa":  # which adds and takes away its start
        assert found.get("reward_accuracy", found.get("reward_auc")) == 0.5, "a tie counts half"


@kinds(OBJECTIVES)
@pytest.mark.parametrize("method", [Full(), Lora(rank=4)], ids=str)
def test_a_window_costs_the_same_packed_or_padded_and_however_it_is_cut(base, store_of, section, method):
    store = store_of(section)
    losses, gradients = [], []
    for packed, hands in ((False, WINDOW), (True, WINDOW), (True, [list(range(9))]), (False, [[n] for n in range(9)])):
        objective, model = ready(base, store, section, method, packed=packed)
        loss = window_loss(objective, moved(model), store, hands)
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in trainable(model).values()]))
    assert losses == pytest.approx([losses[0]] * 4, abs=2e-6)
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).abs().max() < 1e-5 * gradients[0].abs().max()


@kinds([Dpo(sft_weight=0.5), Orpo(), Kto()])
def test_a_batch_of_no_rows_costs_nothing_and_still_has_a_gradient(base, store_of, section):
    store = store_of(section)
    for packed in (False, True):
        objective, model = ready(base, store, section, Lora(rank=4), packed=packed)
        empty = objective.batch(store, np.zeros(0, np.int64), spare=3)
        loss = objective.loss_sum(model, empty)
        loss.backward()
        assert loss.item() == 0
        assert len(objective.observe(model, empty)) == 0
        assert objective.scores(np.zeros((0, 0))) == {}


def test_dropout_is_of_the_policy_alone(base, store_of):
    store = store_of(Dpo())
    objective, model = ready(base, store, Dpo(), Lora(rank=4, dropout=0.5))
    batch = objective.batch(store, np.arange(4), spare=0)
    moved(model)
    references = []
    for _ in range(2):
        with as_base(model) as found:
            references.append(logprobs(found, batch))
    assert torch.equal(*references)
    assert not torch.equal(logprobs(model, batch), logprobs(model, batch))


def test_answers_are_mismatched_with_prompts_of_other_rows(tmp_path):
    store = write_judged(tmp_path / "rows", count=30)
    found = partners(store)
    assert sorted(found) == list(range(30)), "every answer is used once"
    assert all(found != np.arange(30))
    ids, trained = mismatched(store, 4, int(found[4]), longest=99)
    start = int(np.argmax(store.trained(4)))
    assert ids[:start].tolist() == store.ids(4)[:start].tolist()
    partner = int(found[4])
    assert ids[trained].tolist() == store.ids(partner)[store.trained(partner)].tolist()
    assert len(mismatched(store, 4, partner, longest=5)[0]) == 5


def test_the_same_prompt_is_no_partner(tmp_path):
    from ftray.data.tokens import TokenStore, TokenWriter

    with TokenWriter(tmp_path / "rows", 96, ["rows"]) as writer:
        for line in range(12):
            prompt = [7, 8] if line % 4 else [9, line + 10]
            writer.add([*prompt, 30 + line], [False, False, True], 0, line, "rows.jsonl")
    store = TokenStore.open(tmp_path / "rows")
    for row, partner in enumerate(partners(store)):
        assert store.ids(row)[:2].tolist() != store.ids(int(partner))[:2].tolist()
