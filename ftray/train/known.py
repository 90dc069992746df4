"""What is known of a run before any worker is placed: its base and its prepared data, both checked."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftray.config.methods import PROMPTS, Feature
from ftray.config.schema import Model, Run, Source
from ftray.data import sources
from ftray.data.prepare import Prepared, prepare
from ftray.errors import ConfigError, DataError, ModelError
from ftray.models.encoder import is_encoder, positions_of
from ftray.models.heads import Head
from ftray.models.load import Shape
from ftray.store.paths import Storage
from ftray.train import cluster

NO_NUMBERS = (
    "it needs evaluate.generate_rows, and held-out answers that are numbers, as 42 or #### 42; where they hold one in "
    "other words, set evaluate.numeric: true"
)
SMALL_BYTES = 64 * 2**20  # below that, tokenising here is quicker than shipping rows to other processes


@dataclass(frozen=True)
class Known:
    """`base` is its fingerprint; `packs`: it keeps packed examples apart; `head`: what it reads under, if it does;
    `beside`: weights of models beside it; `lineage`: the versions that the base and the first prompt are made of."""

    base: str
    shape: Shape
    packs: bool
    data: Prepared
    head: Head | None = None
    encoder: bool = False
    beside: int = 0
    lineage: tuple[dict[str, str], ...] = ()

    @classmethod
    def of(cls, run: Run, storage: Storage, *, ray_ready: Callable[[], None] | None = None) -> Known:
        """Read, check and prepare. With `ray_ready`, which waits for the cluster, its CPUs tokenise large data."""
        from ftray.evaluate.suites import check_labels
        from ftray.models import attention, chain, load, reward
        from ftray.objectives import OBJECTIVES

        run = chain.here(run, storage)
        config = load.load_config(run.model)
        tokenizer = load.load_tokenizer(run.model)
        check_method(run, config, tokenizer)
        beside = OBJECTIVES[run.objective.kind].beside(run.objective)
        other = _checked_beside(beside, tokenizer) if beside else None
        rewards = reward.check(run, storage, tokenizer)
        chain.first_prompt(run.method, storage, width=config.get_text_config().hidden_size)
        large = ray_ready is not None and _bytes(run.data.sources) > SMALL_BYTES
        if ray_ready is not None and large:
            ray_ready()
        data = prepare(
            run.data,
            objective=run.objective,
            tokenizer=tokenizer,
            fingerprint=tokenizer_fingerprint(tokenizer),
            seed=run.seed,
            storage=storage,
            baselines=run.evaluate.baselines,
            map_chunks=cluster.spread_over_cpus if large else None,
        )
        OBJECTIVES[run.objective.kind].check(run.objective, data)
        if run.evaluate.labels:
            check_labels(run.evaluate.labels, [q.answer for q in data.questions], [q.row for q in data.questions])
        _check_numbers(run, data)
        _check_baselines(run, data, config)
        head = OBJECTIVES[run.objective.kind].head(run.objective, data.labels)
        if head is not None:
            virtual = run.method.tokens if isinstance(run.method, PROMPTS) else 0
            check_lengths(load.meta_model(config, head=head), data, virtual=virtual)
        every = [load.meta_model(one) for one in (config, other) if one is not None] if head is None else []
        return cls(
            base=load.fingerprint(run.model),
            shape=_shape(run, config, head),
            packs=head is None and all(map(attention.supports_packing, every)),
            data=data,
            head=head,
            encoder=is_encoder(config),
            beside=(Shape.from_config(other).parameters if other is not None else 0) + rewards,
            lineage=tuple(chain.lineage([run.model.version, run.begins_as], storage)),
        )


def counts_right(run: Run, data: Prepared) -> bool:
    """Whether scores of this run have a pass_at_1: by its rewards, or by the numbers that its held-out answers are."""
    from ftray.evaluate.suites import numeric_tasks

    if run.rewards_decide:
        return True
    if not (run.answers and run.evaluate.generate_rows):
        return False
    asked = data.questions
    return bool(numeric_tasks([q.answer for q in asked], [q.task for q in asked], run.evaluate.numeric))


def check_method(run: Run, config: Any, tokenizer: Any = None) -> None:
    """ModelError where the run's method does not fit its base, with whatever head its objective needs."""
    from ftray.models import adapt, load
    from ftray.objectives import OBJECTIVES

    if run.objective.kind == "reward" and is_encoder(config):
        raise ModelError(
            f"model.base: {run.model.base} is an encoder, and a reward model reads what a policy writes; "
            "take the causal model that is to be the policy"
        )
    head = OBJECTIVES[run.objective.kind].head(run.objective, ("0", "1"))  # how many labels does not matter here
    if isinstance(run.method, Feature) and not is_encoder(config):
        load.meta_model(config)  # else the base must write
    adapt.check_method(config, run.method, tokenizer, head=head)


def _shape(run: Run, config: Any, head: Head | None) -> Shape:
    """The base's, with the head that it reads under."""
    shape = Shape.from_config(config, head=head)
    if not isinstance(run.method, Feature):
        return shape
    from ftray.models.features import head_params

    assert head is not None
    own = head_params(shape.hidden_size, len(head.labels), run.method)
    return replace(shape, parameters=shape.parameters - shape.head_params, head_params=own)


def check_lengths(model: Any, data: Prepared, *, virtual: int = 0) -> None:
    """DataError where an encoder has no position for the end of the longest text, `virtual` tokens before it."""
    if not is_encoder(model.config):
        return
    positions = positions_of(model)
    longest = max(int(store.lengths.max()) for store in (data.train, data.eval) if len(store))
    if longest + virtual > positions:
        raise DataError(
            f"data.max_length: the longest text has {longest} tokens, and the base reads {positions - virtual}; "
            f"use data.max_length: {positions - virtual}"
        )


def _check_numbers(run: Run, data: Prepared) -> None:
    """DataError where answers that count by number hold none, ConfigError where the gate counts them and none does."""
    from ftray.evaluate.compare import metric_of
    from ftray.evaluate.suites import check_numbers

    if run.evaluate.numeric is True:
        expected = [q for q in data.questions if q.answer]
        check_numbers([q.answer for q in expected], [q.row for q in expected])
    rules = [n for n, rule in enumerate(run.evaluate.rules) if metric_of(rule) == "pass_at_1"]
    if rules and not counts_right(run, data):
        objective, told = run.objective, NO_NUMBERS
        if not run.answers:
            own = ", ".join(objective.reports)
            told = f"{objective.kind} writes no answers; name one of what it reports: {own}"
        problem = f"pass_at_1 is not measured: {told}"
        raise ConfigError(run.name, [(f"evaluate.gate.{n}", problem) for n in rules])


def _check_baselines(run: Run, data: Prepared, config: Any) -> None:
    """ConfigError where the base cannot read a question with its examples."""
    from ftray.objectives import OBJECTIVES

    if run.evaluate.baselines and not OBJECTIVES[run.objective.kind].writes:
        told = f"{run.objective.kind} writes no answers to compare; leave it out"
        raise ConfigError(run.name, [("evaluate.baselines", told)])
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
    for count, questions in data.baselines.items():
        longest = max(len(question.prompt_ids) for question in questions)
        if longest + run.evaluate.max_new_tokens > positions:
            told = f"{count} examples make prompts of {longest} tokens, and the base reads {positions}; show fewer"
            raise ConfigError(run.name, [("evaluate.baselines", told)])


def _checked_beside(model: Model, tokenizer: Any) -> Any:
    """The configuration of a model that stands beside the base. ModelError where it reads text as other tokens."""
    from ftray.models import load

    config = load.load_config(model)
    if load.load_tokenizer(model).get_vocab() != tokenizer.get_vocab():
        raise ModelError(
            f"objective.teacher: {model.base} has another vocabulary than model.base, so its choices have no meaning "
            "here; take two models of one family"
        )
    return config


def _bytes(wanted: Sequence[Source]) -> float:
    """Size of the sources on this machine; infinite where one lies elsewhere."""
    total = 0.0
    for source in wanted:
        if source.path.startswith("builtin:"):
            continue
        if "://" in source.path or not Path(source.path).exists():
            return math.inf
        total += sum(os.path.getsize(file.path) for file in sources.files(source))
    return total


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Changes whenever the same text could become other tokens."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    rules = fast.to_str() if fast is not None else repr(sorted(tokenizer.get_vocab().items()))
    text = f"{rules}\n{tokenizer.chat_template}\n{sorted(tokenizer.special_tokens_map.items())}"
    return hashlib.sha256(text.encode()).hexdigest()
