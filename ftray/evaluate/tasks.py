"""The benchmarks that a run names: known before any worker is placed. lm_eval itself is an extra."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ftray.config.schema import LM_EVAL, LmEval, Run
from ftray.errors import ConfigError
from ftray.evaluate.compare import metric_of

NOT_ASKED = "measured by no task of evaluate.lm_eval.tasks; write lm_eval/<task>/<metric>, and name {task!r} there too"


def check_benchmarks(run: Run) -> None:
    """Raises ConfigError where lm_eval is missing or does not know a task, or the gate names one not asked."""
    asked = run.evaluate.lm_eval
    problems = _missing(asked) if asked.tasks else []
    groups = False  # a rule may be about a task that belongs to one
    if asked.tasks and not problems:
        manager = manager_of(asked)
        problems = _unknown(asked, manager.all_tasks)
        groups = not set(asked.tasks) <= set(manager.all_subtasks)
    for n, rule in enumerate(run.evaluate.rules):
        task = metric_of(rule).removeprefix(LM_EVAL).partition("/")[0]
        if metric_of(rule).startswith(LM_EVAL) and task not in asked.tasks and not groups:
            problems.append((f"evaluate.gate.{n}", NOT_ASKED.format(task=task)))
    if problems:
        raise ConfigError(run.name, problems)


def manager_of(asked: LmEval) -> Any:
    """What lm_eval knows of its own tasks and of those in `asked.folder`."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=asked.folder and str(Path(asked.folder).expanduser()))


def _missing(asked: LmEval) -> list[tuple[str, str]]:
    if find_spec("lm_eval") is None:
        told = "lm_eval is not installed; `pip install 'ftray[lm-eval]'` here and on every node, or take the tasks out"
        return [("evaluate.lm_eval.tasks", told)]
    if asked.folder and not Path(asked.folder).expanduser().is_dir():
        told = f"there is no folder {asked.folder} here or beside the run file, on every node"
        return [("evaluate.lm_eval.folder", told)]
    return []


def _unknown(asked: LmEval, known: Sequence[str]) -> list[tuple[str, str]]:
    found = []
    for number, task in enumerate(asked.tasks):
        if task not in known:
            near = difflib.get_close_matches(task, known, n=3)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "`lm-eval ls tasks` lists them"
            found.append((f"evaluate.lm_eval.tasks.{number}", f"lm_eval knows no task {task!r}; {hint}"))
    return found
