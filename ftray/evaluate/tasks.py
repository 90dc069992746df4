"""The benchmarks that a run names: known before any worker is placed. lm_eval itself is an extra."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ftray.config.schema import LM_EVAL, LmEval, Run
from ftray.errors import ConfigError
from ftray.evaluate.compare import metric_of

NOT_ASKED = "measured by no task of evaluate.lm_eval.tasks; write lm_eval/<task>/<metric>, and name {task!r} there too"
NEAR = "measured by no task of evaluate.lm_eval.tasks; did you mean lm_eval/{near}/<metric>?"
NO_SCORE = "lm_eval gives {task!r} no score of its own, but its tasks: {members}; name one of them"


def check_benchmarks(run: Run) -> None:
    """Raises ConfigError where lm_eval is missing or does not know a task, or the gate names one not measured."""
    asked = run.evaluate.lm_eval
    problems = _missing(asked) if asked.tasks else []
    if not problems:
        index = manager_of(asked).task_index if asked.tasks else {}
        problems = [*_unknown(asked, list(index)), *_twice(asked, index), *_not_measured(run, index)]
    if problems:
        raise ConfigError(run.name, problems)


def manager_of(asked: LmEval) -> Any:
    """What lm_eval knows of the tasks in `asked.folder`, and of its own if others are asked: it has 14,000 files."""
    from lm_eval.tasks import TaskManager

    folder = asked.folder and str(Path(asked.folder).expanduser())
    if folder:
        own = TaskManager(include_path=folder, include_defaults=False)
        if all(task in own.task_index for name in asked.tasks for task in measured(name, own.task_index)):
            return own
    return TaskManager(include_path=folder)


def measured(name: str, index: Mapping[str, Any], *, within: Sequence[str] = ()) -> Iterator[str]:
    """What has scores where lm_eval is asked for a name: a task; all tasks of a tag; a group that sums up its members,
    and these. ConfigError for a group that is `within` itself."""
    if name in within:
        raise ConfigError(f"group {name}", [("evaluate.lm_eval.tasks", f"{name!r} holds itself; take it out of there")])
    entry = index.get(name)
    if entry is not None and _is_group(entry):
        yield from _of_group(name, entry.cfg, index, [*within, name])
    elif entry and entry.kind.name == "TAG":
        yield from sorted(entry.tags)
    else:
        yield name


def _is_group(entry: Any) -> bool:
    return entry is not None and entry.kind.name == "GROUP"


def _of_group(name: str, group: Mapping[str, Any], index: Mapping[str, Any], within: Sequence[str]) -> Iterator[str]:
    """lm_eval puts a group's name before those of members that stand nowhere but in it."""
    if group.get("aggregate_metric_list"):
        yield name
    for member in group["task"] if isinstance(group.get("task"), list) else []:
        keys = member if isinstance(member, dict) else {"task": member}
        called = str(keys.get("group") or keys.get("task"))
        if called in index:
            yield from measured(called, index, within=within)
        elif "group" in keys:
            yield from _of_group(f"{name}::{called}", keys, index, within)
        else:
            yield f"{name}::{called}"


def _not_measured(run: Run, index: Mapping[str, Any]) -> list[tuple[str, str]]:
    known = {task for name in run.evaluate.lm_eval.tasks for task in measured(name, index)}
    found = []
    for number, rule in enumerate(run.evaluate.rules):
        task = metric_of(rule).removeprefix(LM_EVAL).partition("/")[0]
        if metric_of(rule).startswith(LM_EVAL) and task not in known:
            members = sorted(measured(task, index))
            near = difflib.get_close_matches(task, known, n=1)
            told = NO_SCORE if known.issuperset(members) else NEAR if near else NOT_ASKED
            said = told.format(task=task, members=_some(members), near=near and near[0])
            found.append((f"evaluate.gate.{number}", said))
    return found


def _twice(asked: LmEval, index: Mapping[str, Any]) -> list[tuple[str, str]]:
    """lm_eval refuses a task that a group measures and another name too."""
    found, before = [], dict[str, str]()  # name that asked first, by task
    for number, name in enumerate(asked.tasks):
        tasks = set(measured(name, index))
        both = {task: before[task] for task in tasks & before.keys()}
        for task, other in sorted(both.items())[:1]:
            if _is_group(index.get(name)) or _is_group(index.get(other)):
                found.append((f"evaluate.lm_eval.tasks.{number}", f"{task} is of {other!r} too; leave one out"))
        before |= dict.fromkeys(tasks - before.keys(), name)
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


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
