"""What pydantic says about a run file, in words for the person who wrote it: the key, what is wrong, the way out."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

Path_ = tuple[str | int, ...]
Problem = tuple[Path_, str]

# Names from other trainers, so that a file carried over is told its new key.
_OTHER_TRAINERS = {
    "base_model": "model.base",
    "bf16": "model.dtype",
    "cutoff_len": "data.max_length",
    "datasets": "data.sources",
    "dataset": "data.sources",
    "deepspeed": "scale.zero",
    "finetuning_type": "method.kind",
    "fp16": "model.dtype",
    "gradient_accumulation_steps": "optim.batch_size",
    "learning_rate": "optim.lr",
    "load_in_4bit": "method.bits",
    "load_in_8bit": "method.bits",
    "lora_alpha": "method.alpha",
    "lora_dropout": "method.dropout",
    "lora_r": "method.rank",
    "lora_rank": "method.rank",
    "lora_target": "method.targets",
    "lora_target_modules": "method.targets",
    "lr_scheduler": "optim.schedule",
    "lr_scheduler_type": "optim.schedule",
    "max_seq_length": "data.max_length",
    "max_steps": "optim.steps",
    "model_name_or_path": "model.base",
    "num_epochs": "optim.epochs",
    "num_virtual_tokens": "method.tokens",
    "oft_block_size": "method.block",
    "prompt_tuning_init_text": "method.text",
    "init_r": "method.start_rank",
    "target_r": "method.rank",
    "num_train_epochs": "optim.epochs",
    "num_workers": "scale.workers",
    "output_dir": "storage",
    "per_device_train_batch_size": "optim.micro_batch_size",
    "pref_beta": "objective.beta",
    "pref_ftx": "objective.sft_weight",
    "pref_loss": "objective.loss",
    "quantization_bit": "method.bits",
    "report_to": "track.to",
    "sequence_len": "data.max_length",
    "stage": "objective.kind",
    "target_modules": "method.targets",
    "template": "data.template",
    "val_set_size": "data.eval_fraction",
    "warmup_ratio": "optim.warmup",
    "warmup_steps": "optim.warmup",
}
_OTHER_KINDS = {
    "qlora": "kind: lora with bits: 4",
    "dora": "kind: lora with dora: true",
    "rslora": "kind: lora with rslora: true",
    "pissa": "kind: lora with init: pissa",
    "pt": "kind: pretrain",
    "adapter": "kind: bottleneck",
    "houlsby": "kind: bottleneck with placement: houlsby",
    "pfeiffer": "kind: bottleneck with placement: pfeiffer",
    "ln_tuning": "kind: norms",
    "prefix_tuning": "kind: prefix",
    "prompt_tuning": "kind: prompt",
    "mpt": "kind: multitask_prompt",
    "ptuning": "kind: p_tuning",
    "trainable_tokens": "kind: tokens",
}


def problems(root: type[BaseModel], raw: Any, errors: Sequence[Mapping[str, Any]]) -> list[Problem]:
    """`errors` as pydantic's `ValidationError.errors()` gives them; one problem per key, in the order of the file."""
    by_path: dict[Path_, list[Mapping[str, Any]]] = {}
    for error in errors:
        by_path.setdefault(_path_in_file(error, raw), []).append(error)
    found: list[Problem] = []
    for path, here in by_path.items():
        inner = any(other[: len(path)] == path for other in by_path if other != path)
        if inner and all(error["type"].endswith("_type") for error in here):
            continue  # of a union, the member that was meant fits but for a value inside it
        found += _explain(root, raw, path, here)
    return found


def field_at(root: type[BaseModel], raw: Any, path: Path_) -> FieldInfo | None:
    """The schema's field at a key of the file; for a union the member that `kind` in the file names."""
    section: type[BaseModel] | None = root
    found: FieldInfo | None = None
    for part in path:
        raw = _step(raw, part)
        if isinstance(part, int):
            continue
        if found is not None and get_origin(found.annotation) is dict:  # a name that the user chose
            section = next((m for m in sections_of(found.annotation) if _kind(m) == _step(raw, "kind")), section)
            continue
        found = section.model_fields.get(part) if section else None
        if found is None:
            return None
        members = sections_of(found.annotation)
        section = next((m for m in members if _kind(m) == _step(raw, "kind")), members[0]) if members else None
    return found


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field holds: itself, the members of its union, or the entries of its list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for arg in get_args(annotation) for section in sections_of(arg)]


def expected(annotation: Any) -> str:
    """What may be written, e.g. `float | Literal["auto"]` -> "a number or 'auto'"."""
    members = sections_of(annotation)
    if get_origin(annotation) is not list and len(members) > 1:
        return f"a section with kind: {_any_of([_kind(section) for section in members])}"
    return _or(_words(annotation))


def _words(annotation: Any) -> list[str]:
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation in plain:
        return [plain[annotation]]
    if origin is typing.Annotated:
        return _words(args[0])
    if origin is Literal:
        return [repr(args[0])] if len(args) == 1 else [str(arg) for arg in args]
    if origin in (typing.Union, types.UnionType):
        return [word for arg in args if arg is not type(None) for word in _words(arg)]
    if origin is list:
        return ["a list" if sections_of(args[0]) else f"a list, each {_or(_words(args[0]))}"]
    if origin is tuple:
        return [f"a list of {len(args)}, each {_or(_words(args[0]))}"]
    if origin is dict:
        return ["names with values, e.g. {prompt: question}"]
    return ["a section: keys with values, indented under it"]


def did_you_mean(word: object, known: Sequence[object]) -> str:
    close = difflib.get_close_matches(str(word).lower(), [str(k) for k in known], n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else ""


def _explain(root: type[BaseModel], raw: Any, path: Path_, errors: list[Mapping[str, Any]]) -> Iterator[Problem]:
    first, kind = errors[0], str(errors[0]["type"])
    value = value_at(raw, path)
    if kind == "invalid_key":
        yield path, f"a key is a word, got {_shown(first['input'])}"
    elif kind == "extra_forbidden":
        yield path, _unknown_key(root, raw, path)
    elif kind == "union_tag_invalid":
        yield (*path, "kind"), _unknown_kind(first["ctx"]["tag"], sections_of(_annotation(root, raw, path)))
    elif kind == "union_tag_not_found":
        yield (*path, "kind"), f"missing; {_any_of([_kind(s) for s in sections_of(_annotation(root, raw, path))])}"
    elif kind == "missing":
        field = field_at(root, raw, path)
        yield path, f"missing; {field.description if field and field.description else 'write it'}"
    elif kind == "value_error":
        for line in str(first["ctx"]["error"]).splitlines():
            key, _, rest = line.partition(": ")
            yield (tuple(key.split(".")), rest) if not path else (path, line)
    else:
        limit = next((text for error in errors if (text := _limit(error))), None)
        yield path, limit or _wrong_type(_annotation(root, raw, path), value, field_at(root, raw, path))


def _limit(error: Mapping[str, Any]) -> str | None:
    kind, ctx = error["type"], error.get("ctx", {})
    words = {
        "greater_than": "must be greater than {gt}",
        "greater_than_equal": "must be at least {ge}",
        "less_than": "must be less than {lt}",
        "less_than_equal": "must be at most {le}",
        "finite_number": "must be a finite number",
    }
    if kind in words:
        return f"{words[kind].format(**{k: _number(v) for k, v in ctx.items()})}, got {_shown(error['input'])}"
    if kind == "too_short" and ctx.get("actual_length") == 0:
        return "is empty; name at least one"
    return None


def _wrong_type(annotation: Any, value: Any, field: FieldInfo | None) -> str:
    text = f"expected {expected(annotation)}, got {_shown(value)}"
    if isinstance(value, str):
        hint = did_you_mean(value, _literals(annotation))
        members = [_kind(section) for section in sections_of(annotation)]
        if value in members:
            hint = f"write {{kind: {value}}}"
        elif value in _OTHER_KINDS and any(members):
            hint = f"write {_OTHER_KINDS[value]}"
        return f"{text}; {hint}" if hint else text
    if value is None:
        default = field.get_default(call_default_factory=True) if field and not field.is_required() else None
        return f"{text}; leave the key out for its default{f' ({default})' if default is not None else ''}"
    if str in (annotation, *get_args(annotation)) and isinstance(value, int | float):
        return f"{text}; put it in quotes"
    return text


def _unknown_kind(tag: object, members: Sequence[type[BaseModel]]) -> str:
    known = [_kind(member) for member in members]
    if str(tag).lower() in _OTHER_KINDS:
        return f"there is no {tag!r}; write {_OTHER_KINDS[str(tag).lower()]}"
    hint = did_you_mean(tag, known)
    return f"there is no {tag!r}; {hint + ' There are' if hint else 'there are'} {', '.join(map(str, known))}"


def _unknown_key(root: type[BaseModel], raw: Any, path: Path_) -> str:
    key = str(path[-1])
    section = _section_around(root, raw, path)
    own = list(section.model_fields) if section else []
    close = did_you_mean(key, own)
    places = list(_places(root))
    if isinstance(value_at(raw, path), Mapping) and close:
        return f"unknown key; {close}"
    for name, where, of_kind in places:
        if name == key:
            around = ".".join(str(part) for part in path[:-1] if isinstance(part, str))
            if where == around and of_kind:
                kind = _kind(section) if section else None
                return f"unknown key for kind: {kind}; it belongs to kind: {of_kind}"
            return f"unknown key; {key!r} belongs under {where}" if where else f"unknown key; {key!r} stands at the top"
    if key.lower() in _OTHER_TRAINERS:
        return f"unknown key; here it is {_OTHER_TRAINERS[key.lower()]}"
    if close:
        return f"unknown key; {close}"
    elsewhere = did_you_mean(key, [name for name, _, _ in places])
    for name, where, _ in places:
        if repr(name) in elsewhere:
            return f"unknown key; did you mean {f'{where}.{name}' if where else name!r}?"
    return f"unknown key; known here: {', '.join(own)}" if own else "unknown key"


def _places(section: type[BaseModel], where: str = "") -> Iterator[tuple[str, str, str | None]]:
    """(key, dotted section, kind of the union member that has it or None) for every key of the schema."""
    for name, field in section.model_fields.items():
        if name != "kind":
            yield name, where, _kind(section)
        for inner in sections_of(field.annotation):
            yield from _places(inner, f"{where}.{name}" if where else name)


def _path_in_file(error: Mapping[str, Any], raw: Any) -> Path_:
    """pydantic's location without what the file does not say: union tags, type names, indices of short forms."""
    path: list[str | int] = []
    loc = error["loc"]
    for position, part in enumerate(loc):
        in_list = isinstance(raw, list) and isinstance(part, int) and part < len(raw)
        if in_list or (isinstance(raw, Mapping) and part in raw):
            raw = raw[part]
        elif not (error["type"] in ("missing", "invalid_key") and position == len(loc) - 1):
            continue
        path.append(part)
    return tuple(path)


def _section_around(root: type[BaseModel], raw: Any, path: Path_) -> type[BaseModel] | None:
    around = path[:-1]
    if not around:
        return root
    field = field_at(root, raw, around)
    members = sections_of(field.annotation) if field else []
    kind = _step(value_at(raw, around), "kind")
    return next((m for m in members if _kind(m) == kind), members[0] if members else None)


def _annotation(root: type[BaseModel], raw: Any, path: Path_) -> Any:
    field = field_at(root, raw, path)
    annotation = field.annotation if field else root
    for part in path[::-1]:
        if not isinstance(part, int):
            break
        args = [arg for arg in (annotation, *get_args(annotation)) if get_origin(arg) in (list, tuple)]
        annotation = get_args(args[0])[0] if args else annotation
    return annotation


def _kind(section: type[BaseModel]) -> str | None:
    field = section.model_fields.get("kind")
    return field.default if field else None


def _literals(annotation: Any) -> list[object]:
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [value for arg in get_args(annotation) for value in _literals(arg)]


def _step(raw: Any, part: str | int) -> Any:
    if isinstance(raw, Mapping):
        return raw.get(part)
    if isinstance(raw, list) and isinstance(part, int) and part < len(raw):
        return raw[part]
    return None


def value_at(raw: Any, path: Path_) -> Any:
    for part in path:
        raw = _step(raw, part)
    return raw


def _any_of(words: Sequence[object]) -> str:
    return f"one of {', '.join(map(str, words))}"


def _or(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]


def _number(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return f"keys ({', '.join(map(str, list(value)[:3]))})" if value else "an empty section"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
