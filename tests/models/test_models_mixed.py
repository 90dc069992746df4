"""A layer that many adapters read gives each adapter's tokens PEFT's own outputs and gradients."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from ftray.errors import ModelError
from ftray.models.mixed import Adapter, Mix, Mixed, Rows

TARGETS = {0: ["v_proj", "down_proj"], 1: ["down_proj"], 2: ["q_proj", "up_proj"]}


@pytest.fixture
def base():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).requires_grad_(False)


@pytest.fixture
def adapted(base):
    """PEFT models over the same weights, with B that is no longer zero; a trial's targets are in the last block."""

    def make(number, **keys):
        torch.manual_seed(number)
        names = [f"layers.2.{'self_attn' if name[0] in 'qv' else 'mlp'}.{name}" for name in TARGETS[number]]
        config = LoraConfig(r=2 + number, lora_alpha=3, target_modules=names, init_lora_weights=False, **keys)
        return get_peft_model(copy.deepcopy(base), config)

    return make


def losses(logits):
    return (logits.float() ** 2).mean()


def test_rows_of_three_adapters_in_one_pass_are_as_in_three(base, adapted):
    models = [adapted(number) for number in TARGETS]
    ids = torch.randint(0, 31, (2, 7))
    alone = [model(ids).logits for model in models]
    for logits in alone:
        losses(logits).backward()
    wanted = [{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None} for model in models]
    for model in models:
        model.zero_grad()

    calls = []
    mixed = Mixed(copy.deepcopy(base))
    base_of = mixed.model.model.layers[0].mlp.up_proj
    base_of.register_forward_hook(lambda module, given, out: calls.append(given[0].shape))
    adapters = [Adapter.of(model, draws=torch.Generator()) for model in models]
    for adapter in adapters:
        mixed.admit(adapter)
    mix = Mix([Rows(adapter, 2, 7, 7, 2, same="these") for adapter in adapters], packed=False)
    with mixed.reading(mix) as model:
        together = model(ids.repeat(3, 1)).logits
        sum(losses(logits) for logits in together.split(2)).backward()
    assert calls == [(2, 7, 16)], "a block below all adapters reads rows that repeat once"
    torch.testing.assert_close(together, torch.cat(alone))
    for model, gradients in zip(models, wanted, strict=True):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(parameter.grad, gradients[name])
    torch.testing.assert_close(mixed.model(ids).logits, base(ids).logits)


def test_a_second_pass_over_the_same_rows_reads_on_where_the_first_began_to_learn(base, adapted):
    models = [adapted(number) for number in TARGETS]
    ids = torch.randint(0, 31, (2, 7))
    calls = []
    mixed = Mixed(copy.deepcopy(base))
    mixed.model.model.layers[1].mlp.up_proj.register_forward_hook(lambda module, given, out: calls.append(len(out)))
    adapters = [Adapter.of(model, draws=torch.Generator()) for model in models]
    for adapter in adapters:
        mixed.admit(adapter)

    def passed(readers, rows, same):
        mix = Mix([Rows(adapter, len(rows), 7, 7, len(rows), same) for adapter in readers], packed=False)
        with mixed.reading(mix) as model:
            return model(rows.repeat(len(readers), 1)).logits

    first = passed(adapters[:2], ids, "these")
    second = passed(adapters[2:], ids, "these")
    assert calls == [2]
    torch.testing.assert_close(torch.cat([first, second]), torch.cat([model(ids).logits for model in models]))
    others = torch.randint(0, 31, (3, 7))
    torch.testing.assert_close(passed(adapters[:1], others, "others"), models[0](others).logits)
    mixed.forget()
    passed(adapters[:1], others, "others")
    assert calls == [2, 3, 3], "other rows are read, and all are once they are forgotten"


def test_a_layer_that_sees_some_of_the_tokens_is_refused(base, adapted):
    mixed = Mixed(copy.deepcopy(base))
    adapter = Adapter.of(adapted(0), draws=torch.Generator())
    mixed.admit(adapter)
    mix = Mix([Rows(adapter, 3, 7, 7, 3, same=1)], packed=False)
    with pytest.raises(ModelError, match=r"sees 14 of 21 tokens, as an expert does.*fuse: off"), mixed.reading(mix):
        mixed.model(torch.zeros(2, 7, dtype=torch.long))


def test_an_adapter_that_is_more_than_lora_is_refused(adapted):
    with pytest.raises(ModelError, match=r"kind of LoRA that cannot share a pass; set fuse: off"):
        Adapter.of(adapted(0, use_dora=True), draws=torch.Generator())
