"""Packed rows: every example computes what it computes alone, forwards and backwards."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen3Config,
    Qwen3NextConfig,
)

from ftray.config.schema import Lora
from ftray.models.adapt import adapt, trainable
from ftray.models.attention import NAME, register, supports_packing

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
PACKABLE = {
    "llama": LlamaConfig(**SMALL),
    "qwen3": Qwen3Config(**SMALL),
    "mistral with a window of 5": MistralConfig(**SMALL, sliding_window=5),
    "gemma3 with a window of 4 in one layer": Gemma3TextConfig(
        **SMALL, sliding_window=4, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8
    ),
    "gpt2": GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0
    ),
}
LENGTHS = [3, 9, 1, 7]


def build(config, attention):
    register()
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def examples():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 64, (length,), generator=generator) for length in LENGTHS]


def packed(rows, *, as_tensor=False):
    lengths = [len(row) for row in rows]
    borders = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32) if as_tensor else lengths
    return {
        "input_ids": torch.cat(rows)[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "attention_mask": None,
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "use_cache": False,
    }


def logits_and_gradients(model, calls):
    model.zero_grad()
    logits = torch.cat([model(**call).logits.flatten(0, 1) for call in calls])
    (logits.float().log_softmax(-1) ** 2).mean().backward()
    return logits.detach(), {name: parameter.grad.clone() for name, parameter in trainable(model).items()}


def assert_packed_is_alone(model, *, tolerance):
    model.set_attn_implementation("sdpa")
    alone, wanted = logits_and_gradients(model, [{"input_ids": row[None], "use_cache": False} for row in examples()])
    model.set_attn_implementation(NAME)
    for as_tensor in (False, True):
        together, found = logits_and_gradients(model, [packed(examples(), as_tensor=as_tensor)])
        torch.testing.assert_close(together, alone, atol=tolerance, rtol=tolerance)
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], atol=tolerance, rtol=tolerance, msg=name)


@pytest.mark.parametrize("name", PACKABLE)
def test_a_packed_row_gives_the_logits_and_gradients_of_each_example_alone(name):
    model = build(PACKABLE[name], NAME)
    assert supports_packing(model)
    assert_packed_is_alone(model, tolerance=2e-5)


def test_packing_is_exact_under_lora_and_gradient_checkpointing():
    model = adapt(build(PACKABLE["llama"], NAME), Lora(rank=4), seed=1)
    for name, parameter in trainable(model).items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    assert supports_packing(model)
    assert_packed_is_alone(model, tolerance=2e-5)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_packing_in_bf16_is_as_near_to_fp32_as_each_example_alone_is(name, autocast):
    model = build(PACKABLE[name], NAME)
    exact, _ = logits_and_gradients(model, [packed(examples())])
    if not autocast:
        model.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        together, _ = logits_and_gradients(model, [packed(examples())])
        model.set_attn_implementation("sdpa")
        alone, _ = logits_and_gradients(model, [{"input_ids": row[None]} for row in examples()])
    assert together.dtype == alone.dtype == torch.bfloat16
    assert (together - exact).abs().max() <= 1.5 * (alone - exact).abs().max()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", PACKABLE)
def test_the_ragged_kernel_on_a_gpu_is_as_near_to_fp32_as_each_example_alone_is(name):
    model = build(PACKABLE[name], NAME).cuda()

    def moved(call):
        return {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in call.items()}

    exact, exact_gradients = logits_and_gradients(model, [moved(packed(examples()))])
    model.bfloat16()
    together, gradients = logits_and_gradients(model, [moved(packed(examples(), as_tensor=True))])
    model.set_attn_implementation("sdpa")
    alone, alone_gradients = logits_and_gradients(model, [moved({"input_ids": row[None]}) for row in examples()])
    assert (together - exact).abs().max() <= 2 * (alone - exact).abs().max()
    for key, wanted in exact_gradients.items():
        far = (alone_gradients[key] - wanted).norm()
        assert (gradients[key] - wanted).norm() <= 2 * far + 1e-6


def test_padding_on_the_right_needs_no_mask():
    model = build(PACKABLE["llama"], NAME).eval()
    short, long = examples()[0], examples()[1]
    rows = torch.stack([torch.cat([short, torch.zeros(len(long) - len(short), dtype=torch.long)]), long])
    together = model(input_ids=rows, use_cache=False).logits
    torch.testing.assert_close(together[0, : len(short)], model(input_ids=short[None], use_cache=False).logits[0])


def test_a_mask_is_refused_and_not_ignored():
    model = build(PACKABLE["llama"], NAME)
    with pytest.raises(ValueError, match="neither an attention mask"):
        model(input_ids=torch.ones(1, 4, dtype=torch.long), attention_mask=torch.ones(1, 4), use_cache=False)


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**SMALL),
        GptOssConfig(**SMALL, num_local_experts=2),
        MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4),
        Qwen3NextConfig(**SMALL, num_experts=0, linear_num_value_heads=2, linear_num_key_heads=2),
        FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True),
    ],
    ids=lambda config: config.model_type,
)
def test_models_that_mix_tokens_otherwise_are_trained_padded(config):
    with torch.device("meta"):
        assert not supports_packing(AutoModelForCausalLM.from_config(config))
