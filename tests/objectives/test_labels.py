"""Losses and scores of labels and numbers, worked by hand."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ftray.config.objectives import Classification, Regression
from ftray.models.heads import Head
from ftray.objectives.label_scores import calibration_error, details, scores
from ftray.objectives.labels import Labels, losses

# four rows, three labels: logits, and what is right
ONE = np.array([[2.0, 0, 0, 0], [0, 1.0, 0, 1], [0, 3.0, 0, 2], [0, 0, 1.0, 2]])


def test_the_scores_of_one_label_are_those_worked_by_hand():
    found = scores(ONE, "one")
    # said 0 1 1 2, right 0 1 2 2: precision 1, 1/2, 1; recall 1, 1, 1/2; f1 1, 2/3, 2/3
    assert found["accuracy"] == 0.75
    assert found["precision"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert found["recall"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert found["f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert found["f1_micro"] == 0.75
    e = math.e
    nats = [-math.log(e**2 / (e**2 + 2)), -math.log(e / (e + 2)), math.log(e**3 + 2), -math.log(e / (e + 2))]
    assert found["loss"] == pytest.approx(sum(nats) / 4)
    # confidences .787, .576, .909, .576 lie in bins 12, 9, 14, 9 of 15; the third is wrong
    first, second, third = e**2 / (e**2 + 2), e / (e + 2), e**3 / (e**3 + 2)
    assert found["ece"] == pytest.approx(((1 - first) + 2 * (1 - second) + third) / 4)


def test_a_label_that_never_occurs_is_left_out_of_the_averages():
    wide = np.insert(ONE, 3, -9.0, axis=1)
    assert scores(wide, "one")["f1"] == pytest.approx(scores(ONE, "one")["f1"])


def test_confidence_falls_into_bins_with_their_upper_end():
    assert calibration_error(np.array([0.2, 0.2]), np.array([True, False])) == pytest.approx(0.3)
    assert calibration_error(np.array([1.0, 1.0]), np.array([True, True])) == 0
    # 3/15 and 3.5/15 are neighbours: each bin has its own gap
    assert calibration_error(np.array([0.2, 0.7 / 3]), np.array([False, True])) == pytest.approx(
        (0.2 + 1 - 0.7 / 3) / 2
    )


def test_the_scores_of_several_labels_are_those_worked_by_hand():
    logits, right = [[1.0, -1.0], [1.0, 1.0], [-1.0, -1.0]], [[1, 0], [1, 0], [0, 1]]
    found = scores(np.concatenate([logits, right], 1), "each")
    sure, unsure = -math.log(1 / (1 + math.exp(-1))), -math.log(1 / (1 + math.exp(1)))
    assert found["loss"] == pytest.approx((4 * sure + 2 * unsure) / 6)
    assert found["accuracy"] == pytest.approx(1 / 3)
    # the first label is told always, the second never: 1 of 2 said are right for micro: 2 hits, 3 said, 3 right
    assert found["f1"] == pytest.approx(0.5)
    assert found["f1_micro"] == pytest.approx(2 * 2 / 6)
    assert found["ece"] == pytest.approx(abs(4 / 6 - 1 / (1 + math.exp(-1))))


def test_the_scores_of_numbers_are_those_worked_by_hand():
    found = scores(np.array([[1.0, 0.0], [2.0, 2.0], [3.0, 4.0]]), "value")
    assert found["mse"] == found["loss"] == pytest.approx(2 / 3)
    assert found["mae"] == pytest.approx(2 / 3)
    assert found["r2"] == pytest.approx(1 - (2 / 3) / (8 / 3))
    assert found["pearson"] == pytest.approx(1.0)
    assert set(scores(np.array([[1.0, 3.0], [2.0, 3.0]]), "value")) == {"loss", "mse", "mae"}, "3 tells nothing apart"


def test_no_rows_have_no_scores():
    for scoring in ("one", "each", "value"):
        assert scores(np.zeros((0, 0)), scoring) == {}


def test_details_say_which_label_is_taken_for_which():
    found = details(ONE, Head("SEQ_CLS", ("a", "b", "c")))
    assert found["confusion"] == [[0, 0, 1], [1, 1, 1], [2, 1, 1], [2, 2, 1]]
    assert found["labels"][2] == {"name": "c", "precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "rows": 2}
    assert details(np.array([[1.0, 0.0]]), Head("SEQ_CLS", ("value",), "value")) == {}


def test_losses_are_those_worked_by_hand():
    logits = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]])
    torch.testing.assert_close(
        losses(logits, torch.tensor([1, 0]), "one"), torch.tensor([math.log(4 / 3), math.log(2)])
    )
    balance = torch.tensor([3.0, 0.5])
    torch.testing.assert_close(
        losses(logits, torch.tensor([1, 0]), "one", balance), torch.tensor([0.5 * math.log(4 / 3), 3 * math.log(2)])
    )
    each = losses(logits, torch.tensor([[0, 1], [1, 1]]), "each")
    torch.testing.assert_close(each, torch.tensor([(math.log(2) + math.log(4 / 3)) / 2, math.log(2)]))
    numbers = losses(torch.tensor([[1.5], [0.0]]), torch.tensor([1.0, 2.0]), "value")
    torch.testing.assert_close(numbers, torch.tensor([0.25, 4.0]))


class Columns:
    """A token store of four rows."""

    texts = ([5, 6, 7], [5], [6, 7], [8, 9, 10, 11])

    def __init__(self, targets):
        self.targets = np.array(targets)

    def ids(self, i):
        return np.array(self.texts[i])

    def column(self, name):
        return self.targets if name == "label" else np.zeros(4, np.int32)


class Reader(torch.nn.Module):
    """Logits that are sums of what each token says: padding would be seen."""

    def __init__(self, labels):
        super().__init__()
        self.table = torch.nn.Embedding(16, labels)
        text = SimpleNamespace(pad_token_id=3)
        self.config = SimpleNamespace(get_text_config=lambda: text, type_vocab_size=2)

    def forward(self, input_ids, attention_mask):
        assert bool((input_ids[attention_mask == 0] == 3).all())
        return SimpleNamespace(logits=(self.table(input_ids) * attention_mask[..., None]).sum(1))


def objective(section, targets, labels=("a", "b", "c")):
    store = Columns(targets)
    return Labels(section, packed=False, data=SimpleNamespace(train=store, labels=labels)), store


@pytest.mark.parametrize(
    ("section", "targets"),
    [
        (Classification(), [0, 1, 2, 0]),
        (Classification(class_weights="balanced"), [0, 1, 2, 0]),
        (Classification(multi_label=True), [[1, 0, 0], [0, 1, 1], [0, 0, 0], [1, 1, 1]]),
        (Regression(), [0.5, 1.0, -1.0, 2.0]),
    ],
    ids=["one", "balanced", "several", "number"],
)
def test_the_loss_of_a_window_does_not_depend_on_how_it_is_cut(section, targets):
    torch.manual_seed(0)
    made, store = objective(section, targets)
    model = Reader(1 if isinstance(section, Regression) else 3)
    rows = np.arange(4)
    whole = made.loss_sum(model, made.batch(store, rows, spare=0))
    alone = sum(made.loss_sum(model, made.batch(store, rows[i : i + 1], spare=0)) for i in range(4))
    torch.testing.assert_close(whole, alone)
    assert made.count(store, rows) == 4
    nothing = made.batch(store, rows[:0], spare=1)
    assert made.loss_sum(model, nothing).item() == 0
    assert made.observe(model, nothing).shape[0] == 0
    observed = np.concatenate([made.observe(model, made.batch(store, rows[i : i + 2], spare=0)) for i in (0, 2)])
    if getattr(section, "class_weights", "none") == "none":
        assert made.scores(observed)["loss"] == pytest.approx(whole.item() / 4, rel=1e-6)


def test_balanced_weights_are_one_on_average_and_largest_for_rare_labels():
    made, _ = objective(Classification(class_weights="balanced"), [0, 0, 0, 1], labels=("a", "b"))
    torch.testing.assert_close(made._balance, torch.tensor([4 / 6, 2.0]))
    several, _ = objective(Classification(class_weights="balanced", multi_label=True), [[1, 0], [1, 1], [1, 0], [0, 0]])
    torch.testing.assert_close(several._balance, torch.tensor([1 / 3, 3.0]))
