"""What may become a version."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from store_drills import save_adapter

from ftray.errors import RegistryError
from ftray.store.admission import admit, digest

MODULE = "base_model.model.layers.0.q_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_adapter(tmp_path / "out")


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def retensor(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors: dict[str, Any] = load_file(folder / "adapter_model.safetensors") | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "adapter_model.safetensors")


def test_a_plain_adapter_is_admitted(folder: Path):
    (folder / "card.json").write_text("{}")
    (folder / ".gitattributes").write_text("")
    content = admit(folder, {})
    assert sorted(content.files) == ["adapter_config.json", "adapter_model.safetensors"]
    assert content.digest == digest(content.files)


def test_a_plain_model_is_admitted_when_its_card_names_the_base(tmp_path: Path):
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert admit(tmp_path, {"base": "builtin:tiny"})
    with pytest.raises(RegistryError, match="no base is named"):
        admit(tmp_path, {})
    index = {"weight_map": {"w": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(RegistryError, match=r"names model-00001-of-00002\.safetensors, which is not there"):
        admit(tmp_path, {"base": "builtin:tiny"})


@pytest.mark.parametrize("name", ["training_args.bin", "model.pt", "optimizer.pth", "state.pkl", "deep/x.ckpt"])
def test_pickles_are_refused_by_name(folder: Path, name: str):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"text")
    with pytest.raises(RegistryError, match=f"{Path(name).name} is not safetensors and may hold a pickle"):
        admit(folder, {})


def test_pickles_are_refused_by_content(folder: Path):
    (folder / "notes.txt").write_bytes(pickle.dumps({"a": 1}))
    torch.save({"w": torch.ones(1)}, folder / "README.md")
    with pytest.raises(RegistryError) as refused:
        admit(folder, {})
    assert "notes.txt" in str(refused.value)
    assert "README.md" in str(refused.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_that_are_not_finite_are_refused(folder: Path, value: float, dtype: torch.dtype):
    tensor = torch.ones(2, 8, dtype=dtype)
    tensor[1, 3] = value
    retensor(folder, **{f"{MODULE}.lora_A.weight": tensor})
    with pytest.raises(RegistryError, match="holds NaN or infinite numbers"):
        admit(folder, {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 4}, "has rank 2, but adapter_config.json says 4"),
        ({"rank_pattern": {"q_proj": 8}}, "has rank 2, but adapter_config.json says 8"),
        ({"target_modules": ["q_proj", "v_proj"]}, "target module 'v_proj' has no tensors"),
        ({"target_modules": ["v_proj"]}, "q_proj has tensors but is not in target_modules"),
        ({"target_modules": r".*\.v_proj"}, "q_proj has tensors but is not in target_modules"),
        ({"base_model_name_or_path": None}, "no base is named"),
        ({"peft_type": None}, "has no peft_type"),
    ],
)
def test_a_config_that_does_not_fit_the_tensors_is_refused(folder: Path, changes: dict[str, Any], message: str):
    configure(folder, **changes)
    with pytest.raises(RegistryError, match=message):
        admit(folder, {})


@pytest.mark.parametrize(
    "changes", [{"rank_pattern": {"q_proj": 2}, "r": 8}, {"target_modules": r".*\.q_proj"}, {"target_modules": None}]
)
def test_patterns_are_read_as_peft_reads_them(folder: Path, changes: dict[str, Any]):
    configure(folder, **changes)
    assert admit(folder, {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{MODULE}.lora_B.weight": None}, "has only lora_A"),
        ({f"{MODULE}.lora_B.weight": torch.zeros(0)}, "is empty; under ZeRO-3"),
        (
            {f"{MODULE}.lora_A.weight": None, f"{MODULE}.lora_B.weight": None, "x": torch.ones(1)},
            "no tensor is a lora_A",
        ),
    ],
)
def test_tensors_that_are_no_adapter_are_refused(folder: Path, changes: dict[str, Any], message: str):
    retensor(folder, **changes)
    with pytest.raises(RegistryError, match=message):
        admit(folder, {})


def test_files_that_cannot_be_read_are_refused(folder: Path, tmp_path: Path):
    (folder / "adapter_model.safetensors").write_bytes(b"abc")
    with pytest.raises(RegistryError, match="cannot be read"):
        admit(folder, {})
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(RegistryError, match="is not JSON"):
        admit(folder, {})
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(RegistryError, match=r"no \*.safetensors(.|\n)*no adapter_config.json, config.json or head"):
        admit(folder, {})
    with pytest.raises(RegistryError, match="is not a folder"):
        admit(tmp_path / "none", {})


@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}, {"modules_to_save": ["head"]}]
)
def test_what_peft_saves_is_admitted(tmp_path: Path, options: dict[str, Any]):
    from peft import LoraConfig, get_peft_model

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.proj, self.conv = (
                torch.nn.Embedding(10, 8),
                torch.nn.Linear(8, 6),
                torch.nn.Conv1d(6, 4, 3),
            )
            self.head = torch.nn.Linear(4, 2)

    config = LoraConfig(r=2, target_modules=["embed", "proj", "conv"], rank_pattern={"proj": 4}, **options)
    if options:
        config.target_modules = {"proj"}
    get_peft_model(Net(), config).save_pretrained(tmp_path)
    (tmp_path / "README.md").unlink(missing_ok=True)
    assert admit(tmp_path, {"base": "a net"})
