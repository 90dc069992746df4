"""`stages:` of a run file: several runs in order, each from the version that the one before left.

A stage is written like a run, as far as it differs from what stands beside `stages:`, which all stages share.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ftray.config import explain
from ftray.config.schema import VERSION
from ftray.errors import ConfigError

KEYS = ("name", "seed", "data", "method", "objective", "optim", "scale", "evaluate")

Path_ = tuple[str | int, ...]


@dataclass(frozen=True)
class Stage:
    """`keys`: the stage as a whole run; `own`: what it says itself, as entry `index` of the file's list."""

    index: int
    keys: dict[str, Any]
    own: Mapping[str, Any]
    shared: Mapping[str, Any]

    def place(self, path: Path_) -> Path_:
        """Where a key of the run stands in the file."""
        said = explain.value_at(self.own, path[:2]) is not None
        is_own = said or (path[:1] and path[0] in self.own and explain.value_at(self.shared, path[:2]) is None)
        return ("stages", self.index, *path) if is_own else path


def expanded(raw: Mapping[str, Any], source: str) -> list[Stage]:
    """The runs of a file with `stages:`, unchecked. ConfigError where there is no list of sections."""
    if problems := list(_problems(raw["stages"])):
        raise ConfigError(source, problems)
    shared = {key: value for key, value in raw.items() if key != "stages"}
    found: list[Stage] = []
    for index, own in enumerate(raw["stages"]):
        keys = _over(shared, {"name": f"{raw.get('name')}-{index + 1}", **own})
        if found:
            model = shared.get("model") if isinstance(shared.get("model"), Mapping) else {}
            before = found[-1].keys["name"]
            keys["model"] = {**model, "base": f"{VERSION}{before}", "revision": None}  # type: ignore[dict-item]
        found.append(Stage(index, keys, own, shared))
    names = [stage.keys["name"] for stage in found]
    if twice := [index for index, name in enumerate(names) if name in names[:index]]:
        told = f"{names[twice[0]]!r} is an earlier stage's; each leaves versions under a name of its own"
        raise ConfigError(source, [(f"stages.{twice[0]}.name", told)])
    return found


def _problems(stages: Any) -> Iterator[tuple[str, str]]:
    if not isinstance(stages, list) or not stages:
        yield "stages", "expected a list of sections, e.g. [{objective: {kind: pretrain}}, {objective: {kind: sft}}]"
        return
    for index, own in enumerate(stages):
        if not isinstance(own, Mapping):
            yield f"stages.{index}", f"expected keys of a run ({', '.join(KEYS)}), got {own!r}"
            continue
        for key in own:
            if key == "model":
                yield f"stages.{index}.model", "a stage starts from the one before; the first one's stands at the top"
            elif key not in KEYS:
                hint = explain.did_you_mean(key, KEYS) or f"a stage has {', '.join(KEYS)}"
                yield f"stages.{index}.{key}", f"unknown key; {hint}"


def _over(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`own` over what is shared, section by section; a section of another kind is replaced."""
    found = copy.deepcopy(dict(shared))
    for key, value in own.items():
        before = found.get(key)
        if (
            isinstance(before, Mapping)
            and isinstance(value, Mapping)
            and value.get("kind") in (None, before.get("kind"))
        ):
            found[key] = _over(before, value)
        else:
            found[key] = copy.deepcopy(value)
    return found
