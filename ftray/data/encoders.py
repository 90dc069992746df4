"""Which encoder makes an objective's examples: one row a kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ftray.config.objectives import ObjectiveSection
from ftray.config.schema import Data
from ftray.data.encode import Encoder
from ftray.data.encode_preferences import JudgedEncoder, PairEncoder, RewardEncoder
from ftray.data.labelled import label_encoder
from ftray.data.prompts import PromptEncoder
from ftray.data.tagged import tag_encoder


def encoder_for(data: Data, objective: ObjectiveSection, tokenizer: Any) -> Encoder:
    return ENCODERS[objective.kind](data, objective, tokenizer)


def _language(data: Data, objective: Any, tokenizer: Any) -> Encoder:
    return Encoder(
        tokenizer,
        objective="pretrain" if objective.kind == "pretrain" else "sft",
        train_on=getattr(objective, "train_on", "all"),
        max_length=data.max_length,
        too_long=data.too_long,
        few_shot=data.few_shot,
    )


def _pairs(data: Data, objective: Any, tokenizer: Any) -> Encoder:
    return PairEncoder(tokenizer, objective=objective.kind, max_length=data.max_length, too_long=data.too_long)


def _judged(data: Data, objective: Any, tokenizer: Any) -> Encoder:
    return JudgedEncoder(tokenizer, objective=objective.kind, max_length=data.max_length, too_long=data.too_long)


def _compared(data: Data, objective: Any, tokenizer: Any) -> Encoder:
    return RewardEncoder(tokenizer, objective=objective.kind, max_length=data.max_length, too_long=data.too_long)


def _prompts(data: Data, objective: Any, tokenizer: Any) -> Encoder:
    return PromptEncoder(tokenizer, max_length=data.max_length, few_shot=data.few_shot, room=objective.max_new_tokens)


ENCODERS: dict[str, Callable[[Data, Any, Any], Encoder]] = {
    "sft": _language,
    "pretrain": _language,
    "distill": _language,
    "dpo": _pairs,
    "orpo": _pairs,
    "kto": _judged,
    "reward": _compared,
    "grpo": _prompts,
    "rloo": _prompts,
    "ppo": _prompts,
    "classification": label_encoder,
    "regression": label_encoder,
    "token_classification": tag_encoder,
}
