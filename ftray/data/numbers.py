"""The number that an answer ends in: what a reward and an evaluation compare. Functions of texts, no torch."""

from __future__ import annotations

import re
from decimal import Decimal

NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)")
FINAL = "####"  # GSM8K writes the number that counts behind it
BARE = re.compile(rf"\s*[$€£¥]?\s*(?:{NUMBER.pattern})\s*%?\s*\.?\s*")


def last_number(text: str) -> Decimal | None:
    """The last number of a text, behind the last #### if there is one; commas group thousands."""
    found = NUMBER.findall(text.rpartition(FINAL)[2]) or NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def same_number(answer: str, reference: str) -> bool:
    """Whether both end in the same number: 18, 18.0 and $18. are the same. False where `reference` has none."""
    wanted = last_number(reference)
    return wanted is not None and last_number(answer) == wanted


def is_number(text: str) -> bool:
    """Whether a text is a number and no more than a currency or % beside it, or ends in one behind ####."""
    return BARE.fullmatch(text.rpartition(FINAL)[2]) is not None
