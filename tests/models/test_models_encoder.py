"""Encoder bases: told from those that write, complete, never from pickles."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, BertConfig, BertForMaskedLM, BertModel, RobertaConfig, RobertaModel

from ftray.config.schema import Model
from ftray.errors import ModelError
from ftray.models.encoder import is_encoder, load_encoder, pooling_of

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.fixture
def bert(tmp_path):
    BertModel(BertConfig(**SMALL, max_position_embeddings=40)).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def load(folder, **options):
    return load_encoder(Model(base=str(folder)), **{"dtype": torch.float32, **options})


@pytest.mark.parametrize(
    ("config", "reads"),
    [
        (AutoConfig.for_model("bert"), True),
        (AutoConfig.for_model("modernbert", architectures=["ModernBertModel"]), True),
        (AutoConfig.for_model("bert", architectures=["BertForMaskedLM"]), True),
        (AutoConfig.for_model("bert", architectures=["BertLMHeadModel"]), False),
        (AutoConfig.for_model("bert", is_decoder=True), False),
        (AutoConfig.for_model("llama"), False),
        (AutoConfig.for_model("bart"), False),
        (AutoConfig.for_model("t5"), False),
        (AutoConfig.for_model("bert", auto_map={"AutoModel": "mine.M"}), True),
        (AutoConfig.for_model("bert", auto_map={"AutoModel": "mine.M", "AutoModelForCausalLM": "mine.L"}), False),
    ],
)
def test_a_base_that_reads_is_told_from_one_that_writes(config, reads):
    assert is_encoder(config) is reads


def test_a_base_that_writes_is_refused_with_the_way_out(base):
    for model in (base, Model(base="builtin:tiny")):
        with pytest.raises(ModelError, match=r"is a 'llama' model, no encoder; take a BERT-like base"):
            load_encoder(model, dtype=torch.float32)


def test_an_encoder_says_how_long_a_text_may_be(bert, tmp_path):
    encoder = load(bert)
    assert (encoder.pooling, encoder.positions, encoder.max_length, encoder.lacking) == ("mean", 40, 40, frozenset())
    # RoBERTa's positions begin behind the padding token's id, 1: two of its 40 are never used
    RobertaModel(RobertaConfig(**SMALL, max_position_embeddings=40)).save_pretrained(tmp_path / "roberta")
    assert load(tmp_path / "roberta").positions == 38
    (bert / "sentence_bert_config.json").write_text('{"max_seq_length": 20}')
    assert (load(bert).positions, load(bert).max_length) == (40, 20)


def test_weights_come_in_the_precision_asked_for_and_learn_nothing(bert):
    module = load(bert, dtype=torch.bfloat16).module
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert not module.training


def test_a_base_without_a_pooler_is_complete_and_one_without_a_layer_is_not(bert, tmp_path):
    BertForMaskedLM(BertConfig(**SMALL, max_position_embeddings=40)).save_pretrained(tmp_path / "masked")
    assert load(tmp_path / "masked").lacking == {"pooler.dense.weight", "pooler.dense.bias"}
    weights = load_file(bert / "model.safetensors")
    del weights["encoder.layer.0.output.dense.weight"]
    save_file(weights, bert / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights of a BertModel, e\.g\. encoder\.layer\.0\.output\.dense"):
        load(bert)


def test_pickled_weights_are_never_read(bert):
    torch.save(load_file(bert / "model.safetensors"), bert / "pytorch_model.bin")
    (bert / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="pickled ones are never read"):
        load(bert)


@pytest.mark.parametrize(
    ("document", "pooling"),
    [
        ({}, None),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_cls_token": True, "include_prompt": True}, "cls"),
        ({"pooling_mode": "mean"}, "mean"),
    ],
)
def test_pooling_is_as_sentence_transformers_wrote_it(document, pooling):
    assert pooling_of(document, []) == pooling


@pytest.mark.parametrize("said", [{"pooling_mode": "lasttoken"}, {"pooling_mode_max_tokens": True},
                                  {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}])  # fmt: skip
def test_other_pooling_is_refused(said):
    with pytest.raises(ModelError, match="is not supported; mean or cls is"):
        pooling_of(said, [])


def test_a_file_that_is_no_json_is_named(bert):
    (bert / "modules.json").write_text("[")
    with pytest.raises(ModelError, match=r"modules\.json of .* is not JSON"):
        load(bert)
