"""Bases: found, refused with the way out, measured without weights, told apart."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, GPT2Config

from ftray.config.schema import Full, Lora, Model
from ftray.errors import ModelError
from ftray.models.load import Shape, fingerprint, load_base, load_config, load_tokenizer, resolve_base


def copy_of(base, folder):
    shutil.copytree(base.base, folder)
    return Model(base=str(folder))


def load(model, **options):
    return load_base(model, **{"method": Full(), "dtype": torch.float32, **options})


def test_the_built_in_model_is_a_folder_of_the_package():
    folder = resolve_base(Model(base="builtin:tiny"))
    assert AutoConfig.from_pretrained(folder).model_type == "llama"
    assert load_tokenizer(Model(base="builtin:tiny")).chat_template


def test_an_unknown_built_in_model_names_those_there_are():
    with pytest.raises(ModelError, match="builtin:tiny"):
        resolve_base(Model(base="builtin:tny"))


@pytest.mark.parametrize("base", ["./nowhere", "/nowhere/at/all", "a/b/c", "~/nowhere-at-all", "two words"])
def test_a_path_that_is_no_folder_is_said_to_be_none(base):
    with pytest.raises(ModelError, match="no folder"):
        load_config(Model(base=base))


def test_a_hub_id_without_a_network_gets_the_way_out():
    with pytest.raises(ModelError, match=r"Hub cannot be reached; name a folder, or builtin:tiny"):
        load_config(Model(base="nobody/nothing-here"))


def test_a_folder_without_config_is_no_model(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        load(Model(base=str(tmp_path)))


def test_pickled_weights_are_never_read(base, tmp_path):
    model = copy_of(base, tmp_path / "pickled")
    weights = load_file(tmp_path / "pickled/model.safetensors")
    (tmp_path / "pickled/model.safetensors").unlink()
    torch.save(weights, tmp_path / "pickled/pytorch_model.bin")
    with pytest.raises(ModelError, match="no safetensors weights, and pickled ones are never read"):
        load(model)


def test_a_cut_off_weight_file_is_named(base, tmp_path):
    model = copy_of(base, tmp_path / "cut")
    path = tmp_path / "cut/model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ModelError, match="cut' cannot be loaded"):
        load(model)


def test_missing_weights_are_an_error_and_not_random_numbers(base, tmp_path):
    model = copy_of(base, tmp_path / "holes")
    path = tmp_path / "holes/model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights .* model\.layers\.1\.mlp\.up_proj\.weight"):
        load(model)


def test_weights_of_another_size_than_the_configuration_are_an_error(base, tmp_path):
    model = copy_of(base, tmp_path / "sizes")
    config = json.loads((tmp_path / "sizes/config.json").read_text())
    (tmp_path / "sizes/config.json").write_text(json.dumps(config | {"intermediate_size": 80}))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(model)


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class MyConfig(LlamaConfig):
    model_type = "mine"
class MyModel(LlamaForCausalLM):
    config_class = MyConfig
"""


def test_code_that_comes_with_a_model_runs_only_when_the_run_says_so(base, tmp_path):
    model = copy_of(base, tmp_path / "code")
    config = json.loads((tmp_path / "code/config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"},
    }
    (tmp_path / "code/config.json").write_text(json.dumps(config))
    (tmp_path / "code/mine.py").write_text(OWN_CODE + f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    for read in (load_config, load):
        with pytest.raises(ModelError, match="trust_remote_code: true"):
            read(model)
    assert not (tmp_path / "ran").exists()
    trusted = model.model_copy(update={"trust_remote_code": True})
    assert Shape.from_config(load_config(trusted)).layers == 3
    assert type(load(trusted)).__name__ == "MyModel"


def test_a_model_that_does_not_write_text_is_refused():
    with pytest.raises(ModelError, match="does not write text"):
        Shape.from_config(AutoConfig.for_model("vit"))


@pytest.mark.parametrize("tied", [True, False])
def test_the_shape_counts_what_the_model_holds(tied):
    config = AutoConfig.for_model(
        "qwen3", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=tied,
    )  # fmt: skip
    shape = Shape.from_config(config)
    model = AutoModelForCausalLM.from_config(config)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    # by hand: q and o 32x32, k and v 32x16, three 32x48, in two layers
    assert shape.linear_params == 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    assert (shape.tied, shape.layers, shape.heads, shape.kv_heads, shape.head_dim) == (tied, 2, 4, 2, 8)
    assert shape.linears["model.layers.1.mlp.down_proj"] == (48, 32)


@pytest.mark.parametrize("config", [GPT2Config(n_layer=2, n_embd=32, n_head=2), BertConfig(num_hidden_layers=1)])
def test_other_architectures_have_a_shape(config):
    assert Shape.from_config(config).linear_params > 0


def test_a_fingerprint_changes_with_weights_configuration_and_tokenizer_only(base, tmp_path):
    prints = {fingerprint(base)}
    assert fingerprint(copy_of(base, tmp_path / "same")) in prints
    (tmp_path / "same/README.md").write_text("a note")
    assert fingerprint(Model(base=str(tmp_path / "same"))) in prints
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        folder = tmp_path / name.replace(".", "-")
        copy_of(base, folder)
        content = bytearray((folder / name).read_bytes())
        content[-3] ^= 1
        (folder / name).write_bytes(content)
        prints.add(fingerprint(Model(base=str(folder))))
    assert len(prints) == 4


def test_a_quantised_base_keeps_its_logits_in_training_and_evaluation(base, ids):
    model = load(base, method=Lora(bits=4))
    config = model.config.quantization_config
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("nf4", True)
    trained = model.train()(ids).logits
    evaluated = model.eval()(ids).logits
    torch.testing.assert_close(trained, evaluated, atol=0, rtol=0)
    torch.testing.assert_close(load(base, method=Lora(bits=4))(ids).logits, evaluated, atol=0, rtol=0)


def test_a_quantised_base_is_refused_under_zero_3(base):
    with pytest.raises(ModelError, match="use zero: 2"):
        load(base, method=Lora(bits=4), zero3=True)
