"""The run file's schema: what a user may write, with defaults that work. No torch, no ray.

Sections are frozen, reject unknown keys, and say in their descriptions what each key does; `ftray init` prints those
descriptions as comments. `"auto"` values are resolved before a run starts, printed, and stored with the run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, PrivateAttr, field_validator, model_validator

from ftray.config.methods import (
    PROMPTS,
    AdaLora,
    Feature,
    Freeze,
    Full,
    Lora,
    Method,
    MultitaskPrompt,
    Prefix,
    Prompt,
    Tokens,
    shards,
)
from ftray.config.objectives import (
    COMPARED,
    REINFORCEMENT,
    Classification,
    Dpo,
    Objective,
    Pretrain,
    Regression,
    Sft,
    TokenClassification,
)
from ftray.config.rewards import Python
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
    def takes_bitsandbytes(self) -> bool:
        return bool(getattr(self.method, "bits", None)) or self.optim.optimizer != "adamw"

    @model_validator(mode="after")
    def _sections_agree(self) -> Run:
        """Checks across sections; each message starts with the key it is about (explain.py splits it off at ': ')."""
        problems = list(_disagreements(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _disagreements(run: Run):
    optim, scale, method = run.optim, run.scale, run.method
    if run.model.version and run.model.revision:
        yield f"model.revision: is of the Hub; say the version in the base, {VERSION}{run.model.version}"
    examples = optim.batch_size * run.objective.per_row
    if isinstance(scale.workers, tuple):
        if optim.batch_size < scale.most:
            yield f"optim.batch_size: {optim.batch_size} examples are fewer than {scale.most} workers; try {scale.most}"
    elif optim.batch_size % scale.workers:
        fit = max(scale.workers, round(optim.batch_size / scale.workers) * scale.workers)
        yield f"optim.batch_size: {optim.batch_size} does not divide over {scale.workers} workers; try {fit}"
    elif optim.micro_batch_size != "auto" and examples % (optim.micro_batch_size * scale.workers):
        window = optim.micro_batch_size * scale.workers
        rows = window // math.gcd(window, run.objective.per_row)
        fit = max(rows, round(optim.batch_size / rows) * rows)
        wrong = f"{examples} is not a multiple of micro_batch_size x workers = {window}"
        yield f"optim.batch_size: {wrong}; try {fit}"
    if optim.optimizer != "adamw" and scale.zero not in (0, "auto"):
        yield f"scale.zero: optimizer {optim.optimizer} is not sharded; use zero: 0, or optimizer: adamw"
    if optim.optimizer != "adamw" and scale.offload != "none":
        yield f"scale.offload: optimizer {optim.optimizer} is not offloaded; use offload: none, or optimizer: adamw"
    if scale.offload != "none" and scale.zero in (0, 1):
        yield f"scale.zero: offload needs ZeRO 2 or 3, not {scale.zero}; use zero: 2, or offload: none"
    if scale.offload == "nvme" and scale.zero not in (3, "auto"):
        yield f"scale.zero: offload to NVMe needs ZeRO 3, not {scale.zero}"
    if scale.offload == "nvme" and not scale.nvme_path:
        yield "scale.nvme_path: offload: nvme needs the folder of a local NVMe disk"
    if isinstance(method, Lora) and method.bits and scale.zero == 3:
        yield "scale.zero: a quantised base cannot be sharded by ZeRO 3; use zero: 2, or leave bits out"
    if not shards(method) and scale.zero == 3:
        yield f"scale.zero: {method.kind} trains under ZeRO 0 to 2, not 3; use zero: 2"
    if not shards(method) and scale.offload == "nvme":
        yield f"scale.offload: nvme needs ZeRO 3, under which {method.kind} does not train; use offload: cpu"
    if isinstance(method, AdaLora):
        if method.first_rank <= method.rank:
            yield f"method.start_rank: {method.first_rank} leaves no rank to give up; use more than {method.rank}"
        if scale.offload != "none":
            yield "scale.offload: adalora looks at every step's gradients; use offload: none"
    if isinstance(method, Prefix) and scale.gradient_checkpointing is True:
        yield "scale.gradient_checkpointing: prefix is a cache, which recomputed blocks would fill twice; use auto"
    if isinstance(method, PROMPTS) and run.data.packing == "on":
        yield f"data.packing: {method.kind} puts its tokens before each example, and packed rows have no room; use auto"
    if isinstance(method, Prompt) and method.text is not None and method.begin is not None:
        yield "method.begin: virtual tokens begin as a version's or as a text's; leave one of the two out"
    if isinstance(method, MultitaskPrompt):
        yield from _task_problems(run)
    if isinstance(method, Feature) and run.objective.kind not in ("classification", "regression"):
        yield (
            f"method.kind: feature learns from one vector a text, and {run.objective.kind} needs more than that; use "
            "objective kind: classification or regression, or another method"
        )
    if isinstance(method, Feature) and scale.offload != "none":
        yield "scale.offload: feature trains a head alone, which is small; leave it out"
    if isinstance(method, Lora) and method.bits and method.init == "pissa":
        yield "method.init: pissa changes the base, which bits: keeps quantised; use default"
    parts = isinstance(method, Freeze) and (
        method.last_layers or method.train or method.embeddings or method.norms or method.head
    )
    if isinstance(method, Freeze) and not parts and not run.objective.reads:  # else the head alone learns
        yield "method.last_layers: nothing is left to train; set it to 1 or more, or name patterns in train"
    if run.data.packing == "on" and run.model.attention in ("eager", "sdpa"):
        yield f"data.packing: {run.model.attention} attention knows no packed rows; use attention: auto or packing: off"
    augment = run.data.augment
    if augment.copies and not (augment.noise or augment.synonyms or augment.templates):
        yield "data.augment.copies: nothing says how copies differ; add noise, synonyms or templates"
    if augment.copies and run.objective.kind == "pretrain":
        yield "data.augment.copies: plain text has no prompt to put differently; leave it out"
    if run.objective.kind == "pretrain" and run.data.few_shot:
        yield "data.few_shot: plain text has no prompts to put examples in; leave it out"
    if isinstance(run.objective, COMPARED):
        if augment.copies:
            yield f"data.augment.copies: {run.objective.kind} compares answers to one prompt; leave copies out"
        if run.data.few_shot:
            yield f"data.few_shot: {run.objective.kind} shows no examples in its prompts; leave it out"
        if run.evaluate.baselines:
            yield f"evaluate.baselines: {run.objective.kind} shows no examples in its prompts; leave it out"
        if run.data.too_long == "split":
            yield f"data.too_long: {run.objective.kind} compares whole answers; use truncate or drop"
    if isinstance(run.objective, Dpo) and run.objective.label_smoothing and run.objective.loss in ("hinge", "ipo"):
        yield f"objective.label_smoothing: {run.objective.loss} has no use for it; leave it out, or use loss: sigmoid"
    if run.evaluate.baselines and run.objective.kind == "pretrain":
        yield "evaluate.baselines: plain text has no questions to ask; leave it out"
    elif run.evaluate.baselines and not run.evaluate.generate_rows:
        yield "evaluate.baselines: compares generated answers; set evaluate.generate_rows, or leave it out"
    if run.evaluate.lm_eval.tasks and run.objective.reads:
        yield f"evaluate.lm_eval.tasks: are for models that write, and {run.objective.kind} makes none; leave them out"
    if run.evaluate.numeric is True:
        yield from _problems_of_numbers(run)
    if run.evaluate.judge and (run.objective.reads or run.objective.kind == "pretrain"):
        yield f"evaluate.judge: scores answers to held-out prompts, and {run.objective.kind} has none; leave it out"
    elif run.evaluate.judge and not run.evaluate.generate_rows:
        yield "evaluate.judge: scores generated answers; set evaluate.generate_rows, or leave it out"
    if isinstance(run.objective, REINFORCEMENT):
        yield from _rollout_problems(run)
    if run.objective.reads:
        yield from _disagreements_of_a_reader(run)


def _task_problems(run: Run):
    """What a method that learns something for each task asks of the sources."""
    kind, tasks = run.method.kind, run.tasks
    if run.objective.kind not in ("sft", "pretrain", "distill"):
        yield (
            f"method.kind: {kind} reads each row with its task's prompt, and {run.objective.kind} has other examples "
            "than rows; use objective kind: sft, pretrain or distill, and then method kind: prompt with begin"
        )
    for index, source in enumerate(run.data.sources):
        if source.task is None:
            yield f"data.sources.{index}.task: {kind} learns a prompt for each task; name the task of these rows"
    if len(tasks) == 1 and all(source.task for source in run.data.sources):
        yield f"data.sources: {kind} shares a prompt between tasks, and all rows are of {tasks[0]!r}; use kind: prompt"
    for index, source in enumerate(run.data.eval_sources):
        if source.task not in tasks:
            named = f"no source trains a task {source.task!r}" if source.task else "name the task of these rows"
            yield f"data.eval_sources.{index}.task: {named}; there are {', '.join(tasks) or 'none'}"
    for task in tasks:
        if len(name := f"{run.name}-{task}") > 64:
            yield f"name: the version of task {task!r} would be called {name!r}, longer than 64 characters; shorten one"


def _problems_of_numbers(run: Run):
    objective = run.objective
    if objective.reads or objective.kind == "pretrain":
        yield f"evaluate.numeric: compares answers to held-out prompts, and {objective.kind} has none; leave it out"
    elif not run.evaluate.generate_rows:
        yield "evaluate.numeric: compares generated answers; set evaluate.generate_rows, or leave it out"
    elif run.rewards_decide:
        yield "evaluate.numeric: objective.rewards say which answers are right; leave it out"


def _rollout_problems(run: Run):
    objective, method = run.objective, run.method
    assert isinstance(objective, REINFORCEMENT)
    if objective.max_new_tokens >= run.data.max_length:
        room = f"{objective.max_new_tokens} leave no room for a prompt in data.max_length: {run.data.max_length}"
        yield f"objective.max_new_tokens: {room}; use {run.data.max_length // 2}, or raise max_length"
    answers = run.optim.batch_size * objective.samples
    if objective.minibatches > answers:
        yield f"objective.minibatches: a step has {answers} answers, fewer than {objective.minibatches}; use {answers}"
    for index, reward in enumerate(objective.rewards):
        if isinstance(reward, Python) and not reward.trusted:
            yield (
                f"objective.rewards.{index}.trusted: {reward.function} is code that workers run with your rights; "
                "read it, then set trusted: true"
            )
    if run.evaluate.baselines:
        yield f"evaluate.baselines: {objective.kind} is judged by rewards; leave it out"
    if isinstance(method, Lora) and method.init == "pissa":
        yield f"method.init: pissa changes the base, which {objective.kind} compares with; use default"


def _disagreements_of_a_reader(run: Run):
    """What makes sense only where a model writes."""
    kind, data = run.objective.kind, run.data
    if data.packing == "on":
        yield f"data.packing: {kind} reads each text in a row of its own; use auto or off"
    if isinstance(run.objective, TokenClassification):
        if data.template:
            yield f"data.template: {kind} reads rows as they are, word by word; leave it out"
        if data.augment.copies:
            yield f"data.augment.copies: {kind} has a tag for each word, and copies have other words; leave copies out"
    if data.few_shot:
        yield f"data.few_shot: {kind} has no prompts to put examples in; leave it out"
    if data.system and kind != "reward":
        yield f"data.system: {kind} reads texts, not conversations; leave it out"
    if data.too_long == "split":
        yield f"data.too_long: {kind} says something of a whole text; use truncate or drop"
    if run.evaluate.labels:
        yield f"evaluate.labels: is for generated answers, and {kind} writes none; leave it out"
    if isinstance(run.method, Tokens):
        yield f"method.kind: tokens learns nothing but embeddings, and {kind} has a head to learn; use lora or norms"
