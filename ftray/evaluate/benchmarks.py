"""Benchmarks of lm-evaluation-harness over the live model. Only where a run names some: lm_eval is an extra.

Every worker runs the whole harness and computes its share of each kind of request; the answers are put together before
anything is scored, so all workers have the same scores, whatever their number.
"""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import lm_eval
import numpy as np
import torch
import torch.distributed as dist
from lm_eval.models.huggingface import HFLM

from ftray.config.schema import LM_EVAL, LmEval
from ftray.errors import TrainError
from ftray.evaluate.tasks import manager_of
from ftray.objectives.rollout import shared


def benchmarks(
    model: Any,
    tokenizer: Any,
    *,
    asked: LmEval,
    batch_size: int,
    computing: Callable[[], AbstractContextManager],
    beat: Callable[[], None],
) -> dict[str, float]:
    """Scores by lm_eval/<task>/<metric>, of the filters that a task has by lm_eval/<task>/<metric>/<filter>.

    Collective: all workers call it. `computing()`: what a forward stands in. TrainError where a task cannot be had.
    """
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    harness = _Harness(_Watched(model, computing=computing, beat=beat), tokenizer, batch_size)
    with _random_state_kept():
        try:
            found = lm_eval.simple_evaluate(
                model=harness,
                tasks=list(asked.tasks),
                task_manager=manager_of(asked),
                num_fewshot=asked.few_shot,
                limit=asked.limit,
                apply_chat_template=asked.chat,
                bootstrap_iters=0,
                log_samples=False,
            )
        except RuntimeError:  # too little memory, or a lost worker
            raise
        except Exception as error:  # a task's data are fetched now, and it may have Python of its own
            names = ", ".join(asked.tasks)
            raise TrainError(f"evaluate.lm_eval.tasks: {names}: {type(error).__name__}: {error}") from error
    return shared([found and _by_name(found)])[0]  # on each node only the first worker is given them


class _Watched:
    """The model as the harness calls it: in the run's own precision, and with a sign of life at each call."""

    def __init__(self, model: Any, *, computing: Callable[[], AbstractContextManager], beat: Callable[[], None]):
        self._model, self._computing, self._beat = model, computing, beat

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._beat()
        with self._computing():
            return self._model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        self._beat()
        with self._computing():
            return self._model.generate(*args, **kwargs)


class _Harness(HFLM):
    """lm_eval's own reading of a Hugging Face model, each worker asked for its share."""

    def __init__(self, model: _Watched, tokenizer: Any, batch_size: int):
        tokenizer = copy.deepcopy(tokenizer)  # it may be given another padding token
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal")

    def loglikelihood(self, requests: list, disable_tqdm: bool = True) -> list:
        return _together(super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = True) -> list:
        return _together(super().loglikelihood_rolling, requests)

    def generate_until(self, requests: list, disable_tqdm: bool = True) -> list:
        return _together(super().generate_until, requests)


def _together(ask: Callable[..., list], requests: list) -> list:
    mine = requests[dist.get_rank() :: dist.get_world_size()]
    return shared(ask(mine, disable_tqdm=True) if mine else [])


def _by_name(found: Mapping[str, Any]) -> dict[str, float]:
    """Of groups and of their members."""
    return {name: value for task, values in found["results"].items() for name, value in _scores(task, values).items()}


def _scores(task: str, values: Mapping[str, Any]) -> dict[str, float]:
    """From lm_eval's names, "acc,none" and "acc_stderr,none"."""
    found = {}
    for key, value in values.items():
        metric, _, kept_by = key.partition(",")
        if kept_by and not metric.endswith("_stderr") and isinstance(value, int | float):
            found[f"{LM_EVAL}{task}/{metric}{'' if kept_by == 'none' else f'/{kept_by}'}"] = float(value)
    return found


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """The harness seeds every generator there is."""
    python, numpy, torchs = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torchs)
