"""Reward models: losses worked by hand and TRL's, the same however a window is cut; every method learns and is read
back as it was."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ftray.config.methods import AdaLora, Freeze, Full, Lora, Prompt
from ftray.config.objectives import RewardModel as Section
from ftray.data.tokens import TokenStore, TokenWriter
from ftray.models.adapt import adapt, trainable
from ftray.models.heads import REWARD
from ftray.models.load import load_base, load_tokenizer
from ftray.models.merge import load_version
from ftray.models.save import load_state_into, save_version
from ftray.objectives import labels
from ftray.objectives.reward_model import RewardModel, bradley_terry, good_or_bad, texts_of
from tests.objectives.answers import VOCAB, some

LN2 = math.log(2)


def write_rows(folder, *, pairs=5, judged=4, tail=0, seed=0):
    """Pairs with margins, then answers that are good and bad in turn; `tail` untrained tokens behind each answer."""
    rng = np.random.default_rng(seed)
    with TokenWriter(folder, VOCAB, ["rows"]) as writer:
        for line in range(1, pairs + judged + 1):
            prompt, sides = some(rng, 2, 7), []
            for _ in range(2 if line <= pairs else 1):
                answer = some(rng, 1, 9)
                ids = np.concatenate([prompt, answer, rng.integers(3, VOCAB, tail)])
                sides.append((ids, np.repeat([False, True, False], [len(prompt), len(answer), tail])))
            ids, trained = (np.concatenate(parts) for parts in zip(*sides, strict=True))
            columns = {
                "cut": np.array([len(sides[0][0]) if len(sides) == 2 else 0], np.int32),
                "good": np.array([-1 if len(sides) == 2 else line % 2], np.int8),
                "margin": np.array([0.25 * line if len(sides) == 2 else 0.0], np.float32),
            }
            writer.extend(ids, trained, [len(ids)], [(0, writer.file_number("rows.jsonl"), line)], columns)
    return TokenStore.open(folder)


@pytest.fixture
def store(tmp_path):
    return write_rows(tmp_path / "rows")


def objective(store, **section):
    return RewardModel(Section(**section), packed=False, data=SimpleNamespace(train=store, labels=()))


def built(base, method=None, *, seed=3):
    method = method or Full()
    model = load_base(base, method=method, dtype=torch.float32, attention="sdpa", head=REWARD)
    return adapt(model, method, seed=seed, steps=20)


def window_loss(made, model, store, hands):
    micros = [made.batch(store, np.array(hand, int), spare=0) for hand in hands]
    return sum(made.loss_sum(model, micro) for micro in micros) / made.count(store, np.concatenate(hands))


def test_losses_are_those_worked_by_hand():
    chosen, rejected = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 0.0, 1.0])
    margins = torch.tensor([0.0, 0.0, 1.0])
    sure = -math.log(1 / (1 + math.exp(-1)))
    torch.testing.assert_close(bradley_terry(chosen, rejected, margins), torch.tensor([sure, LN2, LN2]))
    centred = bradley_terry(chosen, rejected, margins, center=0.1)
    torch.testing.assert_close(centred, torch.tensor([sure + 0.1, LN2, LN2 + 0.9]))
    odds = torch.tensor([math.log(3), math.log(3), 0.0])
    found = good_or_bad(odds, torch.tensor([1.0, 0.0, 1.0]))
    torch.testing.assert_close(found, torch.tensor([math.log(4 / 3), math.log(4), LN2]))


def test_scores_are_those_worked_by_hand():
    nan = math.nan
    pairs = [[0.5, 2.0, 1.0, nan], [1.0, 1.0, 1.0, nan], [1.5, 0.0, 3.0, nan]]
    made = RewardModel(Section(), packed=False, data=None)
    assert made.scores(np.array(pairs)) == {"loss": 1.0, "reward_accuracy": 0.5, "reward_margin": pytest.approx(-2 / 3)}
    judged = [[1.0, 2.0, nan, 1.0], [1.0, -1.0, nan, 1.0], [1.0, -2.0, nan, 0.0], [1.0, 0.0, nan, 0.0]]
    found = made.scores(np.array(judged))
    # good 2 and -1, bad -2 and 0: of four comparisons three are right; signs are right for 2 and -2, a half for 0
    assert found == {"loss": 1.0, "accuracy": 2.5 / 4, "reward_auc": 0.75, "reward_margin": 1.5}
    both = made.scores(np.array(pairs + judged))
    assert both["reward_margin"] == pytest.approx(-2 / 3)
    assert both["reward_auc"] == 0.75
    assert made.scores(np.array(judged)[:2]).keys() == {"loss", "accuracy"}
    assert made.scores(np.zeros((0, 0))) == {}
    assert made.details(np.array([[0.0, 1.0, 3.0, nan]])) == {"rewards": {"mean": 2.0, "std": 1.0}}


def test_an_answer_is_read_at_its_last_token_whatever_the_template_puts_behind_it(base, tmp_path):
    bare, tailed = write_rows(tmp_path / "bare"), write_rows(tmp_path / "tailed", tail=3)
    assert texts_of(tailed, 0)[0].tolist() != texts_of(tailed, 0)[1].tolist()
    ids, cut = tailed.ids(0), int(tailed.column("cut")[0])
    assert [text.tolist() for text in texts_of(tailed, 0)] == [ids[: cut - 3].tolist(), ids[cut:-3].tolist()]
    assert texts_of(bare, 8)[0].tolist() == bare.ids(8).tolist()


def test_the_loss_of_a_window_does_not_depend_on_how_it_is_cut(base, store):
    made, model = objective(store), built(base).eval()
    whole = window_loss(made, model, store, [list(range(9))])
    torch.testing.assert_close(window_loss(made, model, store, [[8, 0], [3, 1, 7], [2], [], [4, 5, 6]]), whole)
    made.loss_sum(model, made.batch(store, np.array([], int), spare=1)).backward()
    assert float(model.score.weight.grad.abs().sum()) == 0
    observed = np.concatenate([made.observe(model, made.batch(store, np.arange(9)[i::2], spare=0)) for i in (0, 1)])
    assert made.observe(model, made.batch(store, np.array([], int), spare=1)).shape == (0, 4)
    assert made.scores(observed)["loss"] == pytest.approx(whole.item(), abs=1e-6)


@pytest.mark.parametrize("center", [0.0, 0.3])
@pytest.mark.parametrize("margins", [True, False])
def test_pairs_cost_what_trls_cost(base, tmp_path, center, margins):
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    store = write_rows(tmp_path / "pairs", judged=0)
    model = built(base).eval()
    torch.nn.init.normal_(model.score.weight, std=0.5, generator=torch.Generator().manual_seed(1))
    args = RewardConfig(
        output_dir=str(tmp_path),
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_dropout=True,
        center_rewards_coefficient=center or None,
    )
    rows = Dataset.from_list([{"prompt": "AB", "chosen": "ABCD", "rejected": "ABEFG"}])
    trainer = RewardTrainer(model, args, train_dataset=rows, processing_class=load_tokenizer(base))
    features = []
    for row in range(len(store)):
        chosen, rejected = (text.tolist() for text in texts_of(store, row))
        margin = {"margin": float(store.column("margin")[row])} if margins else {}
        features.append({"chosen_ids": chosen, "rejected_ids": rejected, **margin})
    if not margins:
        store.column = lambda name, column=store.column: column(name) * (name != "margin")
    theirs = trainer.compute_loss(trainer.model.eval(), trainer.data_collator(features)).item()
    ours = window_loss(objective(store, center=center), model, store, [[0, 1], [2, 3, 4]]).item()
    assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize(
    "method",
    [Full(), Freeze(last_layers=1), Lora(rank=4), Lora(rank=4, init="pissa"), AdaLora(rank=2), Prompt(tokens=4)],
    ids=lambda method: method.kind + (".pissa" if getattr(method, "init", "") == "pissa" else ""),
)
def test_a_method_learns_rewards_and_is_read_back_as_it_was(base, store, tmp_path, method):
    made, model = objective(store), built(base, method).train()
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = window_loss(made, model, store, [list(range(9))])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]

    model.eval()
    batch = made.batch(store, np.arange(9), spare=0)
    with torch.no_grad():
        rewards = labels.read(model, batch.texts)
    state = {name: parameter.detach().clone() for name, parameter in trainable(model).items()}
    save_version(model, tmp_path / "version", method=method, state=state, tokenizer=load_tokenizer(base))
    live = built(base, method).eval()
    load_state_into(live, tmp_path / "version", method)
    fresh = load_version(base, tmp_path / "version", {"method": method.model_dump()}, torch.float32)[0]
    with torch.no_grad():
        torch.testing.assert_close(labels.read(live, batch.texts), rewards, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(labels.read(fresh, batch.texts), rewards, atol=1e-5, rtol=1e-4)
