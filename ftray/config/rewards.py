"""The `rewards` of an objective that learns by them. One class a kind; what each gives is objectives/rewards.py."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from ftray.config.section import Section, version_ref

FUNCTION = re.compile(r"(?P<file>[^:]+\.py|[A-Za-z_][\w.]*):(?P<name>[A-Za-z_]\w*)")


def file_of(match: re.Match[str]) -> str:
    """The file of a FUNCTION, which may be written as a module."""
    written = match["file"]
    return written if written.endswith(".py") else f"{written.replace('.', '/')}.py"


class RewardSection(Section):
    """`compares`: with the row's reference answer, which every row must then have. `decides_right`: 1 is a right
    answer, so the share of them is worth a score of its own."""

    compares: ClassVar[bool] = False
    decides_right: ClassVar[bool] = False
    kind: str
    weight: float = Field(1.0, description="what it counts in the sum")


class ExactMatch(RewardSection):
    """1 where the answer is the reference up to white space, else 0."""

    compares: ClassVar[bool] = True
    decides_right: ClassVar[bool] = True
    kind: Literal["exact_match"] = "exact_match"


class Numeric(RewardSection):
    """1 where the last number of the answer is that of the reference (GSM8K: the one after ####), else 0."""

    compares: ClassVar[bool] = True
    decides_right: ClassVar[bool] = True
    kind: Literal["numeric"] = "numeric"


class Regex(RewardSection):
    """1 where the pattern is found in the answer, else 0."""

    kind: Literal["regex"] = "regex"
    pattern: str = Field(description="a regular expression of Python's, searched for anywhere in the answer")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"{value!r} is no regular expression: {error}") from None
        return value


class JsonSchema(RewardSection):
    """1 where the whole answer is JSON that fits a schema, else 0."""

    kind: Literal["json_schema"] = "json_schema"
    fits: dict[str, Any] = Field(description="the JSON schema, e.g. {type: object, required: [name]}")


class Length(RewardSection):
    """0 up to so many tokens, then falling in a line to -1 at twice as many and beyond."""

    kind: Literal["length"] = "length"
    tokens: int = Field(ge=1, description="an answer may have so many without a penalty")


class Python(RewardSection):
    """A function of your own: answer -> number. It runs with the rights of the workers."""

    kind: Literal["python"] = "python"
    function: str = Field(
        description="file.py:name or module:name beside the run file, called with prompt, answer, reference"
    )
    trusted: bool = Field(False, description="true: I have read that code, and workers may run it")

    @field_validator("function")
    @classmethod
    def _names_a_function(cls, value: str) -> str:
        """As file.py:name, however it was written."""
        match = FUNCTION.fullmatch(value)
        if not match:
            raise ValueError(f"{value!r} names no function; write file.py:name or module:name")
        return f"{file_of(match)}:{match['name']}"

    @property
    def file(self) -> str:
        return self.function.rpartition(":")[0]

    @property
    def name(self) -> str:
        return self.function.rpartition(":")[2]


class ByVersion(RewardSection):
    """What a reward model of the registry says, as it comes: a number without bounds."""

    kind: Literal["version"] = "version"
    version: str = Field(description="name@v1 of a version with objective reward; name alone: the newest, or prod")

    _names_a_version = field_validator("version")(version_ref)


Reward = Annotated[ExactMatch | Numeric | Regex | JsonSchema | Length | Python | ByVersion, Field(discriminator="kind")]
