"""What a sweep may go by: whatever its trials will report, and nothing else."""

from types import SimpleNamespace

import numpy as np
import pytest
from sweeps import sweep

from ftray.config.objectives import Classification, Regression, TokenClassification
from ftray.errors import ConfigError
from ftray.evaluate.compare import METRICS
from ftray.objectives import label_scores, tag_scores
from ftray.sweep.planning import _trimmed, check_answers, check_metric

OBJECTIVES = {
    "sft": {},
    "pretrain": {},
    "distill": {"teacher": "builtin:tiny"},
    "dpo": {},
    "orpo": {},
    "kto": {},
    "reward": {},
    "grpo": {"rewards": [{"kind": "length", "tokens": 4}]},
    "classification": {},
    "regression": {},
    "token_classification": {},
}


def run(kind, **evaluate):
    section = {"kind": kind, **OBJECTIVES[kind]}
    return {"name": "demo", "data": {"sources": "rows.jsonl"}, "objective": section, "evaluate": evaluate}


def refused(metric, kind, **keys):
    with pytest.raises(ConfigError) as caught:
        check_metric(sweep(run=run(kind, **keys.pop("evaluate", {})), metric=metric, **keys))
    ((key, said),) = caught.value.problems
    assert key == "metric"
    return said


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_every_metric_that_an_objective_reports_is_taken(kind):
    own = sweep(run=run(kind)).run.objective.reports
    assert set(own) <= set(METRICS)
    for metric in own:
        check_metric(sweep(run=run(kind), metric=metric, stopping={"kind": "asha"}))


def test_objectives_that_read_report_what_their_scores_are():
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(9, 3)), np.arange(9)[:, None] % 3
    several = np.concatenate([logits, generator.integers(0, 2, (9, 3))], 1)
    classified = label_scores.scores(np.concatenate([logits, labels], 1), "one")
    assert set(Classification.reports) == set(classified) == set(label_scores.scores(several, "each"))
    assert set(Regression.reports) == set(label_scores.scores(generator.normal(size=(9, 2)), "value"))
    tagged = [
        tag_scores.scores(tag_scores.figures(logits, labels[:, 0], names)[None], names)
        for names in (("O", "B-x", "I-x"), ("NOUN", "VERB", "X"))
    ]
    assert set(TokenClassification.reports) == set(tagged[0]) | set(tagged[1])


@pytest.mark.parametrize(
    ("metric", "kind", "said"),
    [
        ("los", "sft", "no metric 'los'; did you mean 'loss'?"),
        ("forgetting", "sft", "use general_loss"),
        (
            "lm_eval/arc_easy/acc",
            "sft",
            "trials leave benchmarks out, and the best version is given them; use one of loss",
        ),
        ("accuracy", "regression", "regression reports no accuracy; use one of loss, mse, mae, r2, pearson"),
        ("exact_match", "classification", "classification reports no exact_match"),
        ("general_loss", "token_classification", "token_classification reports no general_loss"),
        ("loss", "grpo", "grpo reports no loss; use one of reward, kl"),
        ("exact_match", "pretrain", "pretrain reports no exact_match"),
        ("win_rate", "sft", "sft reports no win_rate"),
        ("f1", "sft", "no trial reports f1 without evaluate.labels"),
        ("judge_score", "dpo", "no trial reports judge_score without evaluate.judge"),
    ],
)
def test_a_metric_that_no_trial_reports_is_refused_with_those_that_are(metric, kind, said):
    assert said in refused(metric, kind)


def test_a_metric_of_answers_needs_them():
    without = {"generate_rows": 0}
    assert refused("exact_match", "sft", evaluate=without).endswith("evaluate.generate_rows: 0; set it, or use loss")
    assert refused("reward", "grpo", evaluate=without).endswith("evaluate.generate_rows: 0; set it")
    assert "general_loss with evaluate.forgetting: false" in refused(
        "general_loss", "sft", evaluate={"forgetting": False}
    )
    assert "evaluate.numeric: false" in refused("pass_at_1", "sft", evaluate={"numeric": False})
    check_metric(sweep(run=run("sft", labels=["yes", "no"]), metric="f1"))
    check_metric(sweep(run=run("grpo"), metric="pass_at_1"))


@pytest.mark.parametrize(
    ("labels", "metric", "wrong", "said"),
    [
        (("O", "B-x", "I-x"), "entity_f1", "f1", "the tags are BIO; use entity_f1"),
        (("NOUN", "VERB"), "f1", "entity_recall", "no tag is BIO; use f1"),
    ],
)
def test_scores_of_entities_need_tags_of_entities(labels, metric, wrong, said):
    data, tagging = SimpleNamespace(labels=labels), run("token_classification")
    check_answers(sweep(run=tagging, metric=metric), data)
    with pytest.raises(ConfigError, match=f"no trial reports {wrong}: {said}"):
        check_answers(sweep(run=tagging, metric=wrong), data)


def test_trials_of_several_workers_stop_by_what_they_report_on_the_way():
    def of_two(kind, metric):
        two = {**run(kind), "scale": {"workers": 2}}
        check_metric(sweep(run=two, metric=metric, stopping={"kind": "median"}))

    of_two("classification", "f1")
    of_two("token_classification", "entity_f1")
    with pytest.raises(ConfigError, match="report loss on the way and exact_match at their end"):
        of_two("sft", "exact_match")


@pytest.mark.parametrize(
    ("kind", "metric", "rows"), [("sft", "loss", 0), ("sft", "exact_match", 200), ("grpo", "reward", 200)]
)
def test_trials_answer_held_out_prompts_only_where_the_metric_is_of_answers(kind, metric, rows):
    assert _trimmed(sweep(run=run(kind)).run, metric).evaluate.generate_rows == rows
