"""What a version of feature tuning is as files: a head beside whatever base it was trained on. No torch.

head.json          how the base's vectors are made, and the head's shape
head.safetensors   its weights, fp32
labels.json        the labels, as of every headed version (models/heads.py)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ftray.errors import ModelError

HEAD, HEAD_CONFIG = "head.safetensors", "head.json"

Pooling = Literal["mean", "cls", "last"]
"""How the tokens' vectors become the text's: their mean, the first, or the last one."""


@dataclass(frozen=True)
class HeadFile:
    """head.json. `width` of a vector, `hidden` of the layer between, `labels`: rows of the last layer."""

    pooling: Pooling
    width: int
    hidden: int | None
    labels: int

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> HeadFile:
        """ModelError where it is none."""
        pooling, hidden = document.get("pooling"), document.get("hidden")
        numbers = [document.get("width"), document.get("labels"), *([hidden] if hidden is not None else [])]
        if pooling not in ("mean", "cls", "last") or not all(type(number) is int and number > 0 for number in numbers):
            raise ModelError(f"{HEAD_CONFIG}: its pooling, width, hidden and labels do not describe a head")
        return cls(pooling, document["width"], hidden, document["labels"])
