"""What the sections of a run say to each other: keys that are fine alone and make no sense together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ftray.config.methods import (
    PROMPTS,
    AdaLora,
    Feature,
    Freeze,
    Lora,
    MultitaskPrompt,
    Prefix,
    Prompt,
    Tokens,
    shards,
)
from ftray.config.objectives import COMPARED, REINFORCEMENT, Dpo, TokenClassification
from ftray.config.rewards import Python
from ftray.config.section import NAME_PATTERN

if TYPE_CHECKING:  # it asks us
    from ftray.config.schema import Run


def disagreements(run: Run) -> Iterator[str]:
    """Each problem begins with the key it is about (explain.py splits it off at ': ')."""
    optim, scale, method = run.optim, run.scale, run.method
    if run.model.version and run.model.revision:
        yield f"model.revision: is of the Hub; say the version in the base, {run.model.base}"
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
    if not run.evaluate.lm_eval.tasks and (given := run.evaluate.lm_eval.model_dump(exclude_defaults=True)):
        yield f"evaluate.lm_eval.tasks: name no benchmark for {', '.join(given)}; set them, or evaluate.lm_eval={{}}"
    if run.evaluate.numeric is True:
        yield from _number_problems(run)
    if run.evaluate.judge and not run.answers:
        yield f"evaluate.judge: scores answers to held-out prompts, and {run.objective.kind} has none; leave it out"
    elif run.evaluate.judge and not run.evaluate.generate_rows:
        yield "evaluate.judge: scores generated answers; set evaluate.generate_rows, or leave it out"
    if isinstance(run.objective, REINFORCEMENT):
        yield from _rollout_problems(run)
    if run.objective.reads:
        yield from _reader_problems(run)


def _task_problems(run: Run) -> Iterator[str]:
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
    scored = {source.task for source in run.data.eval_sources} or set(tasks)
    for task in tasks:
        if task not in scored:
            yield f"data.eval_sources: nothing would judge the version of task {task!r}; add held-out rows of it"
        if not NAME_PATTERN.fullmatch(name := f"{run.name}-{task}"):
            yield f"name: the version of task {task!r} would be called {name!r}, longer than 64 characters; shorten one"


def _number_problems(run: Run) -> Iterator[str]:
    objective = run.objective
    if not run.answers:
        yield f"evaluate.numeric: compares answers to held-out prompts, and {objective.kind} has none; leave it out"
    elif not run.evaluate.generate_rows:
        yield "evaluate.numeric: compares generated answers; set evaluate.generate_rows, or leave it out"
    elif run.rewards_decide:
        yield "evaluate.numeric: objective.rewards say which answers are right; leave it out"


def _rollout_problems(run: Run) -> Iterator[str]:
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


def _reader_problems(run: Run) -> Iterator[str]:
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
