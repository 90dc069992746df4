"""From a run or serve file and `key=value` overrides to its schema, or to every problem in it at once."""

from __future__ import annotations

import copy
import difflib
import glob
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from ftray.config import document, explain, stages
from ftray.config.rewards import FUNCTION, file_of
from ftray.config.schema import Run
from ftray.config.section import Section
from ftray.config.serving import Serving
from ftray.config.sweeping import Sweep
from ftray.errors import ConfigError

Path_ = tuple[str | int, ...]
Root = TypeVar("Root", bound=Section)


def load_run(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Run:
    """Reads `path`, sets the overrides ("optim.lr=2e-4", "data.sources.0.weight=2"), and checks the result.

    A data path that is not there as seen from the current directory is taken from the run file's folder.
    Raises ConfigError with all problems, each with its key and the line it stands on.
    """
    text = _mapping(path, "expected keys such as name: and data: at the top; see `ftray init`")
    return run_from(text.data, overrides, source=os.fspath(path), lines=text, folder=Path(path).parent)


OTHER_FILES = {
    "space": "this is a sweep file, which `ftray sweep {file} --check` checks",
    "http": "this is a serve file, which `ftray serve {file} --check` checks",
    "adapters": "this is a serve file, which `ftray serve {file} --check` checks",
}
"""By a key that a run has not: what a file is that was taken for a run's."""


def load_runs(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> list[Run]:
    """The same for a file that may have `stages:`: its runs in order, each but the first from the one before.

    Overrides say what all stages share, or with `stages.1.optim.lr=1e-4` what one says itself.
    """
    source, text = os.fspath(path), _mapping(path, "expected keys such as name: and data: at the top")
    for key, told in OTHER_FILES.items():
        if key in text.data:
            raise ConfigError(source, [("", told.format(file=source))])
    if "stages" not in text.data:
        return [load_run(path, overrides)]
    runs: list[Run] = []
    problems: dict[str, str] = {}
    for stage in stages.expanded(_overridden(text.data, overrides, source), source):
        try:
            runs.append(run_from(stage.keys, source=source, folder=Path(path).parent))
        except ConfigError as error:
            for key, told in error.problems:
                problems.setdefault(".".join(map(str, stage.place(_path(key)))), told)
    if problems:
        overridden = {override.partition("=")[0].strip() for override in overrides}
        placed = [_placed(_path(key), told, overridden, text) for key, told in problems.items()]
        raise ConfigError(source, [(key, told) for _, key, told in sorted(placed, key=lambda one: one[0])])
    return runs


def load_serving(path: str | os.PathLike[str] | None, overrides: Sequence[str] = ()) -> Serving:
    """The same for a serve file; None: the defaults with the overrides."""
    if path is None:
        return _checked(Serving, {}, overrides, source="ftray serve")
    text = _mapping(path, "expected keys such as model: and storage: at the top")
    return _checked(Serving, text.data, overrides, source=os.fspath(path), lines=text)


def load_sweep(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Sweep:
    """The same for a sweep file. `run:` is keys of a run or its file, seen from the current directory or from the
    sweep file's folder; `set: {dotted key: value}` changes it. Every corner of the space is built and checked."""
    from ftray.config import space

    source = os.fspath(path)
    text = _mapping(path, "expected keys such as name:, run: and space: at the top")
    data = _overridden(text.data, overrides, source)
    data["run"] = _inner_run(data, Path(path))
    data.pop("set", None)
    sweep = _checked(Sweep, data, (), source=source, lines=text)
    if problems := space.problems_of(sweep):
        lines = [_placed(tuple(key.split(".", 1)), told, set(), text) for key, told in problems]
        raise ConfigError(source, [(key, told) for _, key, told in lines])
    return sweep


def _overridden(raw: Mapping[str, Any], overrides: Sequence[str], source: str) -> dict[str, Any]:
    data = copy.deepcopy(dict(raw))
    if problems := [problem for override in overrides if (problem := _set(data, override))]:
        raise ConfigError(source, [(".".join(map(str, key)), told) for key, told in problems])
    return data


def _inner_run(data: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The run of a sweep file, checked, with every value written out."""
    run, changes = data.get("run"), data.get("set") or {}
    if run is None:
        raise ConfigError(str(path), [("run", "missing; name the run file that is varied, or write its keys")])
    if not isinstance(changes, dict):
        raise ConfigError(str(path), [("set", "expected dotted keys and values, e.g. {optim.batch_size: 32}")])
    where, folder, lines, raw = f"{path}, run", path.parent, None, run
    if isinstance(run, str):
        where = _beside(run, path.parent)
        lines = _mapping(where, "expected keys such as name: and data: at the top; see `ftray init`")
        folder, raw = Path(where).parent, lines.data
    if not isinstance(raw, dict):
        raise ConfigError(str(path), [("run", "expected a run file, or its keys")])
    raw = copy.deepcopy(raw)
    if wrong := [found for key, value in changes.items() if (found := put(raw, tuple(key.split(".")), value))]:
        raise ConfigError(str(path), [(f"set.{'.'.join(map(str, key))}", told) for key, told in wrong])
    return run_from(raw, source=where, lines=lines, folder=folder).model_dump(mode="json")


def run_from(
    raw: Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    source: str = "run",
    lines: document.Document | None = None,
    folder: Path | None = None,
) -> Run:
    """The same for plain data, e.g. a request's body. `lines` and `folder` are those of the file it came from."""
    if "stages" in raw:
        raise ConfigError(source, [("stages", "are for `ftray train` and `ftray check`; here one run is meant")])
    return _checked(Run, raw, overrides, source=source, lines=lines, folder=folder)


def _mapping(path: str | os.PathLike[str], hint: str) -> document.Document:
    source = os.fspath(path)
    text = document.parse(_read(Path(path)), source=source)
    if text.data is None:
        raise ConfigError(source, [("", "the file is empty; `ftray init` writes a starter")])
    if not isinstance(text.data, dict):
        raise ConfigError(source, [("", hint)])
    return text


def _checked(
    root: type[Root],
    raw: Mapping[str, Any],
    overrides: Sequence[str],
    *,
    source: str,
    lines: document.Document | None = None,
    folder: Path | None = None,
) -> Root:
    data = copy.deepcopy(dict(raw))
    problems: list[tuple[Path_, str]] = []
    for override in overrides:
        problem = _set(data, override)
        if problem:
            problems.append(problem)
    data = _without_empty_sections(root, data)
    if folder is not None:
        _find_files(data, folder)
    checked = None
    try:
        checked = root.model_validate(data)
    except ValidationError as error:
        problems += explain.problems(root, data, error.errors(include_url=False))
    if checked is None or problems:
        overridden = {override.partition("=")[0].strip() for override in overrides}
        placed = [_placed(path, text, overridden, lines) for path, text in problems]
        raise ConfigError(source, [(key, text) for _, key, text in sorted(placed, key=lambda p: p[0])])
    return checked


def dump_run(run: Section) -> str:
    """A run (or what is served) as YAML with every value written out; loading it gives an equal one."""
    return document.dump(run.model_dump(mode="json"))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = [str(p) for p in sorted(path.parent.glob("*.y*ml"))] if path.parent.is_dir() else []
        close = difflib.get_close_matches(str(path), near, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]}?" if close else "`ftray init` writes a starter"
        raise ConfigError(str(path), [("", f"no such file; {hint}")]) from None
    except IsADirectoryError:
        inside = ", ".join(p.name for p in sorted(path.glob("*.y*ml"))[:5])
        hint = f"name a file in it: {inside}" if inside else "name a run file"
        raise ConfigError(str(path), [("", f"this is a folder; {hint}")]) from None
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), [("", f"not UTF-8 text (byte {error.start}); save it as UTF-8")]) from None
    except OSError as error:
        raise ConfigError(str(path), [("", f"cannot be read: {error.strerror}")]) from None


def _without_empty_sections(section: type, data: dict[str, Any]) -> dict[str, Any]:
    """`optim:` with every key under it commented out means the section's defaults."""
    kept = {}
    for key, value in data.items():
        field = section.model_fields.get(key) if isinstance(key, str) else None  # type: ignore[attr-defined]
        inner = explain.sections_of(field.annotation) if field else []
        if value is None and inner and not field.is_required():  # type: ignore[union-attr]
            continue
        if isinstance(value, dict) and len(inner) == 1:
            value = _without_empty_sections(inner[0], value)
        kept[key] = value
    return kept


def _set(data: dict[str, Any], override: str) -> tuple[Path_, str] | None:
    """Sets one override in place. Returns a problem where there is no such place; unknown keys are found later."""
    dotted, equals, text = override.partition("=")
    path = tuple(part.strip() for part in dotted.split("."))
    if not equals or not all(path):
        return (), f"cannot read the override {override!r}; write key=value, e.g. optim.lr=2e-4"
    try:
        value = document.scalar(text)
    except yaml.YAMLError:
        return path, f"cannot read {text!r}; quote the override in the shell, e.g. 'method.targets=[q_proj, v_proj]'"
    return put(data, path, value)


def put(data: dict[str, Any], path: tuple[str, ...], value: Any) -> tuple[Path_, str] | None:
    """Sets one key in place, sections made where they are absent. Returns a problem where there is no such place."""
    around: Any = data
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(around, list):
            if not part.isdigit() or int(part) >= len(around):
                return path[: depth + 1], f"{'.'.join(path[:depth])} has the entries {list(range(len(around)))}"
            key: Any = int(part)
        elif isinstance(around, dict):
            key = part
        else:
            return path[:depth], f"holds {around!r}, so there is no {part!r} in it"
        if last:
            around[key] = value
        else:
            around = _open(around, key)
    return None


def _open(around: Any, key: Any) -> Any:
    """The section or list at `key`, made where it is absent; the short forms of `sources` are written out."""
    inner = around[key] if isinstance(around, list) else around.get(key)
    if inner is None:
        inner = {}
    elif key in ("sources", "eval_sources"):
        inner = [{"path": item} if isinstance(item, str) else item for item in _as_list(inner)]
    around[key] = inner
    return inner


def _find_files(data: dict[str, Any], folder: Path) -> None:
    section = data.get("data")
    for key in ("sources", "eval_sources"):
        if not isinstance(section, dict) or key not in section:
            continue
        found = []
        for item in _as_list(section[key]):
            if isinstance(item, str):
                item = _beside(item, folder)
            elif isinstance(item, dict) and isinstance(item.get("path"), str):
                item = {**item, "path": _beside(item["path"], folder)}
            found.append(item)
        section[key] = found if isinstance(section[key], list) else found[0]
    section = data.get("evaluate")
    if isinstance(section, dict):
        for named, key in ((section, "forgetting"), (section.get("lm_eval"), "folder")):
            if isinstance(named, dict) and isinstance(named.get(key), str):
                named[key] = _beside(named[key], folder)
    section = data.get("objective")
    for reward in _as_list(section.get("rewards")) if isinstance(section, dict) else []:
        if isinstance(reward, dict) and (match := FUNCTION.fullmatch(str(reward.get("function")))):
            reward["function"] = f"{_beside(file_of(match), folder)}:{match['name']}"


def _beside(path: str, folder: Path) -> str:
    """`path` as written, unless it is missing from the current directory and present in the run file's folder."""
    if "://" in path or Path(path).expanduser().is_absolute() or _is_there(Path(path)):
        return path
    return str(folder / path) if _is_there(folder / path) else path


def _is_there(path: Path) -> bool:
    try:
        return path.exists() or next(glob.iglob(str(path), recursive=True), None) is not None
    except (OSError, ValueError):  # a name that no file can have, e.g. too long or with a NUL
        return False


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _path(dotted: str) -> Path_:
    return tuple(int(part) if part.isdigit() else part for part in dotted.split(".") if part)


def _placed(path: Path_, text: str, overridden: set[str], lines: document.Document | None) -> tuple[int, str, str]:
    """(line for sorting, dotted key, problem with its line or that it came from an override)."""
    dotted = ".".join(map(str, path))
    if dotted in overridden:
        return sys.maxsize, dotted, f"{text} (on the command line)"
    # Overrides carry indices as text and the file as numbers; a missing key is at its section's line.
    line = lines.line(tuple(int(p) if str(p).isdigit() else p for p in path)) if lines else None
    return line or 0, dotted, f"{text} (line {line})" if line else text
