"""The run file's schema: what a user may write, with defaults that work. No torch, no ray.

Sections are frozen, reject unknown keys, and say in their descriptions what each key does; `ftray init` prints those
descriptions as comments. `"auto"` values are resolved before a run starts, printed, and stored with the run.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, PrivateAttr, field_validator, model_validator

from ftray.config.agreement import disagreements
from ftray.config.methods import (
    AdaLora,
    Feature,
    Freeze,
    Full,
    Lora,
    Method,
    Prompt,
)
from ftray.config.objectives import (
    REINFORCEMENT,
    Classification,
    Objective,
    Pretrain,
    Regression,
    Sft,
)
from ftray.config.section import NAME_PATTERN, REF_PATTERN, Section, version_ref

__all__ = [
    "NAME_PATTERN",
    "REF_PATTERN",
    "AdaLora",
    "Auto",
    "Classification",
    "Feature",
    "Freeze",
    "Full",
    "Lora",
    "Method",
    "Model",
    "Objective",
    "Pretrain",
    "Regression",
    "Run",
    "Section",
    "Sft",
]

Auto: TypeAlias = Literal["auto"]

LM_EVAL = "lm_eval/"
"""What the names of scores by lm_eval begin with: lm_eval/<task>/<metric>."""
GATE_PATTERN = re.compile(rf"\s*([a-z][a-z0-9_]*|{LM_EVAL}[^\s<>=]+)\s*(<=|>=|<|>)\s*(base|-?\d+(?:\.\d+)?)\s*")


Count: TypeAlias = Annotated[int, Field(ge=1)]


def safe_name(value: str) -> str:
    """For the names that become paths and applications."""
    if not NAME_PATTERN.fullmatch(value):
        raise ValueError(f"{value!r} is not a name; use a-z, 0-9 and -, at most 64 characters")
    return value


VERSION = "adapters:"
"""What a base that is a version of the registry begins with."""


class Model(Section):
    base: str = Field(
        "builtin:tiny", description="a Hub id, a folder, builtin:tiny, or adapters:name@v2: a version with its base"
    )
    revision: str | None = Field(None, description="Hub revision; pin it, so that a run can be repeated")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="auto: bf16 on GPUs, fp32 on CPUs")
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = Field("auto", description="attention kernel")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    _place: tuple[str, str] | None = PrivateAttr(None)  # (base, its folder): of a version, once it is fetched

    @property
    def version(self) -> str | None:
        """The version that is the base, e.g. "coffee-bot@v2"; None for other bases."""
        return self.base.removeprefix(VERSION) if self.base.startswith(VERSION) else None

    @property
    def place(self) -> str | None:
        """The folder on this machine that `at` noted for this base."""
        return self._place[1] if self._place and self._place[0] == self.base else None

    def at(self, folder: str) -> Model:
        """The same, which lies in this folder here; what is written of it keeps its name."""
        found = self.model_copy()
        found._place = (self.base, folder)
        return found

    @field_validator("base")
    @classmethod
    def _names_a_version(cls, value: str) -> str:
        if value.startswith(VERSION) and not REF_PATTERN.fullmatch(value.removeprefix(VERSION)):
            raise ValueError(f"{value!r} names no version; write adapters:name, adapters:name@v2 or adapters:name@prod")
        return value


Format: TypeAlias = Literal[
    "auto", "messages", "prompt_completion", "instruction", "sharegpt", "text", "pairs", "judged", "prompt", "labelled",
    "tagged", "conll",
]  # fmt: skip


class Source(Section):
    path: str = Field(description="a file, folder, glob, URI, or Hub data set name")
    format: Format = Field("auto", description="how a row is laid out; auto looks at the columns")
    columns: dict[str, str] = Field(
        default_factory=dict, description="our name: the file's name, e.g. prompt: question"
    )
    weight: float = Field(
        1.0, gt=0, description="how often its rows are seen per epoch; 2 is twice, 0.5 is half of them"
    )
    task: str | None = Field(None, description="the task of its rows, by which scores are told apart; none: its path")
    split: str | None = Field(None, description="split of a Hub data set; train unless said")
    subset: str | None = Field(None, description="configuration of a Hub data set")

    @field_validator("task")
    @classmethod
    def _task_is_a_name(cls, value: str | None) -> str | None:
        return value if value is None else safe_name(value)


class Clean(Section):
    duplicates: Literal["exact", "near", "keep"] = Field("exact", description="which repeated rows are dropped")
    near_threshold: float = Field(0.85, gt=0, le=1, description="similarity from which rows count as near duplicates")
    min_chars: int = Field(1, ge=1, description="rows with a shorter answer or text are dropped")
    max_chars: int | None = Field(None, ge=1, description="rows with a longer text are dropped")


class Augment(Section):
    """Altered copies of training rows: what is asked is put differently, the answer stays (EDA, arXiv 1901.11196)."""

    copies: int = Field(0, ge=0, le=32, description="altered copies of each training row; 0: none")
    noise: list[Literal["typos", "drop", "swap"]] = Field(
        ["typos", "drop", "swap"], description="letters change places, words are missing, words change places"
    )
    rate: float = Field(0.1, gt=0, le=1, description="share of a text's words that noise and synonyms touch")
    synonyms: dict[str, list[str]] = Field(
        default_factory=dict, description="what may stand for a word or phrase, e.g. card: [debit card, bank card]"
    )
    templates: list[str] = Field(default_factory=list, description="other ways to ask, with {text} in each")

    @field_validator("synonyms")
    @classmethod
    def _words_have_others(cls, value: dict[str, list[str]]) -> dict[str, list[str]]:
        for word, others in value.items():
            if not word.strip() or not others:
                raise ValueError(f"{word!r}: name a word, and at least one other that may stand for it")
        return value

    @field_validator("templates")
    @classmethod
    def _templates_hold_the_text(cls, value: list[str]) -> list[str]:
        for template in value:
            if "{text}" not in template:
                raise ValueError(f"{template!r} has no {{text}}, which is where the row's own words go")
        return value


class Data(Section):
    sources: list[Source] = Field(min_length=1, description="where rows come from; several make a mixture")
    eval_sources: list[Source] = Field(
        default_factory=list, description="held-out rows; none: split off by eval_fraction"
    )
    eval_fraction: float = Field(0.05, ge=0, lt=1, description="share of the rows held out, stable as files grow")
    eval_rows: int = Field(1000, ge=0, description="at most so many held-out rows")
    clean: Clean = Field(default_factory=Clean, description="what is dropped")
    augment: Augment = Field(default_factory=Augment, description="altered copies of training rows, for small data")
    strict: bool = Field(False, description="true: a bad row is an error, not a line in the report")
    max_length: int = Field(1024, ge=8, description="tokens per example")
    too_long: Literal["auto", "truncate", "drop", "split"] = Field(
        "auto", description="auto: split plain text, truncate the rest"
    )
    packing: Literal["auto", "on", "off"] = Field("auto", description="examples share a row without seeing each other")
    template: str | None = Field(None, description="a prompt template with {instruction} and {input}, or any column")
    system: str | None = Field(None, description="a system message put before rows that have none")
    few_shot: int = Field(0, ge=0, le=32, description="so many training rows shown as examples in each prompt")

    @field_validator("sources", "eval_sources", mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        """`sources: a.jsonl`, `sources: [a.jsonl]` and one mapping mean a list of sources."""
        items = value if isinstance(value, list) else [value]
        return [{"path": item} if isinstance(item, str) else item for item in items]


class Optim(Section):
    lr: float | Auto = Field("auto", description="peak learning rate; auto: by method")
    epochs: float = Field(3.0, gt=0, description="passes over the training rows")
    steps: int | None = Field(None, ge=1, description="optimiser updates; instead of epochs")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="after the warm-up")
    warmup: float = Field(0.03, ge=0, lt=1, description="share of the steps in which the rate rises")
    batch_size: int = Field(16, ge=1, description="examples per update, over the whole cluster")
    micro_batch_size: int | Auto = Field(
        "auto", description="examples of max_length tokens that a worker holds at once"
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = Field(
        "adamw", description="8-bit and paged need zero: 0"
    )
    weight_decay: float = Field(0.0, ge=0, description="on matrices, not on norms and biases")
    betas: tuple[float, float] = Field((0.9, 0.999), description="of Adam")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")

    @field_validator("lr", "micro_batch_size")
    @classmethod
    def _positive(cls, value: Any) -> Any:
        if value != "auto" and value <= 0:
            raise ValueError("must be greater than 0, or 'auto'")
        return value


class Scale(Section):
    workers: Count | tuple[Count, Count] = Field(
        1, description="processes that train together; [2, 8]: as many of them as the cluster has room for"
    )
    gpus_per_worker: Annotated[float, Field(ge=0)] | Auto = Field(
        "auto", description="auto: 1 where the cluster has GPUs"
    )
    cpus_per_worker: Annotated[float, Field(gt=0)] | Auto = Field(
        "auto", description="auto: what the nodes have, shared out"
    )
    zero: Literal[0, 1, 2, 3] | Auto = Field("auto", description="DeepSpeed ZeRO stage")
    offload: Literal["none", "cpu", "nvme"] = Field("none", description="optimiser state, and parameters under zero: 3")
    nvme_path: str | None = Field(None, description="folder on a local NVMe disk, for offload: nvme")
    gradient_checkpointing: bool | Auto = Field("auto", description="recompute activations to save memory")
    retries: int = Field(3, ge=0, description="restarts after a lost worker or node")
    checkpoint_every: int | Auto = Field("auto", description="steps between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="newest complete checkpoints kept")
    hang_timeout_s: float = Field(
        1800, gt=0, description="a step that takes longer is a hang: stacks are kept, workers restart"
    )
    address: str | None = Field(None, description="Ray cluster; none: the one around us, or a local one")

    @property
    def least(self) -> int:
        """Workers that a run needs."""
        return self.workers[0] if isinstance(self.workers, tuple) else self.workers

    @property
    def most(self) -> int:
        """Workers that a run takes where there is room."""
        return self.workers[1] if isinstance(self.workers, tuple) else self.workers

    @field_validator("workers")
    @classmethod
    def _least_first(cls, value: Any) -> Any:
        if isinstance(value, tuple) and value[0] > value[1]:
            raise ValueError(f"[{value[0]}, {value[1]}]: the smaller number stands first")
        return value

    @field_validator("checkpoint_every")
    @classmethod
    def _positive(cls, value: Any) -> Any:
        if value != "auto" and value < 1:
            raise ValueError("must be at least 1, or 'auto'")
        return value


class LmEval(Section):
    """Benchmarks of lm-evaluation-harness. Needs the extra: pip install 'ftray[lm-eval]'."""

    tasks: list[str] = Field(default_factory=list, description="tasks or groups of lm_eval, e.g. [arc_easy, piqa]")
    limit: int | None = Field(None, ge=1, description="questions of each task; none: all of them")
    few_shot: int | None = Field(None, ge=0, description="examples before a question; none: as the task says")
    chat: bool = Field(False, description="questions are put as the base's chat template has them")
    folder: str | None = Field(None, description="of your own tasks: YAML as lm_eval has it, and Python that it names")


class Evaluate(Section):
    every: Annotated[int, Field(ge=0)] | Auto = Field(
        "auto", description="steps between evaluations of the loss; 0: only before and after"
    )
    generate_rows: int = Field(200, ge=0, description="held-out rows answered by generation; 0: loss only")
    max_new_tokens: int = Field(128, ge=1, description="per generated answer")
    labels: list[str] = Field(
        default_factory=list, description="answers are these labels: adds accuracy, precision, recall, F1"
    )
    numeric: bool | Auto = Field(
        "auto", description="answers count by the number they end in: adds pass_at_1; auto: where the expected do"
    )
    baselines: list[Annotated[int, Field(ge=0, le=32)]] = Field(
        default_factory=list, description="the base prompted with so many training examples, e.g. [0, 4], as a rival"
    )
    judge: str | None = Field(
        None, description="a reward version, e.g. support-reward@v1: what it gives answers, and wins over the base's"
    )
    lm_eval: LmEval = Field(default_factory=LmEval, description="benchmarks, before and after")
    forgetting: bool | str = Field(
        True, description="loss on general text, before and after; or a text file of your own"
    )
    samples: int = Field(5, ge=0, description="answers shown side by side in the report")
    gate: list[str] | Auto = Field(
        "auto", description="what a version must pass to be promoted, e.g. [loss < base]; auto: by objective"
    )

    @field_validator("baselines")
    @classmethod
    def _each_once(cls, value: list[int]) -> list[int]:
        return sorted(set(value))

    _judge_is_a_version = field_validator("judge")(version_ref)

    @field_validator("gate")
    @classmethod
    def _gate_reads(cls, value: list[str] | Auto) -> list[str] | Auto:
        for rule in [] if value == "auto" else value:
            if not GATE_PATTERN.fullmatch(rule):
                raise ValueError(
                    f"cannot read {rule!r}; write '<metric> <|<=|>|>= <number or base>', e.g. 'loss < base'"
                )
        return value

    @property
    def rules(self) -> list[str]:
        """The gate as the run says it; none where it is auto."""
        return [] if self.gate == "auto" else self.gate


class Track(Section):
    to: list[Literal["tensorboard", "mlflow", "wandb"]] = Field(["tensorboard"], description="trackers")
    project: str = Field("ftray", description="MLflow experiment or W&B project")
    mlflow_uri: str | None = Field(None, description="MLflow tracking server; none: its own default")
    log_every: int = Field(1, ge=1, description="steps between logged metrics")


class Run(Section):
    name: str = Field(description="what it becomes in the registry: a-z, 0-9 and -")
    storage: str = Field(
        "./ftray-store", description="root of everything kept: a folder that every node sees, s3://, gs://"
    )
    seed: int = Field(42, ge=0, lt=2**32, description="of shuffling, initialisation and dropout")
    model: Model = Field(default_factory=Model)
    data: Data
    method: Method = Field(default_factory=Lora)
    objective: Objective = Field(default_factory=Sft)
    optim: Optim = Field(default_factory=Optim)
    scale: Scale = Field(default_factory=Scale)
    evaluate: Evaluate = Field(default_factory=Evaluate)
    track: Track = Field(default_factory=Track)

    _name_is_safe = field_validator("name")(safe_name)

    @property
    def longest(self) -> int:
        """Tokens that an example can have."""
        return self.data.max_length * self.objective.sequences

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that the training sources name, in their order."""
        return tuple(dict.fromkeys(source.task for source in self.data.sources if source.task))

    @property
    def begins_as(self) -> str | None:
        """The version that its prompt begins as, if it names one."""
        return self.method.begin if isinstance(self.method, Prompt) else None

    def gate(self, measured: Collection[str]) -> list[str]:
        """The rules that a version must pass of which these metrics were measured."""
        if self.evaluate.gate != "auto":
            return self.evaluate.gate
        rules = self.objective.gate
        return [next((rule for rule in rules if rule.split()[0] in measured), rules[0])]

    @property
    def rewards_decide(self) -> bool:
        """Whether its rewards say which answers are right."""
        return isinstance(self.objective, REINFORCEMENT) and any(one.decides_right for one in self.objective.rewards)

    @property
    def answers(self) -> bool:
        """Whether held-out rows have prompts that it answers: plain texts have none, and what reads writes none."""
        return not self.objective.reads and self.objective.kind != "pretrain"

    @property
    def takes_bitsandbytes(self) -> bool:
        return bool(getattr(self.method, "bits", None)) or self.optim.optimizer != "adamw"

    @model_validator(mode="after")
    def _sections_agree(self) -> Run:
        problems = list(disagreements(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self
