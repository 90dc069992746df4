"""Base against tuned: scores, the table of changes, and the gate a version must pass to be promoted."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ftray.config.schema import GATE_PATTERN, LM_EVAL
from ftray.errors import ConfigError
from ftray.evaluate.suites import answer_scores, numbered, perplexity


@dataclass(frozen=True)
class Metric:
    label: str
    best: Literal["low", "high"]
    form: Literal["number", "share"]
    meaning: str


METRICS = {
    "loss": Metric(
        "Loss", "low", "number", "what the objective lowers, on held-out rows: of text, nats a trained token"
    ),
    "perplexity": Metric("Perplexity", "low", "number", "exp(loss)"),
    "token_accuracy": Metric("Token accuracy", "high", "share", "trained tokens that are the model's first choice"),
    "teacher_kl": Metric("Teacher's divergence", "low", "number", "KL from the teacher, nats per trained token"),
    "reward_accuracy": Metric(
        "Reward accuracy",
        "high",
        "share",
        "pairs whose chosen answer has the higher reward, or implicit reward; a tie is half",
    ),
    "reward_margin": Metric(
        "Reward margin", "high", "number", "reward, or implicit reward, of chosen or good answers above others"
    ),
    "reward_auc": Metric("Reward AUC", "high", "share", "good answers rewarded above bad ones; a tie is half"),
    "reward": Metric("Reward", "high", "number", "mean reward of greedy answers"),
    "pass_at_1": Metric(
        "Pass@1", "high", "share", "greedy answers that are right, by the number they end in or as the reward tells"
    ),
    "kl": Metric("KL to base", "low", "number", "nats per greedy answer, of the tuned model from its base"),
    "judge_score": Metric("Judge's score", "high", "number", "mean reward of answers by evaluate.judge"),
    "win_rate": Metric("Win rate", "high", "share", "answers that the judge puts above the base's; a tie is half"),
    "exact_match": Metric("Exact match", "high", "share", "answers equal to the expected one, up to white space"),
    "json_match": Metric("JSON match", "high", "share", "answers with the same JSON value as the expected one"),
    "accuracy": Metric("Accuracy", "high", "share", "rows whose label, or all of whose labels, are right"),
    "precision": Metric("Precision", "high", "share", "macro average over the labels"),
    "recall": Metric("Recall", "high", "share", "macro average over the labels"),
    "f1": Metric("F1", "high", "share", "macro average over the labels"),
    "f1_micro": Metric("F1, micro", "high", "share", "over all labels together"),
    "ece": Metric("Calibration error", "low", "share", "how far confidence is from being right, in 15 bins"),
    "entity_f1": Metric("Entity F1", "high", "share", "entities with the right words and kind, micro average"),
    "entity_precision": Metric("Entity precision", "high", "share", "given entities that are right"),
    "entity_recall": Metric("Entity recall", "high", "share", "right entities that are given"),
    "mse": Metric("Squared error", "low", "number", "mean over the held-out rows"),
    "mae": Metric("Absolute error", "low", "number", "mean over the held-out rows"),
    "r2": Metric("R²", "high", "number", "share of the values' variance that is explained"),
    "pearson": Metric("Pearson's r", "high", "number", "correlation of given and right values"),
    "general_loss": Metric("General loss", "low", "number", "nats per token of general text"),
    "forgetting": Metric("Forgetting", "low", "number", "general loss, tuned minus base"),
}

LM_EVAL_SHARES = {"acc", "acc_norm", "acc_bytes", "exact_match", "exact", "em", "f1", "pass@1"}
LM_EVAL_LOW = {"perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score", "ter"}

RIVAL_METRICS = ("pass_at_1", "exact_match", "json_match", "accuracy", "f1")
"""What prompting without training is compared by."""

COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


@dataclass(frozen=True)
class Scores:
    """One model's scores; None is what was not measured. Losses in nats per token, shares from 0 to 1."""

    loss: float | None = None
    token_accuracy: float | None = None
    teacher_kl: float | None = None
    reward_accuracy: float | None = None
    reward_margin: float | None = None
    reward_auc: float | None = None
    reward: float | None = None
    pass_at_1: float | None = None
    kl: float | None = None
    judge_score: float | None = None
    win_rate: float | None = None
    exact_match: float | None = None
    json_match: float | None = None
    accuracy: float | None = None
    precision: float | None = None
    recall: float | None = None
    f1: float | None = None
    f1_micro: float | None = None
    ece: float | None = None
    entity_f1: float | None = None
    entity_precision: float | None = None
    entity_recall: float | None = None
    mse: float | None = None
    mae: float | None = None
    r2: float | None = None
    pearson: float | None = None
    general_loss: float | None = None
    lm_eval: dict[str, float] = field(default_factory=dict)
    """Of benchmarks, by lm_eval/<task>/<metric>."""
    tasks: dict[str, Scores] = field(default_factory=dict)

    @property
    def perplexity(self) -> float | None:
        """Of a model that writes: of a loss per token, not per pair or per text."""
        return perplexity(self.loss) if self.loss is not None and self.is_per_token else None

    @property
    def is_per_token(self) -> bool:
        """Whether the loss is of a text's tokens, not of compared answers, labels or numbers."""
        return self.reward_margin is None and self.ece is None and self.mse is None

    def values(self) -> dict[str, float]:
        """What was measured, by name, in the order of METRICS; then of benchmarks."""
        pairs = ((name, getattr(self, name, None)) for name in METRICS)
        return {name: value for name, value in pairs if value is not None} | self.lm_eval

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, without what is not finite. `from_json` reads it back."""
        values: dict[str, Any] = {name: value for name, value in self.values().items() if math.isfinite(value)}
        return values | ({"tasks": {name: task.to_json() for name, task in self.tasks.items()}} if self.tasks else {})

    @classmethod
    def of(cls, measured: Mapping[str, float]) -> Scores:
        return cls(**dict[str, Any](measured))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Scores:
        tasks = {name: cls.from_json(task) for name, task in values.get("tasks", {}).items()}
        measured = {name: value for name, value in values.items() if name not in {"tasks", "perplexity"}}
        lm_eval = {name: measured.pop(name) for name in list(measured) if name.startswith(LM_EVAL)}
        return cls(**measured, lm_eval=lm_eval, tasks=tasks)


def score(
    measured: Mapping[str, float],
    *,
    by_task: Mapping[str, Mapping[str, float]],
    predictions: Sequence[str] = (),
    answers: Sequence[str] = (),
    tasks: Sequence[str] = (),
    labels: Sequence[str] = (),
    numeric: Collection[str] = (),
    general_loss: float | None = None,
) -> Scores:
    """Scores of the whole cluster: what the objective measured, over all rows and by task, and what answers say.

    `answers` are in step with their `tasks`; those of the tasks `numeric` are compared by number too. Per-task scores
    are given where there is more than one task.
    """
    told: dict[str, Scores] = {}
    names = dict.fromkeys([*by_task, *tasks])
    numbers = numbered(answers, tasks, numeric)
    if len(names) > 1:
        for name in names:
            mine = [index for index, task in enumerate(tasks) if task == name]
            expected = [answers[i] for i in mine]
            counted = numbered(expected, [name] * len(mine), numeric)
            said = answer_scores([predictions[i] for i in mine], expected, labels, counted)
            told[name] = Scores.of({**said, **by_task.get(name, {})})
    whole = Scores.of({**answer_scores(predictions, answers, labels, numbers), **measured})
    return replace(whole, general_loss=general_loss, tasks=told)


@dataclass(frozen=True)
class Change:
    """One line of the table. `better` is None where nothing changed or one side was not measured."""

    metric: str
    base: float | None
    tuned: float | None

    @property
    def change(self) -> float | None:
        return None if self.base is None or self.tuned is None else self.tuned - self.base

    @property
    def better(self) -> bool | None:
        if not self.change or math.isnan(self.change):
            return None
        return (self.change < 0) == (about(self.metric).best == "low")


@dataclass(frozen=True)
class GateResult:
    """`value` is what was measured, `bound` what it was held against; None is not measured, which does not pass."""

    rule: str
    value: float | None
    bound: float | None
    passed: bool


@dataclass(frozen=True)
class Comparison:
    before: Scores
    after: Scores
    rows: list[Change]
    tasks: dict[str, list[Change]]
    gate: list[GateResult]
    baselines: dict[int, Scores] = field(default_factory=dict)
    """What the base's answers score, untrained, with so many examples before each question."""

    @property
    def passed(self) -> bool:
        return all(result.passed for result in self.gate)

    @property
    def forgetting(self) -> float | None:
        """Rise of the loss on general text, nats per token."""
        return _forgetting(self.before, self.after)

    def of_task(self, task: str) -> Comparison:
        """The task's own scores. A rule about what no task has for itself, as forgetting, is judged by all; of a task
        that nothing scored no rule passes.
        """
        if task not in self.before.tasks or task not in self.after.tasks:
            return compare(Scores(), Scores(), [whole.rule for whole in self.gate])
        own = compare(self.before.tasks[task], self.after.tasks[task], [whole.rule for whole in self.gate])
        measured = own.after.values()
        pairs = zip(own.gate, self.gate, strict=True)
        return replace(own, gate=[mine if metric_of(mine.rule) in measured else whole for mine, whole in pairs])

    def served(self, version: str, tasks: Mapping[str, str]) -> dict[str, bool]:
        """The versions of the run that are to be served, the tasks' where it has any, and whether each may be."""
        return {ref: self.of_task(task).passed for task, ref in tasks.items()} or {version: self.passed}

    def rivals(self) -> list[tuple[str, list[float | None], float | None]]:
        """(metric, the base by number of examples, tuned) of what answers score; [] without baselines."""
        by_count = [scores.values() for _, scores in sorted(self.baselines.items())]
        tuned = self.after.values()
        shown = [name for name in RIVAL_METRICS if any(name in values for values in by_count)]
        return [(name, [values.get(name) for values in by_count], tuned.get(name)) for name in shown]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; `["gate"]` is what a version's card keeps: `{"passed": bool, "rules": [...]}`."""
        return {
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "forgetting": _finite(self.forgetting),
            **({"baselines": {str(n): one.to_json() for n, one in self.baselines.items()}} if self.baselines else {}),
            "gate": {
                "passed": self.passed,
                "rules": [
                    vars(result) | {"value": _finite(result.value), "bound": _finite(result.bound)}
                    for result in self.gate
                ],
            },
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Comparison:
        rules = [result["rule"] for result in values["gate"]["rules"]]
        baselines = {int(count): Scores.from_json(one) for count, one in values.get("baselines", {}).items()}
        before, after = Scores.from_json(values["before"]), Scores.from_json(values["after"])
        return compare(before, after, rules, baselines=baselines)


def compare(
    before: Scores, after: Scores, gate: Sequence[str] = (), *, baselines: Mapping[int, Scores] | None = None
) -> Comparison:
    """Every metric that either side measured, per task too, and what the gate's rules say of `after`."""
    rows = _changes(before, after)
    tasks = {
        name: _changes(before.tasks.get(name, Scores()), after.tasks.get(name, Scores()))
        for name in dict.fromkeys([*before.tasks, *after.tasks])
    }
    judged = [_judge(rule, before, after) for rule in gate]
    return Comparison(before, after, rows, tasks, judged, dict(sorted((baselines or {}).items())))


def win_rate(tuned: Sequence[float], base: Sequence[float]) -> float:
    """Share of the answers to the same questions that are worth more than the base's; a tie is half."""
    pairs = list(zip(tuned, base, strict=True))
    return sum((mine > theirs) + (mine == theirs) / 2 for mine, theirs in pairs) / len(pairs)


def check_gate(gate: Sequence[str]) -> None:
    """Raises ConfigError for rules about a metric that does not exist: better before a run than after it."""
    problems = []
    for index, rule in enumerate(gate):
        metric = metric_of(rule)
        if metric not in METRICS and not metric.startswith(LM_EVAL):
            near = difflib.get_close_matches(metric, METRICS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(METRICS)}"
            problems.append((f"evaluate.gate.{index}", f"no metric {metric!r}; {hint}"))
    if problems:
        raise ConfigError("gate", problems)


def about(metric: str) -> Metric:
    """The row of METRICS, or what is known of a benchmark's score by its name."""
    if metric in METRICS:
        return METRICS[metric]
    kind = metric.removeprefix(LM_EVAL).partition("/")[2].partition("/")[0]
    best: Literal["low", "high"] = "low" if kind in LM_EVAL_LOW else "high"
    return Metric(metric, best, "share" if kind in LM_EVAL_SHARES else "number", "of lm-evaluation-harness")


def metric_of(rule: str) -> str:
    """The metric that a rule of the gate is about."""
    return _read(rule)[0]


def written(metric: str, value: float | None, *, signed: bool = False) -> str:
    """A value as people read it: shares as percent, changes of shares as percentage points, the rest with 3 digits."""
    if value is None:
        return "–"
    sign = "+" if signed else ""
    if about(metric).form == "share":
        return f"{100 * value:{sign}.1f} {'pp' if signed else '%'}".replace("-", "−")
    if abs(value) >= 1e5 and math.isfinite(value):
        return f"{value:{sign}.2e}".replace("-", "−")
    digits = 3 if abs(value) < 100 else 1
    return f"{value:{sign},.{digits}f}".replace("-", "−")


def with_examples(count: int) -> str:
    """A baseline's name in a table."""
    return "base, no example" if not count else f"base, {count} example{'s' if count > 1 else ''}"


def _changes(before: Scores, after: Scores) -> list[Change]:
    old, new = before.values(), after.values()
    names = [name for name in METRICS if name in old or name in new]
    benchmarks = dict.fromkeys([*before.lm_eval, *after.lm_eval])
    return [Change(name, old.get(name), new.get(name)) for name in [*names, *benchmarks]]


def _judge(rule: str, before: Scores, after: Scores) -> GateResult:
    metric, sign, against = _read(rule)
    if metric == "forgetting":
        value, base = _forgetting(before, after), _forgetting(before, before)
    else:
        value, base = after.values().get(metric), before.values().get(metric)
    bound = base if against == "base" else float(against)
    passed = value is not None and bound is not None and bool(COMPARE[sign](value, bound))
    return GateResult(" ".join((metric, sign, against)), value, bound, passed)


def _read(rule: str) -> tuple[str, str, str]:
    match = GATE_PATTERN.fullmatch(rule)
    assert match, f"the run file's schema lets no rule pass that does not read: {rule!r}"
    return match[1], match[2], match[3]


def _forgetting(before: Scores, after: Scores) -> float | None:
    if before.general_loss is None or after.general_loss is None:
        return None
    return after.general_loss - before.general_loss


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
