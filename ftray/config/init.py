"""A commented run file to start from, written from the schema's own descriptions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ftray.config import document, explain
from ftray.config.schema import Run
from ftray.config.starters import STARTERS

# What nearly every run sets, so it is written out; every other key stands behind a '#' with its default.
_WRITTEN = {"name", "model.base", "data.max_length", "optim.lr", "optim.epochs", "optim.batch_size", "scale.workers"}
_WHY = {
    "model": "what is tuned",
    "data": "what it learns from",
    "method": "how the weights adapt",
    "objective": "what is optimised",
    "optim": "how it learns",
    "scale": "where and how widely it runs",
    "evaluate": "how it is judged, before and after",
    "track": "where metrics go beside the report",
}
_COLUMN = 40


def starter(method: str, data: Sequence[str], name: str, base: str = "builtin:tiny") -> str:
    """A run file as text. `method` is a key of STARTERS; `data` the paths of the training rows.

    Every key of the schema stands in it: those a run usually sets are written, the others show their default behind a
    '#'.
    """
    values: dict[str, Any] = {"objective": {"kind": "sft"}, "model": {"base": base}, **STARTERS[method], "name": name}
    values["data"] = {"sources": [{"path": path} for path in data]}
    lines = [
        f"# {name}: a {method} run. Keys behind a '#' show their default; what 'auto' becomes is printed at the start",
        "# and by `ftray check`. Any key can be set for one run: `ftray train FILE optim.lr=2e-4`.",
    ]
    for key, field in Run.model_fields.items():
        if explain.sections_of(field.annotation):
            lines += ["", _comment(f"{key}:", _WHY[key]), *_section(key, field, values.get(key, {}), "  ")]
        else:
            lines += _key(key, key, field, values, "")
    return "\n".join(lines) + "\n"


def _section(path: str, field: FieldInfo, values: Mapping[str, Any], indent: str) -> list[str]:
    members = explain.sections_of(field.annotation)
    kind = values.get("kind")
    chosen = next((m for m in members if kind and m.model_fields["kind"].default == kind), members[0])
    lines = []
    if kind:
        kinds = " · ".join(str(m.model_fields["kind"].default) for m in members)
        lines.append(_comment(f"{indent}kind: {kind}", kinds))
    for key, inner in chosen.model_fields.items():
        if key == "kind":
            continue
        if key == "sources":
            lines += [_comment(f"{indent}sources:", inner.description), *_sources(inner, values["sources"], indent)]
        elif key == "eval_sources":
            lines.append(_comment(f"{indent}# eval_sources: [held-out.jsonl]", inner.description))
        elif _is_section(inner):
            lines.append(_comment(f"{indent}# {key}:", inner.description))
            lines += _defaults(explain.sections_of(inner.annotation)[0], f"{indent}#   ")
        else:
            lines += _key(f"{path}.{key}", key, inner, values, indent)
    return lines


def _sources(field: FieldInfo, sources: Sequence[Mapping[str, Any]], indent: str) -> list[str]:
    source = explain.sections_of(field.annotation)[0]
    lines = []
    for number, values in enumerate(sources):
        lines.append(f"{indent}  - path: {document.inline(values['path'])}")
        if number == 0:
            lines += _defaults(source, f"{indent}  #   ")
    return lines


def _defaults(section: type[BaseModel], indent: str) -> list[str]:
    """The optional keys of a section, as they stand behind a '#'."""
    return [
        _comment(f"{indent}{key}: {document.inline(_default(field))}", field.description)
        for key, field in section.model_fields.items()
        if not field.is_required()
    ]


def _key(path: str, key: str, field: FieldInfo, values: Mapping[str, Any], indent: str) -> list[str]:
    written = key in values or path in _WRITTEN
    value = values[key] if key in values else _default(field)
    return [_comment(f"{indent}{'' if written else '# '}{key}: {document.inline(value)}", field.description)]


def _default(field: FieldInfo) -> Any:
    value = field.get_default(call_default_factory=True)
    return list(value) if isinstance(value, tuple) else value


def _is_section(field: FieldInfo) -> bool:
    return len(explain.sections_of(field.annotation)) > 0


def _comment(text: str, why: str | None) -> str:
    return f"{text:<{_COLUMN}}# {why}" if why else text
