"""The objective section: what fits together, and what the other sections learn from it."""

from __future__ import annotations

import pytest

from ftray.config.init import starter
from ftray.config.load import load_run, run_from
from ftray.errors import ConfigError

MINIMAL = {"name": "a", "data": {"sources": "rows.jsonl"}}


def refused(*overrides: str) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        run_from(MINIMAL, overrides)
    return dict(caught.value.problems)


@pytest.mark.parametrize("kind", ["dpo", "orpo", "kto"])
def test_preferences_refuse_what_has_no_meaning_for_answers_that_are_compared(kind):
    found = refused(
        f"objective={{kind: {kind}}}",
        "data.few_shot=2",
        "data.too_long=split",
        "data.augment={copies: 2, noise: [typos]}",
    )
    assert set(found) == {"data.few_shot", "data.too_long", "data.augment.copies"}
    assert all(kind in said for said in found.values())


@pytest.mark.parametrize("loss", ["hinge", "ipo"])
def test_label_smoothing_belongs_to_losses_of_probabilities(loss):
    found = refused(f"objective={{kind: dpo, loss: {loss}, label_smoothing: 0.1}}")
    assert found == {
        "objective.label_smoothing": f"{loss} has no use for it; leave it out, or use loss: sigmoid",
    }


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("objective={kind: dpo, beta: 0}", "objective.beta"),
        ("objective={kind: dpo, label_smoothing: 0.5}", "objective.label_smoothing"),
        ("objective={kind: dpo, loss: simpo}", "objective.loss"),
        ("objective={kind: kto, desirable_weight: -1}", "objective.desirable_weight"),
        ("objective={kind: orpo, loss: ipo}", "objective.loss"),
    ],
)
def test_a_value_that_does_not_fit_is_named(override, key):
    assert list(refused(override)) == [key]


def test_an_example_of_a_pair_is_as_long_as_two_texts():
    lengths = {
        kind: run_from(MINIMAL, [f"objective={{kind: {kind}}}"]).longest for kind in ("sft", "dpo", "orpo", "kto")
    }
    assert lengths == {"sft": 1024, "dpo": 2048, "orpo": 2048, "kto": 1024}


def test_a_starter_of_preferences_says_its_keys(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(starter("dpo", ["pairs.jsonl"], "a"))
    assert load_run(path).objective.kind == "dpo"
    assert "# sft_weight: 0.0" in path.read_text()


@pytest.mark.parametrize(
    ("kind", "measured", "gate"),
    [
        ("sft", ["loss", "token_accuracy"], "loss < base"),
        ("classification", ["loss", "f1"], "loss < base"),
        ("{kind: grpo, rewards: [{kind: length, tokens: 9}]}", ["reward"], "reward > base"),
        ("token_classification", ["loss", "entity_f1"], "entity_f1 > base"),
        ("token_classification", ["loss", "f1"], "f1 > base"),  # tags that are not BIO
        ("token_classification", [], "entity_f1 > base"),  # no held-out rows: nothing passes
    ],
)
def test_the_gate_goes_by_the_objective_unless_the_run_says(kind, measured, gate):
    section = kind if kind.startswith("{") else f"{{kind: {kind}}}"
    assert run_from(MINIMAL, [f"objective={section}"]).gate(measured) == [gate]
    assert run_from(MINIMAL, [f"objective={section}", "evaluate.gate=[loss < 2]"]).gate(measured) == ["loss < 2"]
