"""The `objective` section: what is optimised. One class a kind; what each computes is objectives/."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from ftray.config.section import Section


class ObjectiveSection(Section):
    """`decides`: the keys on which prepared data depends; the others change the loss, not the tokens.

    `reads`: the base reads, under a head of its own, instead of writing.
    """

    decides: ClassVar[frozenset[str]] = frozenset({"kind"})
    reads: ClassVar[bool] = False
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


class Classification(ObjectiveSection):
    """The right one of some labels for a text, or with `multi_label` each that fits."""

    decides: ClassVar[frozenset[str]] = frozenset({"kind", "multi_label", "labels"})
    reads: ClassVar[bool] = True
    kind: Literal["classification"] = "classification"
    multi_label: bool = Field(False, description="a text may have several labels, or none: a list, or a|b")
    labels: list[str] = Field(default_factory=list, description="every label; none: those of the training rows, sorted")
    class_weights: Literal["none", "balanced"] = Field(
        "none", description="balanced: rare labels weigh as much as frequent ones"
    )

    @field_validator("labels")
    @classmethod
    def _each_once(cls, value: list[str]) -> list[str]:
        if twice := next((label for label in value if value.count(label) > 1), None):
            raise ValueError(f"{twice!r} stands there twice")
        if len(value) == 1:
            raise ValueError("one label alone tells nothing apart; name two or more, or leave it out")
        return value


class Regression(ObjectiveSection):
    """A number for a text."""

    reads: ClassVar[bool] = True
    kind: Literal["regression"] = "regression"


Objective = Annotated[Sft | Pretrain | Classification | Regression, Field(discriminator="kind")]
