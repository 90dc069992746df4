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


Objective = Annotated[Sft | Pretrain, Field(discriminator="kind")]
