"""Versions on disk: plain peft and transformers folders that compute what the trained model computed."""

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from ftray.config.schema import Freeze, Full, Lora, Model
from ftray.errors import ModelError
from ftray.models.adapt import adapt, trainable
from ftray.models.load import fingerprint, load_base, load_tokenizer
from ftray.models.merge import export, load_version, merge
from ftray.models.save import load_state_into, save_version

ADAPTERS = [
    Lora(rank=4),
    Lora(rank=4, rslora=True, targets=["q_proj", "down_proj"]),
    Lora(rank=4, dora=True),
    Lora(rank=4, init="orthogonal", alpha=3.5),
    Lora(rank=4, init="pissa"),
    Lora(rank=4, init="pissa", rslora=True, dora=True),
    Lora(rank=4, modules_to_save=["lm_head"]),
    Lora(rank=4, modules_to_save=["embed_tokens", "norm"]),
    Lora(rank=4, targets=["q_proj", "embed_tokens"]),
    Lora(rank=4, targets=["lm_head"]),
]


def trained(base, method, *, dtype=torch.float32):
    """Adapted, and moved away from where it began, as training would."""
    model = adapt(load_base(base, method=method, dtype=dtype), method, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def saved(model, base, method, folder):
    state = {name: parameter.detach().float() for name, parameter in trainable(model).items()}
    save_version(model, folder, method=method, state=state, tokenizer=load_tokenizer(base))
    return folder


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits.float()


@pytest.mark.parametrize("method", ADAPTERS, ids=str)
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_an_adapter_computes_the_same_live_in_plain_peft_and_merged(
    base, untied_bf16_base, ids, tmp_path, method, kind
):
    model_section = base if kind == "tied" else untied_bf16_base
    model = trained(model_section, method)
    wanted = logits(model, ids)
    folder = saved(model, model_section, method, tmp_path / "v1")

    plain = AutoModelForCausalLM.from_pretrained(model_section.base, dtype=torch.float32)
    assert (logits(PeftModel.from_pretrained(plain, folder), ids) - wanted).abs().max() < 1e-5

    reloaded, tokenizer = load_version(model_section, folder, {}, torch.float32)
    assert (logits(reloaded, ids) - wanted).abs().max() < 1e-5
    assert tokenizer.chat_template == load_tokenizer(model_section).chat_template

    merged = merge(model_section, folder, tmp_path / "merged", torch.float32)
    assert (logits(AutoModelForCausalLM.from_pretrained(merged), ids) - wanted).abs().max() < 1e-5
    assert AutoTokenizer.from_pretrained(merged).chat_template == tokenizer.chat_template


@pytest.mark.parametrize("method", [*ADAPTERS, Full(), Freeze(last_layers=1, norms=True)], ids=str)
def test_a_saved_version_reads_back_into_the_live_model(base, tmp_path, method):
    model = trained(base, method)
    wanted = {name: parameter.detach().clone() for name, parameter in trainable(model).items()}
    folder = saved(model, base, method, tmp_path / "v1")
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.zero_()
    load_state_into(model, folder, method)
    assert all(torch.equal(parameter, wanted[name]) for name, parameter in trainable(model).items())


def test_an_adapter_names_the_base_as_the_run_does_and_opens_by_that_name(base, ids, tmp_path):
    model = trained(base, Lora(rank=4))
    folder = saved(model, base, Lora(rank=4), tmp_path / "v1")
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == base.base
    opened = AutoPeftModelForCausalLM.from_pretrained(folder)
    assert (logits(opened, ids) - logits(model, ids)).abs().max() < 1e-6


def test_the_adapter_file_does_not_depend_on_the_order_of_a_set(base, tmp_path):
    folder = saved(trained(base, Lora(rank=4)), base, Lora(rank=4), tmp_path / "v1")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert list(config) == sorted(config)
    assert config["target_modules"] == sorted(config["target_modules"])
    assert len(config["target_modules"]) == 7


def test_only_safetensors_and_text_are_written(base, tmp_path):
    for number, method in enumerate((Lora(rank=4), Full())):
        folder = saved(trained(base, method), base, method, tmp_path / str(number))
        assert {path.suffix for path in folder.iterdir()} <= {".safetensors", ".json", ".jinja", ".md"}


@pytest.mark.parametrize("method", [Full(), Freeze(last_layers=1), Freeze(last_layers=0, embeddings=True)], ids=str)
def test_a_whole_model_is_saved_in_the_type_of_its_base(base, untied_bf16_base, ids, tmp_path, method):
    for section, dtype, tolerance in ((base, torch.float32, 1e-6), (untied_bf16_base, torch.bfloat16, 0.02)):
        model = trained(section, method)
        folder = saved(model, section, method, tmp_path / str(dtype))
        assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {dtype}
        opened = AutoModelForCausalLM.from_pretrained(folder)
        assert opened.dtype == dtype
        assert (logits(opened.float(), ids) - logits(model, ids)).abs().max() < tolerance
        reloaded, _ = load_version(section, folder, {}, torch.float32)
        assert torch.equal(logits(reloaded, ids), logits(opened, ids))


def test_a_saved_configuration_is_the_base_s_own_whatever_training_set(base, tmp_path):
    model = adapt(load_base(base, method=Full(), dtype=torch.float32, attention="ftray_varlen"), Full(), seed=1)
    model.config.use_cache = False
    folder = saved(model.bfloat16(), base, Full(), tmp_path / "v1")
    assert json.loads((folder / "config.json").read_text()) == json.loads((Path(base.base) / "config.json").read_text())


def test_a_layout_with_transposed_weights_is_adapted_and_merged(ids, tmp_path):
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64)).save_pretrained(tmp_path)
    section, method = Model(base=str(tmp_path)), Lora(rank=4, init="pissa")
    model = trained(section, method)
    state = {name: parameter.detach() for name, parameter in trainable(model).items()}
    tokenizer = load_tokenizer(Model(base="builtin:tiny"))
    save_version(model, tmp_path / "v1", method=method, state=state, tokenizer=tokenizer)
    merged = merge(section, tmp_path / "v1", tmp_path / "merged", torch.float32)
    opened = AutoModelForCausalLM.from_pretrained(merged)
    assert (logits(opened, ids) - logits(model, ids)).abs().max() < 1e-5


def test_a_tied_model_stays_tied_and_is_stored_once(base, tmp_path):
    folder = saved(trained(base, Full()), base, Full(), tmp_path / "v1")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True


def test_a_tied_head_that_is_trained_whole_survives_the_merge(base, ids, tmp_path):
    method = Lora(rank=4, modules_to_save=["lm_head"])
    model = trained(base, method)
    merged = merge(base, saved(model, base, method, tmp_path / "v1"), tmp_path / "merged", torch.float32)
    opened = AutoModelForCausalLM.from_pretrained(merged)
    head = next(parameter for name, parameter in trainable(model).items() if "modules_to_save" in name)
    assert torch.equal(opened.lm_head.weight, head)
    assert torch.equal(opened.get_input_embeddings().weight, head)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_with_its_adapter_reloads_to_the_same_logits(base, ids, tmp_path, bits):
    method = Lora(rank=4, bits=bits)
    model = adapt(load_base(base, method=method, dtype=torch.float32), method, seed=3)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model.train()(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    wanted = logits(model, ids)
    folder = saved(model, base, method, tmp_path / "v1")
    reloaded, _ = load_version(base, folder, {"method": method.model_dump()}, torch.float32)
    torch.testing.assert_close(logits(reloaded, ids), wanted, atol=0, rtol=0)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.zero_()
    load_state_into(model, folder, method)
    torch.testing.assert_close(logits(model, ids), wanted, atol=0, rtol=0)


def test_a_4_bit_adapter_merges_into_the_16_bit_base(untied_bf16_base, ids, tmp_path):
    method = Lora(rank=4, bits=4)
    folder = saved(trained(untied_bf16_base, method), untied_bf16_base, method, tmp_path / "v1")
    merged = merge(untied_bf16_base, folder, tmp_path / "merged", torch.bfloat16)
    tensors = load_file(merged / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    plain = AutoModelForCausalLM.from_pretrained(untied_bf16_base.base, dtype=torch.float32)
    wanted = logits(PeftModel.from_pretrained(plain, folder), ids)
    assert (logits(AutoModelForCausalLM.from_pretrained(merged).float(), ids) - wanted).abs().max() < 0.02


def test_an_exported_adapter_of_the_built_in_model_opens_without_ftray(ids, tmp_path):
    builtin = Model(base="builtin:tiny")
    model = trained(builtin, Lora(rank=4))
    out = export(builtin, saved(model, builtin, Lora(rank=4), tmp_path / "v1"), tmp_path / "out")
    opened = AutoPeftModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert (logits(opened, ids) - logits(model, ids)).abs().max() < 1e-4


def test_an_export_leaves_what_is_there_alone(base, tmp_path):
    folder = saved(trained(base, Lora(rank=4)), base, Lora(rank=4), tmp_path / "v1")
    (tmp_path / "out").mkdir()
    for write in (lambda: export(base, folder, tmp_path / "out"), lambda: merge(base, folder, tmp_path / "out", None)):
        with pytest.raises(ModelError, match="exists already"):
            write()
    assert list((tmp_path / "out").iterdir()) == []


def test_a_failed_merge_leaves_nothing_behind(base, tmp_path):
    folder = saved(trained(base, Lora(rank=4)), base, Lora(rank=4), tmp_path / "v1")
    with pytest.raises(ModelError):
        merge(Model(base="builtin:tiny"), folder, tmp_path / "out", torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["v1"]


def test_an_adapter_of_another_base_is_refused(base, tmp_path):
    folder = saved(trained(base, Lora(rank=4)), base, Lora(rank=4), tmp_path / "v1")
    with pytest.raises(ModelError, match="does not fit the base 'builtin:tiny'"):
        load_version(Model(base="builtin:tiny"), folder, {}, torch.float32)
    with pytest.raises(ModelError, match="trained on a base with fingerprint"):
        load_version(Model(base="builtin:tiny"), folder, {"base_fingerprint": fingerprint(base)}, torch.float32)


def test_missing_and_foreign_tensors_are_refused_on_reading_back(base, tmp_path):
    model = trained(base, Lora(rank=4))
    path = saved(model, base, Lora(rank=4), tmp_path / "v1") / "adapter_model.safetensors"
    tensors = load_file(path)
    gone = next(iter(tensors))
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, path)
    with pytest.raises(ModelError, match="lacks 1 tensors"):
        load_state_into(model, tmp_path / "v1", Lora(rank=4))
    save_file(tensors | {"stranger": torch.ones(1)}, path)
    with pytest.raises(ModelError, match=r"does not learn, e\.g\. stranger"):
        load_state_into(model, tmp_path / "v1", Lora(rank=4))
    save_file(tensors | {gone: torch.ones(1)}, path)
    with pytest.raises(ModelError, match="in the file and"):
        load_state_into(model, tmp_path / "v1", Lora(rank=4))
