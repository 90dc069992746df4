"""A small random Llama on disk with a tokenizer and a chat template; nothing from the network."""

import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_MODULES_CACHE", tempfile.mkdtemp(prefix="ftray-modules-"))

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ftray.config.schema import Model

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"


def write_base(folder, *, tied=True, dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    vocabulary = {token: i for i, token in enumerate(["<bos>", "<end>", "<pad>", "<unk>", *map(chr, range(33, 125))])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<bos>", eos_token="<end>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return Model(base=str(folder))


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def untied_bf16_base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("bf16"), tied=False, dtype=torch.bfloat16)


@pytest.fixture(scope="session")
def ids():
    return torch.randint(3, 96, (2, 11), generator=torch.Generator().manual_seed(1))
