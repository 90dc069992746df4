"""The bodies of requests, as OpenAI's clients send them, with the bounds that this server keeps.

Three kinds of keys are not fields: `harmless` ones change nothing about an answer and are dropped; `refused` ones
would change it, so each is an error with the way out, unless its value says nothing; any other is unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MAX_MESSAGES = 4096
MAX_PROMPTS = 64
MAX_TEXTS = 2048
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_BIASES = 1024
MAX_SEED = 2**63 - 1

_HARMLESS = frozenset(
    {
        "metadata",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)


def _without_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("holds the character U+0000, which no tokenizer was trained on; take it out")
    return text


def _at_most(most: int) -> Callable[[Any], Any]:
    """Looks at the number of entries before it is looked at each of them. A list of ids is one text."""

    def check(value: Any) -> Any:
        is_one_text = isinstance(value, list) and bool(value) and isinstance(value[0], int)
        if isinstance(value, list | dict) and len(value) > most and not is_one_text:
            raise ValueError(f"has {len(value)} entries; at most {most} are taken")
        return value

    return check


Text = Annotated[str, AfterValidator(_without_nul)]
Name = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_without_nul)]
Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(fail_fast=True)]
NonEmptyIds = Annotated[Ids, Field(min_length=1)]
Texts = Annotated[list[Text], Field(fail_fast=True)]
Forms = (
    Text
    | Annotated[Texts, Field(min_length=1)]
    | NonEmptyIds
    | Annotated[list[NonEmptyIds], Field(min_length=1, fail_fast=True)]
)
"""A text, several, token ids, or several lists of them."""
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS), AfterValidator(_without_nul)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())

    harmless: ClassVar[frozenset[str]] = frozenset()
    refused: ClassVar[Mapping[str, str]] = {}
    same_as_nothing: ClassVar[Mapping[str, tuple[Any, ...]]] = {}


class StreamOptions(Body):
    include_usage: bool | None = Field(None, description="a last chunk with the tokens used")
    include_obfuscation: bool | None = Field(None, description="taken, and does nothing")


class Generating(Body):
    """What chat and completions share."""

    harmless = _HARMLESS - {"user", "safety_identifier"}

    model: Name = Field(description="the base, name, name@v3 or name@alias")
    n: int | None = Field(None, ge=1, le=128, description="so many answers")
    stream: bool | None = Field(None, description="send the answer piece by piece (server-sent events)")
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31, description="0 and -1 cut nothing")
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10, description="over prompt and answer; 1: none")
    logit_bias: Annotated[
        dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None,
        BeforeValidator(_at_most(MAX_BIASES)),
    ] = Field(None, description="token id: what is added to its logit")
    seed: int | None = Field(None, ge=-MAX_SEED, le=MAX_SEED, description="answer k of n uses seed + k")
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    stop_token_ids: Annotated[Ids, Field(max_length=MAX_STOPS)] | None = None
    max_tokens: int | None = Field(None, ge=1, lt=2**31, description="of each answer; none: what fits")
    min_tokens: int | None = Field(None, ge=0, lt=2**31)
    ignore_eos: bool | None = Field(None, description="go on to max_tokens; for measuring")
    user: Text | None = Field(None, description="requests of one user stay on one side of a split")
    safety_identifier: Text | None = Field(None, description="the same as `user`")

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Generating:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only taken with stream: true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def who(self) -> str | None:
        return self.safety_identifier or self.user

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ContentPart(Body):
    type: Name
    text: Text | None = None

    @model_validator(mode="after")
    def _is_text(self) -> ContentPart:
        if self.type != "text" or self.text is None:
            raise ValueError(f"a part of type {self.type!r} is not served; only {{type: text, text: …}} is")
        return self


class Message(Body):
    """One turn. Keys that clients send back from an earlier answer are taken where they are empty."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Text | Annotated[list[ContentPart], Field(min_length=1, fail_fast=True)],
        BeforeValidator(_at_most(MAX_MESSAGES)),
    ]
    name: Name | None = None

    @model_validator(mode="after")
    def _says_nothing_else(self) -> Message:
        for key, value in (self.model_extra or {}).items():
            if value not in (None, [], {}):
                raise ValueError(f"{key[:64]!r} is not served; a message is a role and its text")
        return self

    def for_template(self) -> dict[str, str]:
        content = self.content if isinstance(self.content, str) else "".join(part.text or "" for part in self.content)
        turn = {"role": "system" if self.role == "developer" else self.role, "content": content}
        return turn if self.name is None else {**turn, "name": self.name}


class ChatBody(Generating):
    """POST /v1/chat/completions"""

    harmless = Generating.harmless | {"parallel_tool_calls"}
    refused = {
        "tools": "calling tools is not served; describe them in a message and read the answer yourself",
        "tool_choice": "calling tools is not served; leave it out",
        "functions": "calling functions is not served; describe them in a message and read the answer yourself",
        "function_call": "calling functions is not served; leave it out",
        "response_format": "only text is served; ask for the format in a message and check the answer",
        "audio": "only text is served",
        "modalities": "only text is served",
        "prediction": "predicted outputs are not served; leave it out",
        "reasoning_effort": "is not served; leave it out",
        "verbosity": "is not served; leave it out",
        "web_search_options": "the server has no web; leave it out",
    }
    same_as_nothing = {
        "tool_choice": ("none", "auto"),
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
    }

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True), BeforeValidator(_at_most(MAX_MESSAGES))]
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31, description="the newer name of max_tokens")
    logprobs: bool | None = Field(None, description="with each token its log-probability")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="and of so many others at its place")

    @model_validator(mode="after")
    def _agrees(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only taken with logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        return self

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(Generating):
    """POST /v1/completions"""

    refused = {
        "suffix": "filling in the middle is not served; leave it out",
        "best_of": "choosing among answers is not served; ask for n and choose yourself",
    }
    same_as_nothing = {"best_of": (1,), "suffix": ("",)}

    prompt: Annotated[Forms, BeforeValidator(_at_most(MAX_PROMPTS))] = Field(
        description="a text, token ids, or several of either"
    )
    echo: bool | None = Field(None, description="begin each answer with its prompt")
    logprobs: int | None = Field(None, ge=0, le=20, description="log-probabilities, and of so many others")

    @model_validator(mode="after")
    def _agrees(self) -> CompletionBody:
        if self.echo and self.logprobs is not None:
            raise ValueError("logprobs of the prompt are not computed; leave out echo or logprobs")
        return self

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        return several(self.prompt)


class EmbeddingBody(Body):
    """POST /v1/embeddings"""

    harmless = _HARMLESS

    model: Name = Field(description="the base, name, name@v3 or name@alias")
    input: Annotated[Forms, BeforeValidator(_at_most(MAX_TEXTS))] = Field(
        description="a text, token ids, or several of either"
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1, lt=2**31, description="keep so many, and scale them to length 1")

    @property
    def inputs(self) -> list[str] | list[list[int]]:
        return several(self.input)


class ClassifyBody(Body):
    """POST /v1/classify"""

    harmless = _HARMLESS

    model: Name = Field(description="a classification version: name, name@v3 or name@alias")
    input: Annotated[Text | Annotated[Texts, Field(min_length=1)], BeforeValidator(_at_most(MAX_TEXTS))]

    @property
    def inputs(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input


class RefBody(Body):
    """POST /v1/adapters/load, unload, pin, unpin"""

    model: Name = Field(description="name, name@v3 or name@alias")


class PromoteBody(Body):
    """POST /v1/adapters/promote"""

    model: Name = Field(description="name@v3; a bare name is its newest version")
    alias: Name = "prod"
    force: bool = Field(False, description="although it did not pass its gate")
    expect: int | None = Field(None, ge=0, lt=2**31, description="only if the alias's last move is still this one")


class RollbackBody(Body):
    """POST /v1/adapters/rollback"""

    name: Name
    alias: Name = "prod"


class SplitBody(Body):
    """POST /v1/adapters/split"""

    name: Name
    alias: Name = "prod"
    weights: Annotated[
        dict[Name, Annotated[float, Field(gt=0)]], Field(min_length=1), BeforeValidator(_at_most(MAX_BIASES))
    ] = Field(description="version: share of the requests, e.g. {v3: 0.9, v4: 0.1}")
    force: bool = Field(False, description="although one did not pass its gate")
    expect: int | None = Field(None, ge=0, lt=2**31, description="only if the alias's last move is still this one")


def several(given: str | list[str] | list[int] | list[list[int]]) -> list[str] | list[list[int]]:
    """One text or one list of ids as a list of one."""
    if isinstance(given, str):
        return [given]
    if isinstance(given[0], int):
        return [given]  # type: ignore[list-item]
    return given  # type: ignore[return-value]
