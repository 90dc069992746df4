"""What every section of a run file is: frozen, with no key that the schema does not know."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

NAME_PATTERN = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,62}[a-z0-9])?")
REF_PATTERN = re.compile(rf"(?:{NAME_PATTERN.pattern})(?:@(?:{NAME_PATTERN.pattern}))?")


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", str_strip_whitespace=True, protected_namespaces=(), allow_inf_nan=False
    )

    @classmethod
    def kept(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """What was written down of one, as it would be written today: keys that it did not know yet have defaults."""
        try:
            return cls.model_validate(values).model_dump(mode="json")
        except ValidationError:  # a key of then means nothing today: it differs from whatever is asked
            return dict(values)


def version_ref(value: str | None) -> str | None:
    """For keys that may name a version of the registry."""
    if value is not None and not REF_PATTERN.fullmatch(value):
        raise ValueError(f"{value!r} names no version; write name, name@v2 or name@prod")
    return value
