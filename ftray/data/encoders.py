"""Which encoder makes an objective's examples: one row a kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ftray.config.objectives import ObjectiveSection, Sft
from ftray.config.schema import Data
from ftray.data.encode import Encoder
from ftray.data.labelled import label_encoder


def encoder_for(data: Data, objective: ObjectiveSection, tokenizer: Any) -> Encoder:
    return ENCODERS[objective.kind](data, objective, tokenizer)


def _language(data: Data, objective: Any, tokenizer: Any) -> Encoder:
    return Encoder(
        tokenizer,
        objective=objective.kind,
        train_on=objective.train_on if isinstance(objective, Sft) else "all",
        max_length=data.max_length,
        too_long=data.too_long,
        few_shot=data.few_shot,
    )


ENCODERS: dict[str, Callable[[Data, Any, Any], Encoder]] = {
    "sft": _language,
    "pretrain": _language,
    "classification": label_encoder,
    "regression": label_encoder,
}
