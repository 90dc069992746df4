"""The `objective` section: what is optimised. One class a kind; what each computes is objectives/."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ftray.config.section import Section


class ObjectiveSection(Section):
    """`decides`: the keys on which prepared data depends; the others change the loss, not the tokens.

    `sequences`: texts of at most data.max_length tokens that an example holds. `pace`: of the rate that suits the
    method, the share that `optim.lr: auto` takes.
    """

    decides: ClassVar[frozenset[str]] = frozenset({"kind"})
    sequences: ClassVar[int] = 1
    pace: ClassVar[float] = 1.0
    kind: str


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
    kind: Literal["orpo"] = "orpo"
    beta: float = Field(0.1, gt=0, description="weight of the odds ratio beside the chosen answer's loss")


class Kto(ObjectiveSection):
    """Answers that are good or bad, not in pairs (arXiv 2402.01306)."""

    sequences: ClassVar[int] = 1
    pace: ClassVar[float] = 0.1
    kind: Literal["kto"] = "kto"
    beta: float = Field(0.1, gt=0, description="how closely the base is kept to; small moves further away")
    desirable_weight: float = Field(1.0, ge=0, description="of good answers; raise it where they are few")
    undesirable_weight: float = Field(1.0, ge=0, description="of bad answers; raise it where they are few")


PREFERENCES = (Dpo, Orpo, Kto)
"""Objectives that compare answers."""

Objective = Annotated[Sft | Pretrain | Distill | Dpo | Orpo | Kto, Field(discriminator="kind")]
