"""What every section of a run file is: frozen, with no key that the schema does not know."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", str_strip_whitespace=True, protected_namespaces=(), allow_inf_nan=False
    )
