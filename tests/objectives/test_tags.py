"""Losses and scores of tags, worked by hand, and by seqeval."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ftray.config.objectives import TokenClassification
from ftray.objectives.tag_scores import details, entities, figures, kinds_of, scores
from ftray.objectives.tags import Tags

LABELS = ("O", "B-per", "I-per", "B-loc", "I-loc")


def observed(said, right, labels=LABELS, sure=4.0):
    """Figures of texts in which a model says these tags, each with logit `sure` against 0."""
    number = {label: i for i, label in enumerate(labels)}
    eye = np.eye(len(labels))
    return np.stack(
        [
            figures(sure * eye[[number[tag] for tag in one]], np.array([number[tag] for tag in two]), labels)
            for one, two in zip(said, right, strict=True)
        ]
    )


RIGHT = [["B-per", "I-per", "O", "B-loc"], ["O", "B-loc", "I-loc", "I-loc"], ["B-per", "B-per"]]
SAID = [["B-per", "I-per", "O", "B-per"], ["O", "B-loc", "I-loc", "O"], ["B-per", "I-per"]]


def test_entity_scores_are_those_worked_by_hand():
    # right: per(0,2) loc(3,4) | loc(1,4) | per(0,1) per(1,2); said: per(0,2) per(3,4) | loc(1,3) | per(0,2): 1 is right
    found = scores(observed(SAID, RIGHT), LABELS)
    assert found["entity_precision"] == pytest.approx(1 / 4)
    assert found["entity_recall"] == pytest.approx(1 / 5)
    assert found["entity_f1"] == pytest.approx(2 * 1 / (4 + 5))
    assert found["token_accuracy"] == pytest.approx(7 / 10)
    confidence = math.exp(4) / (math.exp(4) + 4)
    hit, miss = -math.log(confidence), -math.log(1 / (math.exp(4) + 4))
    assert found["loss"] == pytest.approx((7 * hit + 3 * miss) / 10)
    assert found["ece"] == pytest.approx(abs(0.7 - confidence))
    assert "f1" not in found


def test_the_report_has_each_kind():
    found = details(observed(SAID, RIGHT), LABELS)
    assert found["of"] == "entities"
    per, loc = found["labels"]
    assert per == {
        "name": "per",
        "precision": pytest.approx(1 / 3),
        "recall": pytest.approx(1 / 3),
        "f1": pytest.approx(1 / 3),
        "rows": 3,
    }
    assert (loc["name"], loc["f1"], loc["rows"]) == ("loc", 0.0, 2)


def test_scores_do_not_depend_on_the_order_of_texts():
    found = observed(SAID, RIGHT)
    assert scores(found[::-1], LABELS) == pytest.approx(scores(found, LABELS))
    assert scores(np.zeros((0, 0)), LABELS) == {}
    assert details(np.zeros((0, 0)), LABELS) == {}


def test_an_i_tag_that_goes_on_with_nothing_begins_an_entity_as_in_conlleval():
    assert entities(["I-per", "I-loc", "O", "I-loc", "B-loc"]) == {
        (0, 1, "per"),
        (1, 2, "loc"),
        (3, 4, "loc"),
        (4, 5, "loc"),
    }


def test_words_count_for_themselves_where_no_tag_is_bio():
    labels = ("NOUN", "VERB", "X")
    made = observed([["NOUN", "NOUN", "VERB"]], [["NOUN", "VERB", "VERB"]], labels)
    found = scores(made, labels)
    assert kinds_of(labels) == labels
    # NOUN: 1 of 2 said, 1 of 1 right; VERB: 1 of 1 said, 1 of 2 right; X does not occur
    assert found["f1"] == pytest.approx(2 / 3)
    assert "entity_f1" not in found
    assert details(made, labels)["of"] == "words"


def test_seqeval_counts_the_same():
    seqeval = pytest.importorskip("seqeval.metrics")
    generator = np.random.default_rng(0)
    for _ in range(30):
        lengths = generator.integers(1, 12, 6)
        said, right = ([[LABELS[i] for i in generator.integers(0, 5, length)] for length in lengths] for _ in "ab")
        for row, (one, two) in enumerate(zip(said, right, strict=True)):
            if row % 2:  # half of the texts are nearly right
                one[: len(one) - 1] = two[: len(two) - 1]
        found = scores(observed(said, right), LABELS)
        wanted = seqeval.classification_report(right, said, output_dict=True, zero_division=0)
        for ours, theirs in (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score")):
            assert found[f"entity_{ours}"] == pytest.approx(wanted["micro avg"][theirs])
        for kind in details(observed(said, right), LABELS)["labels"]:
            if kind["name"] in wanted:
                assert kind["f1"] == pytest.approx(wanted[kind["name"]]["f1-score"])
                assert kind["rows"] == wanted[kind["name"]]["support"]


class Store:
    """A token store of four texts; the first token of each is special, and every third goes on with a word."""

    texts = ([5, 6, 7], [5, 6], [5, 6, 7, 8, 9, 10], [5, 8, 9, 11])

    def ids(self, i):
        return np.array(self.texts[i])

    def trained(self, i):
        at = np.arange(len(self.texts[i]))
        return (at > 0) & (at % 3 != 0)

    @property
    def trained_counts(self):
        return np.array([self.trained(i).sum() for i in range(4)])

    def stream_of(self, name, i):
        return self.ids(i)[self.trained(i)] % 5


class Reader(torch.nn.Module):
    """Logits of each token; padding must be told by its id."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(16, 5)
        text = SimpleNamespace(pad_token_id=3)
        self.config = SimpleNamespace(get_text_config=lambda: text)

    def forward(self, input_ids, attention_mask):
        assert bool((input_ids[attention_mask == 0] == 3).all())
        return SimpleNamespace(logits=self.table(input_ids))


def test_the_loss_of_a_window_is_over_first_tokens_and_does_not_depend_on_how_it_is_cut():
    torch.manual_seed(0)
    store, model, rows = Store(), Reader(), np.arange(4)
    made = Tags(TokenClassification(), packed=False, data=SimpleNamespace(labels=LABELS))
    whole = made.loss_sum(model, made.batch(store, rows, spare=0))
    alone = sum(made.loss_sum(model, made.batch(store, rows[i : i + 1], spare=0)) for i in range(4))
    torch.testing.assert_close(whole, alone)
    assert made.count(store, rows) == 2 + 1 + 4 + 2
    by_hand = sum(
        -math.log(model.table.weight[id].softmax(-1)[id % 5].item())
        for i in range(4)
        for id in store.ids(i)[store.trained(i)]
    )
    assert whole.item() == pytest.approx(by_hand, rel=1e-5)

    nothing = made.batch(store, rows[:0], spare=1)
    assert made.loss_sum(model, nothing).item() == 0
    assert made.observe(model, nothing).shape[0] == 0
    parts = [made.observe(model, made.batch(store, rows[i : i + 2], spare=0)) for i in (0, 2)]
    assert [len(part) for part in parts] == [2, 2]
    assert made.scores(np.concatenate(parts))["loss"] == pytest.approx(by_hand / 9, rel=1e-5)
