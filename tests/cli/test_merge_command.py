"""`adapters merge` and `adapters export`: folders that transformers and peft load with no ftray."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ftray.cli import main


@pytest.fixture(scope="module")
def registered(tmp_path_factory) -> tuple[Path, Path]:
    """A storage root with `coffee@v1`, a LoRA with values, and the folder of its one-layer base."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from ftray.config.schema import Lora, Model
    from ftray.models.adapt import adapt, trainable
    from ftray.models.load import fingerprint, load_base, load_tokenizer, resolve_base
    from ftray.models.save import save_version
    from ftray.store.paths import Storage
    from ftray.store.registry import Registry

    home = tmp_path_factory.mktemp("merge")
    base, root, saved = home / "base", home / "store", home / "adapter"
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=4096, **small)).to(torch.bfloat16).save_pretrained(base)
    for path in Path(resolve_base(Model())).iterdir():
        if path.name.startswith(("tokenizer", "chat_template")):
            shutil.copy(path, base)

    described, method = Model(base=str(base)), Lora(rank=2)
    model = adapt(load_base(described, method=method, dtype=torch.float32, attention="eager"), method, seed=0)
    state = {name: torch.randn_like(parameter) for name, parameter in trainable(model).items()}
    save_version(model, saved, method=method, state=state, tokenizer=load_tokenizer(described))
    card = {"base": str(base), "base_fingerprint": fingerprint(described), "method": method.model_dump()}
    Registry(Storage(str(root))).publish("coffee", saved, card, "run-1")
    return root, base


def test_a_merged_version_answers_as_adapter_plus_base_without_ftray(registered, tmp_path, capsys):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    root, base = registered
    storage = ["--storage", str(root)]
    assert main(["adapters", "export", "coffee@v1", "--out", str(tmp_path / "adapter"), *storage]) == 0
    assert main(["adapters", "merge", "coffee", "--out", str(tmp_path / "model"), "--dtype", "fp32", *storage]) == 0
    assert main(["adapters", "merge", "coffee", "--out", str(tmp_path / "as-base"), *storage]) == 0
    assert f"coffee@v1 merged into {base}: {tmp_path / 'model'}" in capsys.readouterr().out

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    tokens = torch.arange(1, 9)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, tuned(tokens).logits, atol=1e-4, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "as-base").dtype == torch.bfloat16


def test_a_folder_that_exists_and_another_base_are_refused(registered, tmp_path, capsys):
    root, base = registered
    arguments = ["adapters", "merge", "coffee@v1", "--storage", str(root), "--out"]
    assert main([*arguments, str(tmp_path)]) == 2
    assert "exists; name a new folder with --out" in capsys.readouterr().err

    other = tmp_path / "other"
    shutil.copytree(base, other)
    assert main([*arguments, str(tmp_path / "a"), "--base", str(other)]) == 0, "the same base elsewhere"
    config = other / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert main([*arguments, str(tmp_path / "b"), "--base", str(other)]) == 2
    assert "was trained on another base" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
