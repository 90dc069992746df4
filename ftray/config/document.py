"""A run file's text: YAML read by the rules of YAML 1.2, with the line of every key.

PyYAML follows YAML 1.1, where `1e-4` is text, `on` is true, and `12:30` is a number: three surprises in a run file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from ftray.errors import ConfigError

Path_ = tuple[str | int, ...]

_TAG = "tag:yaml.org,2002:"
_FLOAT = re.compile(r"[-+]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_INT = re.compile(r"[-+]?\d[\d_]*|0x[0-9a-fA-F]+|0o[0-7]+")
_RULES = (  # the first that matches the whole scalar names its type, so whole numbers come before numbers
    ("null", re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+0123456789.")),
    ("merge", re.compile(r"<<"), ["<"]),
)


class _Loader(yaml.SafeLoader):
    """Reads by _RULES alone."""


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _whole(rule: re.Pattern[str]) -> re.Pattern[str]:
    return re.compile(rf"(?:{rule.pattern})\Z")


_Loader.yaml_implicit_resolvers = {}  # a class of its own copies PyYAML's rules at its first
for _name, _rule, _first in _RULES:
    _Loader.add_implicit_resolver(_TAG + _name, _whole(_rule), _first)
_Dumper.add_implicit_resolver(_TAG + "int", _whole(_INT), list("-+0123456789"))
_Dumper.add_implicit_resolver(_TAG + "float", _whole(_FLOAT), list("-+0123456789."))


def _int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node).replace("_", "")
    return int(text, 0) if text[:2] in ("0x", "0o") else int(text)


def _float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    text = loader.construct_scalar(node).replace("_", "")
    return float(re.sub(r"\.(?=[iInN])", "", text))


_Loader.add_constructor(_TAG + "int", _int)
_Loader.add_constructor(_TAG + "float", _float)


@dataclass(frozen=True)
class Document:
    """`data` is plain dicts, lists and scalars; `lines` gives the 1-based line of a key, e.g. ("optim", "lr") -> 7."""

    data: Any
    lines: dict[Path_, int] = field(default_factory=dict)

    def line(self, path: Path_) -> int | None:
        """The line of the key, or of the nearest section around it that stands in the file."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path)


def parse(text: str, *, source: str) -> Document:
    """Reads one YAML document. ConfigError with the line when it is not YAML or says a key twice."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return Document(None)
        lines: dict[Path_, int] = {}
        problems: list[tuple[str, str]] = []
        _walk(node, (), lines, problems, around=())
        if problems:
            raise ConfigError(source, problems)
        return Document(loader.construct_document(node), lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}" if mark else source
        raise ConfigError(where, [("", _what_is_wrong(error, text, mark))]) from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        problem = f"the character U+{ord(text[error.position]):04X} is not allowed in YAML; delete it"
        raise ConfigError(f"{source}:{line}", [("", problem)]) from None


def scalar(text: str) -> Any:
    """The value of a dotted override: "2e-4" -> 0.0002, "[a, b]" -> ["a", "b"], "Be brief: really" -> that text."""
    flow = text[:1] in "[{'\"" and text
    try:
        value = _Loader(text).get_single_data()
    except yaml.YAMLError:
        if flow:
            raise
        return text
    return value if flow or not isinstance(value, dict | list) else text


def dump(data: Any) -> str:
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)


def inline(value: Any) -> str:
    """One value on one line, e.g. ["loss < base"] -> "[loss < base]"."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=10_000)
    return text.removesuffix("...\n").strip()


def _walk(
    node: yaml.Node, path: Path_, lines: dict[Path_, int], problems: list[tuple[str, str]], *, around: tuple[int, ...]
) -> None:
    """Fills `lines`, and `problems` with keys said twice and sections that hold themselves."""
    if id(node) in around:
        problems.append((_dotted(path), "holds itself through its anchor; write it out"))
        return
    around = (*around, id(node))
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, str(key.value))
            line = key.start_mark.line + 1
            if here in lines and key.value != "<<":
                problems.append((_dotted(here), f"said twice, on lines {lines[here]} and {line}; keep one"))
            lines[here] = line
            _walk(value, here, lines, problems, around=around)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*path, index)] = item.start_mark.line + 1
            _walk(item, (*path, index), lines, problems, around=around)


def _dotted(path: Path_) -> str:
    return ".".join(map(str, path))


def _what_is_wrong(error: yaml.MarkedYAMLError, text: str, mark: yaml.Mark | None) -> str:
    problem = error.problem or "cannot be read"
    line = text.splitlines()[mark.line].rstrip() if mark and mark.line < len(text.splitlines()) else ""
    if "\\t" in problem or "\t" in line:
        way_out = "indent with spaces, not tabs"
    elif "mapping values are not allowed" in problem:
        way_out = "put text that holds ': ' in quotes, and keep keys of one section at one indent"
    elif "expected <block end>" in problem:
        way_out = "keep the keys of one section at one indent"
    elif "undefined alias" in problem or "cannot start any token" in problem:
        way_out = "put text that starts with *, &, @, % or ` in quotes"
    elif "expected a single document" in str(error):
        way_out = "keep one run per file, without '---' between"
    else:
        way_out = "check brackets and quotes around here"
    shown = f"\n      {line.strip()}" if line.strip() else ""
    return f"not YAML: {problem}; {way_out}{shown}"
