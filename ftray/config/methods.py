"""The `method` section: how weights adapt. One class a kind; what a base must have for it is checked by models/."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, field_validator

from ftray.config.section import Section, version_ref

Targets: TypeAlias = Literal["auto"] | list[str]

_EVERY_LINEAR = "module names; auto: every linear layer but the head"


class Full(Section):
    kind: Literal["full"] = "full"


class Freeze(Section):
    kind: Literal["freeze"] = "freeze"
    last_layers: int = Field(2, ge=0, description="so many of the last blocks are trained")
    train: list[str] = Field(default_factory=list, description="patterns of parameter names that are trained too")
    embeddings: bool = Field(False, description="train the input embeddings")
    norms: bool = Field(False, description="train every normalisation layer")
    head: bool = Field(False, description="train the output layer")


class Lora(Section):
    kind: Literal["lora"] = "lora"
    rank: int = Field(16, ge=1, description="rank of the update")
    alpha: float | None = Field(None, gt=0, description="scale; twice the rank unless said")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the adapter's input")
    targets: Targets = Field("auto", description=_EVERY_LINEAR)
    rslora: bool = Field(False, description="scale by alpha/sqrt(rank) (arXiv 2312.03732)")
    dora: bool = Field(False, description="learn magnitude apart from direction (arXiv 2402.09353)")
    init: Literal["default", "gaussian", "orthogonal", "pissa"] = Field("default", description="how A and B begin")
    modules_to_save: list[str] = Field(default_factory=list, description="modules trained whole beside the adapter")
    bits: Literal[4, 8] | None = Field(None, description="4: QLoRA, an NF4 base with double quantisation; 8: int8")


class AdaLora(Section):
    """LoRA whose ranks move to the layers that need them (arXiv 2303.10512); its versions are plain LoRA."""

    kind: Literal["adalora"] = "adalora"
    rank: int = Field(8, ge=1, description="mean rank of a layer at the end")
    start_rank: int | None = Field(None, ge=2, description="rank of every layer at first; half as much again")
    alpha: float | None = Field(None, gt=0, description="scale; twice the start rank unless said")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the adapter's input")
    targets: Targets = Field("auto", description=_EVERY_LINEAR)
    orthogonality: float = Field(0.1, ge=0, description="weight of the penalty that keeps directions apart")

    @property
    def first_rank(self) -> int:
        return self.start_rank if self.start_rank is not None else self.rank + -(-self.rank // 2)


class LoHa(Section):
    """Updates that are products, entry by entry, of two low-rank ones (arXiv 2108.06098)."""

    kind: Literal["loha"] = "loha"
    rank: int = Field(8, ge=1, description="rank of each factor; that of the update reaches its square")
    alpha: float | None = Field(None, gt=0, description="scale; the rank unless said")
    targets: Targets = Field("auto", description=_EVERY_LINEAR)


class LoKr(Section):
    """Updates that are Kronecker products (arXiv 2212.10650, 2309.14859)."""

    kind: Literal["lokr"] = "lokr"
    rank: int = Field(8, ge=1, description="rank of the larger factor")
    alpha: float | None = Field(None, gt=0, description="scale; the rank unless said")
    factor: int | None = Field(None, ge=2, description="size of the smaller factor; near the square root unless said")
    targets: Targets = Field("auto", description=_EVERY_LINEAR)


class Ia3(Section):
    """Scales on keys, values and the inner activation (arXiv 2205.05638)."""

    kind: Literal["ia3"] = "ia3"
    targets: Targets = Field("auto", description="module names; auto: keys, values and the MLP's last layer")


class Oft(Section):
    """Rotations of blocks of each layer's input (arXiv 2306.07280)."""

    kind: Literal["oft"] = "oft"
    block: int = Field(32, ge=2, description="size of the blocks; must divide the layers' inputs")
    targets: Targets = Field("auto", description=_EVERY_LINEAR)


class Vera(Section):
    """Two vectors a layer around random matrices that all share (arXiv 2310.11454)."""

    kind: Literal["vera"] = "vera"
    rank: int = Field(256, ge=1, description="rank of the shared matrices, which do not learn")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the adapter's input")
    targets: Targets = Field("auto", description=_EVERY_LINEAR)


class Norms(Section):
    """Every normalisation layer (arXiv 2312.11420)."""

    kind: Literal["norms"] = "norms"


class Tokens(Section):
    """The embeddings of chosen tokens."""

    kind: Literal["tokens"] = "tokens"
    tokens: list[str | int] = Field(min_length=1, description="tokens of the base's vocabulary, as text or by id")


class Bottleneck(Section):
    """Small networks inside the blocks: Houlsby (arXiv 1902.00751), Pfeiffer (2005.00052), parallel (2110.04366)."""

    kind: Literal["bottleneck"] = "bottleneck"
    size: int = Field(64, ge=1, description="width of the bottleneck")
    placement: Literal["houlsby", "pfeiffer", "parallel"] = Field(
        "houlsby", description="after attention and MLP, after the MLP, or beside it"
    )
    activation: Literal["relu", "gelu", "silu"] = Field("relu", description="inside the bottleneck")
    scale: float = Field(1.0, gt=0, description="of what it adds; 4 is usual for parallel")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the adapter's input")
    targets: Targets = Field("auto", description="modules that get one; auto: by placement")


class Prefix(Section):
    """Learnt keys and values before each layer's own (arXiv 2101.00190)."""

    kind: Literal["prefix"] = "prefix"
    tokens: int = Field(20, ge=1, description="virtual tokens before the text")
    projection: int | None = Field(None, ge=1, description="width of an MLP that makes them while training; none: none")


class Prompt(Section):
    """Learnt embeddings before the text (arXiv 2104.08691)."""

    kind: Literal["prompt"] = "prompt"
    tokens: int = Field(20, ge=1, description="virtual tokens before the text")
    text: str | None = Field(None, description="they begin as this text's embeddings; none: as random tokens'")
    begin: str | None = Field(None, description="they begin as a version's of prompt tuning, e.g. support-tasks@v1")

    _begin_is_a_version = field_validator("begin")(version_ref)


class MultitaskPrompt(Section):
    """A prompt that all tasks share, times a matrix of low rank for each of them (MPT, arXiv 2303.02861).

    The tasks are those that data.sources name. Each task's prompt becomes a version of prompt tuning, and so does what
    they share, with which a new task begins.
    """

    kind: Literal["multitask_prompt"] = "multitask_prompt"
    tokens: int = Field(20, ge=1, description="virtual tokens before the text")
    rank: int = Field(1, ge=1, description="of each task's own matrix")
    text: str | None = Field(None, description="they begin as this text's embeddings; none: as random tokens'")


class PTuning(Section):
    """Learnt embeddings before the text, made by an MLP while training (arXiv 2103.10385)."""

    kind: Literal["p_tuning"] = "p_tuning"
    tokens: int = Field(20, ge=1, description="virtual tokens before the text")
    width: int = Field(128, ge=1, description="of the MLP")


class Feature(Section):
    """The base is frozen and reads each text once; a head learns from the embeddings that it gave."""

    kind: Literal["feature"] = "feature"
    pooling: Literal["auto", "mean", "cls", "last"] = Field(
        "auto", description="of the tokens' vectors; auto: as the base's files say, else the mean"
    )
    hidden: int | None = Field(None, ge=1, description="width of a layer between embedding and labels; none: none")
    dropout: float = Field(0.0, ge=0, lt=1, description="on what each of the head's layers reads")


Method = Annotated[
    Full
    | Freeze
    | Lora
    | AdaLora
    | LoHa
    | LoKr
    | Ia3
    | Oft
    | Vera
    | Norms
    | Tokens
    | Bottleneck
    | Prefix
    | Prompt
    | MultitaskPrompt
    | PTuning
    | Feature,
    Field(discriminator="kind"),
]

PROMPTS = (Prefix, Prompt, MultitaskPrompt, PTuning)
"""Methods that put virtual tokens before each example."""


def is_adapter(method: Method) -> bool:
    """Whether a version is a folder for PEFT, beside its base; else it is a whole model."""
    return not isinstance(method, Full | Freeze)


def shards(method: Method) -> bool:
    """Whether ZeRO 3 may shard what learns."""
    return isinstance(method, Full | Freeze | Lora)
