"""What a folder must be to become a version: safetensors only, finite, and an adapter that is what its config says."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftray.errors import RegistryError
from ftray.store.localfiles import file_sha256
from ftray.store.paths import MARKER

CARD = "card.json"
_CONFIGS = ("adapter_config.json", "config.json", "head.json")

_NOT_CONTENT = {CARD, MARKER}
_PICKLED = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".h5", ".msgpack"}
_LORA = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?:\.weight)?"
)


@dataclass(frozen=True)
class Content:
    """The files of a version: {name: {size, sha256}}, and one digest over all of them."""

    files: dict[str, dict[str, Any]]
    digest: str


def admit(folder: Path, card: Mapping[str, Any]) -> Content:
    """Checks a folder at publication. RegistryError lists all that is wrong with it."""
    if not folder.is_dir():
        raise RegistryError(f"{folder} is not a folder; publish the folder that the run saved")
    names = content_names(folder)
    problems = [*_pickled(folder, names)]
    config_name = next((name for name in _CONFIGS if name in names), "config.json")
    weights = [name for name in names if name.endswith(".safetensors")]
    if not weights:
        problems.append("no *.safetensors file; save with safe_serialization=True")
    config: dict[str, Any] | None = None
    if config_name not in names:
        problems.append(
            "no adapter_config.json, config.json or head.json; save the adapter or the model, not its tensors only"
        )
    else:
        try:
            config = json.loads((folder / config_name).read_text(encoding="utf-8"))
        except ValueError as error:
            problems.append(f"{config_name} is not JSON: {error}")
    shapes: dict[str, tuple[int, ...]] = {}
    if not problems:
        for name in weights:
            problems += _tensors(folder / name, shapes)
    if isinstance(config, dict) and not problems:
        if not (config.get("base_model_name_or_path") or card.get("base")):
            problems.append(
                f"no base is named: neither base_model_name_or_path in {config_name} nor 'base' in the card"
            )
        if config_name == "adapter_config.json":
            problems += _adapter(config, shapes)
        if config_name == "head.json":
            problems += _head(config, shapes)
        problems += _index(folder, names)
    if problems:
        raise RegistryError("\n".join([f"{folder} cannot be published:", *(f"  {problem}" for problem in problems)]))
    files = {name: {"size": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)} for name in names}
    return Content(files, digest(files))


def content_names(folder: Path) -> list[str]:
    """Files that make up a version, sorted; hidden files and the registry's own card and marker are not content."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    names = (path.as_posix() for path in paths if not any(piece.startswith(".") for piece in path.parts))
    return sorted(name for name in names if name not in _NOT_CONTENT)


def digest(files: Mapping[str, Mapping[str, Any]]) -> str:
    """sha256 over the sorted (file name, sha256) pairs."""
    total = hashlib.sha256()
    for name in sorted(files):
        total.update(f"{name}\0{files[name]['sha256']}\n".encode())
    return total.hexdigest()


def _pickled(folder: Path, names: Iterable[str]) -> Iterable[str]:
    for name in names:
        with open(folder / name, "rb") as file:
            head = file.read(4)
        # A pickle of protocol 2 or later, or the zip that torch.save writes, whatever it is called.
        hidden = not name.endswith(".safetensors") and (
            (head[:1] == b"\x80" and head[1:2] <= b"\x05") or head == b"PK\3\4"
        )
        if Path(name).suffix.lower() in _PICKLED or hidden:
            yield f"{name} is not safetensors and may hold a pickle, which runs code when it is loaded; remove it"


def _tensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Reads one file's tensors into `shapes`; returns what is wrong with them."""
    import torch
    from safetensors import SafetensorError, safe_open

    problems = []
    try:
        with safe_open(str(path), framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (it is no mapping)
                tensor = file.get_tensor(key)
                if key in shapes:
                    problems.append(f"{path.name}: tensor {key} is in two files")
                shapes[key] = tuple(tensor.shape)
                if tensor.is_floating_point() and tensor.itemsize == 1:
                    tensor = tensor.float()  # 8-bit floats know no isfinite
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    problems.append(f"{path.name}: tensor {key} holds NaN or infinite numbers; the run diverged")
    except (SafetensorError, OSError) as error:
        problems.append(f"{path.name} cannot be read: {error}; save it again")
    return problems


def _index(folder: Path, names: Iterable[str]) -> list[str]:
    """Shards that an index names must be there."""
    names = set(names)
    problems = []
    for name in sorted(names):
        if name.endswith(".safetensors.index.json"):
            try:
                shards = set(json.loads((folder / name).read_text(encoding="utf-8"))["weight_map"].values())
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                problems.append(f"{name} is no index of shards: {error!r}")
                continue
            problems += [f"{name} names {shard}, which is not there" for shard in sorted(shards - names)]
    return problems


def _adapter(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    if not config.get("peft_type"):
        return ["adapter_config.json has no peft_type; save it with PEFT"]
    if not shapes:
        return ["the adapter has no tensors; under ZeRO-3 its parameters must be gathered before saving"]
    empty = [key for key, shape in shapes.items() if 0 in shape]
    if empty:
        return [f"tensor {empty[0]} is empty; under ZeRO-3 parameters must be gathered before saving"]
    return _lora(config, shapes) if config["peft_type"] == "LORA" else []


def _head(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """A head over a frozen base: from `width` numbers, perhaps through `hidden`, to `labels`."""
    width, hidden, labels = (config.get(key) for key in ("width", "hidden", "labels"))
    layers = {"outer.weight": (labels, hidden or width), "outer.bias": (labels,), "mean": (width,), "scale": ()}
    if hidden is not None:
        layers |= {"inner.weight": (hidden, width), "inner.bias": (hidden,)}
    return [] if layers == dict(shapes) else ["the tensors are not those that head.json says; save the head again"]


def _lora(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Every A and B has its partner and the rank that the config says, and targets and tensors are the same modules."""
    problems = []
    halves: dict[str, set[str]] = {}
    for key, shape in shapes.items():
        match = _LORA.fullmatch(key)
        if match is None:
            continue
        module, kind = match["module"], match["kind"]
        halves.setdefault(module, set()).add(kind[-1])
        rank, found = _rank(config, module), shape[0] if kind.endswith("A") else shape[1] if len(shape) > 1 else 0
        # PEFT stacks the experts of a fused parameter along the rank.
        if found != rank and not (config.get("target_parameters") and found % rank == 0):
            problems.append(f"tensor {key} has rank {found}, but adapter_config.json says {rank}")
    if not halves:
        return ["adapter_config.json says LORA, but no tensor is a lora_A or lora_B"]
    problems += [f"{module} has only lora_{min(half)}" for module, half in halves.items() if len(half) == 1]
    targets = config.get("target_modules")
    named = [targets] if isinstance(targets, str) else list(targets or [])
    if named and named != ["all-linear"] and not config.get("target_parameters"):
        strays = [module for module in halves if not any(_is_target(module, name, targets) for name in named)]
        problems += [f"{module} has tensors but is not in target_modules" for module in strays]
        idle = [name for name in named if not any(_is_target(module, name, targets) for module in halves)]
        problems += [f"target module {name!r} has no tensors" for name in idle]
    return problems[:10]


def _rank(config: Mapping[str, Any], module: str) -> int:
    """`r`, or the entry of `rank_pattern` that PEFT would take for this module."""
    for pattern, rank in (config.get("rank_pattern") or {}).items():
        if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module):
            return int(rank)
    return int(config.get("r") or 0) or 1


def _is_target(module: str, name: str, targets: Any) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(name, module) is not None
    return module == name or module.endswith(f".{name}")
