"""The `objective` section: what is optimised. One class a kind; what each computes is objectives/."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ftray.config.section import Section


class ObjectiveSection(Section):
    """`decides`: the keys on which prepared data depends; the others change the loss, not the tokens."""

    decides: ClassVar[frozenset[str]] = frozenset({"kind"})
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


Objective = Annotated[Sft | Pretrain | Distill, Field(discriminator="kind")]
