"""Trained parameters of every method: the plan's count is the model's."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from ftray.config.methods import (
    AdaLora,
    Bottleneck,
    Ia3,
    LoHa,
    LoKr,
    Norms,
    Oft,
    Prefix,
    Prompt,
    PTuning,
    Tokens,
    Vera,
)
from ftray.models.adapt import adapt, trainable
from ftray.models.load import Shape
from ftray.train.memory import learning

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=20,
    tie_word_embeddings=True,
)


@pytest.mark.parametrize(
    "method",
    [
        AdaLora(rank=2),
        LoHa(rank=3, targets=["q_proj", "down_proj"]),
        LoKr(rank=2),
        LoKr(rank=3, factor=4),
        LoKr(rank=64),
        Ia3(),
        Ia3(targets=["q_proj", "down_proj"]),
        Oft(block=16),
        Vera(rank=8),
        Norms(),
        Tokens(tokens=[3, 5]),
        Bottleneck(size=8),
        Bottleneck(size=8, placement="pfeiffer"),
        Bottleneck(size=8, placement="parallel"),
        Prefix(tokens=5),
        Prefix(tokens=5, projection=12),
        Prompt(tokens=5),
        PTuning(tokens=5, width=12),
    ],
    ids=str,
)
def test_the_plan_counts_what_is_trained(method, monkeypatch):
    from ftray.models import adapt as adapt_module

    class Words:
        def get_vocab(self):
            return {}

        def __len__(self):
            return 64

    monkeypatch.setattr(adapt_module, "load_tokenizer", lambda model: Words())  # a configuration has none
    model = adapt(AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32), method, seed=0)
    counted = sum(parameter.numel() for parameter in trainable(model).values())
    assert learning(Shape.from_config(CONFIG), method).params == counted
