"""The `objective` section: what is optimised. One class a kind; what each computes is objectives/."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from ftray.config.rewards import Reward
from ftray.config.section import Section


class ObjectiveSection(Section):
    """`decides`: the keys on which prepared data depends; the others change the loss, not the tokens.

    `sequences`: texts of at most data.max_length tokens that an example holds. `pace`: of the rate that suits the
    method, the share that `optim.lr: auto` takes. `gate`: where the run says auto, what a version must pass is the
    first rule whose metric was measured. `reads`: the base reads, under a head of its own, instead of writing.
    `reports`: the metrics that held-out rows can have; those of answers come on top where the model writes.
    """

    decides: ClassVar[frozenset[str]] = frozenset({"kind"})
    sequences: ClassVar[int] = 1
    pace: ClassVar[float] = 1.0
    gate: ClassVar[tuple[str, ...]] = ("loss < base",)
    reads: ClassVar[bool] = False
    reports: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "token_accuracy")
    kind: str

    @property
    def per_row(self) -> int:
        """Examples that a row becomes."""
        return 1

    def tokens(self, length: float) -> float:
        """Tokens that pass through the model for a row of so many, counted as training passes."""
        return length


class Sft(ObjectiveSection):
    decides: ClassVar[frozenset[str]] = frozenset({"kind", "train_on"})
    kind: Literal["sft"] = "sft"
    train_on: Literal["assistant", "last", "all"] = Field(
        "assistant", description="tokens with loss: every answer, the last, all"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over the vocabulary")


class Pretrain(ObjectiveSection):
    kind: Literal["pretrain"] = "pretrain"


class Distill(ObjectiveSection):
    """Learn a larger model's distribution of each answer token (Hinton et al., arXiv 1503.02531)."""

    decides: ClassVar[frozenset[str]] = frozenset({"kind", "train_on"})
    reports: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "token_accuracy", "teacher_kl")
    kind: Literal["distill"] = "distill"
    teacher: str = Field(description="a Hub id or folder with the same tokenizer; it stands frozen in every worker")
    weight: float = Field(0.5, gt=0, le=1, description="share of the teacher in the loss; the rest is the rows' own")
    temperature: float = Field(1.0, gt=0, description="softens both distributions; above 1, rare tokens count more")
    divergence: Literal["forward", "reverse"] = Field(
        "forward", description="forward: cover what the teacher may say; reverse: what it most likely says"
    )
    train_on: Literal["assistant", "last", "all"] = Field(
        "assistant", description="tokens with loss: every answer, the last, all"
    )


class Dpo(ObjectiveSection):
    """Direct preference optimisation (arXiv 2305.18290) and losses of its kind."""

    sequences: ClassVar[int] = 2
    pace: ClassVar[float] = 0.1
    reports: ClassVar[tuple[str, ...]] = ("loss", "reward_accuracy", "reward_margin")
    kind: Literal["dpo"] = "dpo"
    beta: float = Field(0.1, gt=0, description="how closely the base is kept to; small moves further away")
    loss: Literal["sigmoid", "hinge", "ipo", "robust", "normalised"] = Field(
        "sigmoid", description="normalised: sigmoid on means per token"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="share of the pairs taken to be the wrong way round")
    sft_weight: float = Field(0.0, ge=0, description="of the chosen answer's loss per token, added; 0: none")


class Orpo(ObjectiveSection):
    """The chosen answer's loss and an odds ratio, without a reference (arXiv 2403.07691)."""

    sequences: ClassVar[int] = 2
    pace: ClassVar[float] = 0.1
    reports: ClassVar[tuple[str, ...]] = ("loss", "reward_accuracy", "reward_margin")
    kind: Literal["orpo"] = "orpo"
    beta: float = Field(0.1, gt=0, description="weight of the odds ratio beside the chosen answer's loss")


class Kto(ObjectiveSection):
    """Answers that are good or bad, not in pairs (arXiv 2402.01306)."""

    sequences: ClassVar[int] = 1
    pace: ClassVar[float] = 0.1
    reports: ClassVar[tuple[str, ...]] = ("loss", "reward_margin", "reward_auc")
    kind: Literal["kto"] = "kto"
    beta: float = Field(0.1, gt=0, description="how closely the base is kept to; small moves further away")
    desirable_weight: float = Field(1.0, ge=0, description="of good answers; raise it where they are few")
    undesirable_weight: float = Field(1.0, ge=0, description="of bad answers; raise it where they are few")


PREFERENCES = (Dpo, Orpo, Kto)
"""Objectives that compare answers."""


class RewardModel(ObjectiveSection):
    """What an answer is worth, from pairs (arXiv 2203.02155, equation 1), or from answers that are good or bad."""

    sequences: ClassVar[int] = 2
    reads: ClassVar[bool] = True
    reports: ClassVar[tuple[str, ...]] = ("loss", "reward_accuracy", "reward_margin", "reward_auc", "accuracy")
    kind: Literal["reward"] = "reward"
    center: float = Field(0.0, ge=0, description="of the squared sum of a pair's rewards, which keeps them near 0")


COMPARED = (*PREFERENCES, RewardModel)
"""Objectives that learn from rows of answers to compare."""


class Reinforcement(ObjectiveSection):
    """What they share. A step is a window of `optim.batch_size` prompts: sampled, scored, and learnt from in
    epochs x minibatches updates. Prepared data depends on the room that is left for an answer."""

    decides: ClassVar[frozenset[str]] = frozenset({"max_new_tokens"})
    gate: ClassVar[tuple[str, ...]] = ("reward > base",)
    pace: ClassVar[float] = 0.1
    reports: ClassVar[tuple[str, ...]] = ("reward", "kl")
    samples: int
    rewards: list[Reward] = Field(min_length=1, description="what an answer is worth: the sum, each by its weight")
    max_new_tokens: int = Field(128, ge=1, description="of an answer; with its prompt at most data.max_length")
    temperature: float = Field(1.0, gt=0, description="of sampling, and of the probabilities that are learnt")
    top_p: float = Field(1.0, gt=0, le=1, description="answers are sampled from the likeliest tokens of this share")
    epochs: int = Field(1, ge=1, description="passes over the answers of a step before new ones are sampled")
    minibatches: int = Field(1, ge=1, description="updates of a pass")
    beta: float = Field(0.04, ge=0, description="weight of the KL divergence to the base; 0: no base is asked")

    @property
    def updates(self) -> int:
        """Optimiser updates of a step."""
        return self.epochs * self.minibatches

    @property
    def per_row(self) -> int:
        return self.samples

    def tokens(self, length: float) -> float:
        """Sampling, and what policy and base say before the first update, take about as long as an epoch."""
        return self.samples * (self.epochs + 1) * (length + self.max_new_tokens)


class Grpo(Reinforcement):
    """Advantages by comparison inside a group of answers to one prompt (arXiv 2402.03300)."""

    kind: Literal["grpo"] = "grpo"
    samples: int = Field(8, ge=2, description="answers to each prompt: the group")
    scale_rewards: bool = Field(True, description="by the group's deviation; false: Dr. GRPO (arXiv 2503.20783)")
    loss: Literal["token", "sequence"] = Field(
        "token", description="mean over all tokens (DAPO, arXiv 2503.14476), or over answers' own means"
    )
    clip: float = Field(0.2, gt=0, lt=1, description="how far below 1 a token's probability ratio counts")
    clip_high: float | None = Field(None, gt=0, description="how far above 1; as clip unless said (DAPO: 0.28)")


class Rloo(Reinforcement):
    """REINFORCE with the other answers' mean as baseline, the KL divergence in the reward (arXiv 2402.14740)."""

    kind: Literal["rloo"] = "rloo"
    samples: int = Field(4, ge=2, description="answers to each prompt")
    clip: float = Field(0.2, gt=0, lt=1, description="how far from 1 an answer's probability ratio counts")


class Ppo(Reinforcement):
    """Clipped policy updates with a learnt value of each token (arXiv 1707.06347, 1909.08593)."""

    kind: Literal["ppo"] = "ppo"
    samples: int = Field(1, ge=1, description="answers to each prompt")
    epochs: int = Field(4, ge=1, description="passes over the answers of a step before new ones are sampled")
    beta: float = Field(0.05, ge=0, description="KL penalty of each token, taken from its reward; 0: no base is asked")
    kl_target: float | None = Field(None, gt=0, description="nats per answer; beta then adapts towards it")
    gamma: float = Field(1.0, gt=0, le=1, description="discount of later rewards, per token")
    lam: float = Field(0.95, ge=0, le=1, description="of generalised advantage estimation (arXiv 1506.02438)")
    clip: float = Field(0.2, gt=0, lt=1, description="how far from 1 a token's probability ratio counts")
    value_clip: float = Field(0.2, gt=0, description="how far a value may move from its old one")
    value_weight: float = Field(0.1, gt=0, description="of the value loss beside the policy's")
    whiten: bool = Field(True, description="advantages get mean 0 and deviation 1 over the step's tokens")


REINFORCEMENT = (Grpo, Rloo, Ppo)
"""Objectives that learn from rewards of sampled answers."""


def _each_once(value: list[str]) -> list[str]:
    if twice := next((label for label in value if value.count(label) > 1), None):
        raise ValueError(f"{twice!r} stands there twice")
    if len(value) == 1:
        raise ValueError("one label alone tells nothing apart; name two or more, or leave it out")
    return value


class Classification(ObjectiveSection):
    """The right one of some labels for a text, or with `multi_label` each that fits."""

    decides: ClassVar[frozenset[str]] = frozenset({"kind", "multi_label", "labels"})
    reads: ClassVar[bool] = True
    reports: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "precision", "recall", "f1", "f1_micro", "ece")
    kind: Literal["classification"] = "classification"
    multi_label: bool = Field(False, description="a text may have several labels, or none: a list, or a|b")
    labels: list[str] = Field(default_factory=list, description="every label; none: those of the training rows, sorted")
    class_weights: Literal["none", "balanced"] = Field(
        "none", description="balanced: rare labels weigh as much as frequent ones"
    )

    _each_once = field_validator("labels")(_each_once)


class Regression(ObjectiveSection):
    """A number for a text."""

    reads: ClassVar[bool] = True
    reports: ClassVar[tuple[str, ...]] = ("loss", "mse", "mae", "r2", "pearson")
    kind: Literal["regression"] = "regression"


class TokenClassification(ObjectiveSection):
    """A tag for each word: entities by BIO tags, or parts of speech and the like."""

    decides: ClassVar[frozenset[str]] = frozenset({"kind", "labels"})
    gate: ClassVar[tuple[str, ...]] = ("entity_f1 > base", "f1 > base")
    reads: ClassVar[bool] = True
    reports: ClassVar[tuple[str, ...]] = (
        "loss",
        "token_accuracy",
        "ece",
        "f1",
        "entity_f1",
        "entity_precision",
        "entity_recall",
    )
    kind: Literal["token_classification"] = "token_classification"
    labels: list[str] = Field(
        default_factory=list,
        description="every tag, which names tags that are numbers; none: those of the training rows",
    )
    _each_once = field_validator("labels")(_each_once)


Objective = Annotated[
    Sft
    | Pretrain
    | Distill
    | Dpo
    | Orpo
    | Kto
    | RewardModel
    | Grpo
    | Rloo
    | Ppo
    | Classification
    | Regression
    | TokenClassification,
    Field(discriminator="kind"),
]
