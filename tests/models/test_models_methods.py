"""Every method beside LoRA: begins as it should, and computes the same live, in plain PEFT, read back and merged."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

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
from ftray.errors import ModelError
from ftray.models import virtual
from ftray.models.adapt import adapt, check_method, default_lr, servability, trainable
from ftray.models.load import load_base, load_config, load_tokenizer
from ftray.models.merge import load_version, merge
from ftray.models.save import load_state_into, save_version
from ftray.objectives.language import loss_sum, pad
from ftray.store.admission import admit
from tests.models.asking import answer_questions

MERGED = [
    AdaLora(rank=2),
    AdaLora(rank=3, start_rank=6, targets=["q_proj", "down_proj"], alpha=5),
    LoHa(rank=4),
    LoKr(rank=4),
    LoKr(rank=2, factor=8, targets=["v_proj"]),
    Ia3(),
    Ia3(targets=["q_proj", "down_proj"]),
    Oft(block=16),
    Vera(rank=16),
    Norms(),
    Tokens(tokens=["G", "b", 7]),
]
APART = [
    Bottleneck(size=8),
    Bottleneck(size=8, placement="pfeiffer", activation="gelu"),
    Bottleneck(size=8, placement="parallel", scale=4.0, activation="silu"),
    Prefix(tokens=5),
    Prefix(tokens=5, projection=16),
    Prompt(tokens=5),
    Prompt(tokens=5, text="Say it."),
    PTuning(tokens=5, width=24),
]
EVERY = [*MERGED, *APART]


def adapted(section, method, **options):
    return adapt(load_base(section, method=method, dtype=torch.float32), method, seed=3, steps=20, **options)


def trained(section, method):
    """Adapted, and moved away from where it began; of AdaLoRA some directions lose their rank, and one layer all."""
    model = adapted(section, method)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(trainable(model).items()):
            size = {"adalora": 0.2, "vera": 0.5}.get(method.kind, 0.05)
            parameter += size * torch.randn(parameter.shape, generator=generator)
            if "lora_E" in name:
                parameter[: number // 3 % 3] = 0
                if "layers.1.self_attn.q_proj" in name:
                    parameter.zero_()
    return model.eval()


def saved(model, section, method, folder):
    state = {name: parameter.detach().float() for name, parameter in trainable(model).items()}
    save_version(model, folder, method=method, state=state, tokenizer=load_tokenizer(section))
    return folder


def logits(model, ids):
    with torch.no_grad():
        found = model.eval()(input_ids=ids).logits.float()
    return found[:, found.shape[1] - ids.shape[1] :]


def apart(one, other):
    return (one - other).abs().max().item()


@pytest.mark.parametrize("method", EVERY, ids=str)
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_a_version_computes_the_same_live_in_plain_peft_read_back_and_merged(
    base, untied_bf16_base, ids, tmp_path, method, kind
):
    section = base if kind == "tied" else untied_bf16_base
    model = trained(section, method)
    wanted = logits(model, ids)
    plain = AutoModelForCausalLM.from_pretrained(section.base, dtype=torch.float32)
    assert apart(wanted, logits(plain, ids)) > 1e-3, "the adapter changes nothing"
    folder = saved(model, section, method, tmp_path / "v1")
    admit(folder, {})

    assert apart(logits(PeftModel.from_pretrained(plain, folder), ids), wanted) < 1e-5
    reloaded, _ = load_version(section, folder, {"method": method.model_dump()}, torch.float32)
    assert apart(logits(reloaded, ids), wanted) < 1e-5

    fresh = adapted(section, method)
    load_state_into(fresh, folder, method)
    assert apart(logits(fresh, ids), wanted) < 1e-5

    if method in MERGED:
        merged = merge(section, folder, tmp_path / "merged", torch.float32)
        assert apart(logits(AutoModelForCausalLM.from_pretrained(merged), ids), wanted) < 2e-5
    else:
        with pytest.raises(ModelError, match="cannot be merged"):
            merge(section, folder, tmp_path / "merged", torch.float32)


@pytest.mark.parametrize("method", EVERY, ids=str)
def test_an_adapter_begins_as_the_base_or_can_be_left_away(base, ids, method):
    model = adapted(base, method)
    with virtual.left_away(model):
        found = logits(model, ids)
    before = logits(load_base(base, method=method, dtype=torch.float32), ids)
    torch.testing.assert_close(found, before, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("method", EVERY, ids=str)
def test_a_few_steps_at_its_own_rate_lower_the_loss(base, method):
    model = adapted(base, method).train()
    rows = torch.randint(3, 96, (4, 12), generator=torch.Generator().manual_seed(2)).numpy()
    batch = pad(list(rows), [np.ones(12, bool)] * 4, range(4), pad_id=0)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=default_lr(method, 100_000))
    losses = []
    for _ in range(8):
        loss = loss_sum(model, batch) / 44
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(parameter.grad is not None for parameter in trainable(model).values())


@pytest.mark.parametrize("method", [Prefix(tokens=4, projection=8), Prompt(tokens=4), PTuning(tokens=4)], ids=str)
def test_a_batch_with_virtual_tokens_costs_what_its_examples_cost_alone(base, method):
    model = adapted(base, method).train()
    ids = [np.arange(3, 3 + n) for n in (4, 9, 6)]
    trained_ones = [np.arange(len(row)) > 1 for row in ids]
    together = loss_sum(model, pad(ids, trained_ones, range(3), pad_id=0))
    alone = [loss_sum(model, pad([row], [t], [0], pad_id=0)) for row, t in zip(ids, trained_ones, strict=True)]
    assert together.item() == pytest.approx(sum(one.item() for one in alone), rel=1e-6)


@pytest.mark.parametrize("method", [Prefix(tokens=4), Prompt(tokens=4), Bottleneck(size=4)], ids=str)
def test_answers_in_a_batch_are_what_peft_generates_for_each_alone(base, method):
    model = trained(base, method)
    tokenizer = load_tokenizer(base)
    prompts = [list(range(5, 5 + n)) for n in (3, 8, 5)]
    texts = answer_questions(model, tokenizer, [SimpleNamespace(prompt_ids=p) for p in prompts], max_new_tokens=6)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = list(prompt)
        for _ in range(6):
            mask = torch.ones(1, len(ids), dtype=torch.long)
            with torch.no_grad():
                found = int(model(input_ids=torch.tensor([ids]), attention_mask=mask).logits[0, -1].argmax())
            if found == tokenizer.eos_token_id:
                break
            ids.append(found)
        assert text == tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()


def test_the_base_is_scored_without_virtual_tokens(base, ids):
    model = adapted(base, Prompt(tokens=4))
    assert virtual.count(model) == virtual.embedded(model) == 4
    with virtual.left_away(model):
        assert virtual.count(model) == virtual.embedded(model) == 0


def test_a_prompt_begins_as_its_text_over_again(base):
    model = adapted(base, Prompt(tokens=5, text="AB"))
    table = model.get_base_model().get_input_embeddings().weight
    a, b = load_tokenizer(base)("AB", add_special_tokens=False)["input_ids"]
    assert torch.equal(model.prompt_encoder["default"].embedding.weight, table[[a, b, a, b, a]])


def test_a_version_of_adalora_is_lora_with_a_rank_for_each_layer(base, tmp_path):
    method = AdaLora(rank=2)
    folder = saved(trained(base, method), base, method, tmp_path / "v1")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert "model.layers.1.self_attn.q_proj" not in config["target_modules"], "it lost all its rank"
    assert config["rank_pattern"] == config["alpha_pattern"] != {}


def test_a_bottleneck_begins_the_same_on_two_workers_and_reaches_what_its_placement_says(base):
    places = {
        "houlsby": {"o_proj", "down_proj"},
        "pfeiffer": {"down_proj"},
        "parallel": {"mlp"},
    }
    for placement, wanted in places.items():
        method = Bottleneck(size=4, placement=placement)
        one, other = trainable(adapted(base, method)), trainable(adapted(base, method))
        assert {name.split(".bottleneck_")[0].rsplit(".", 1)[-1] for name in one} == wanted
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (LoHa(targets=["q_prj"]), r"method\.targets: no layer is called 'q_prj'; did you mean 'q_proj'"),
        (Ia3(targets=["norm"]), r"method\.targets: 'norm' is a LlamaRMSNorm; ia3 adapts linear layers"),
        (Vera(targets=["embed_tokens"]), r"'embed_tokens' is a Embedding; vera adapts linear layers"),
        (Oft(block=24), r"method\.block: 24 does not divide inputs of 64; use 32"),
        (
            AdaLora(rank=40),
            r"method\.start_rank: 60 is larger than the smaller side of .*k_proj \(32\); use at most 32",
        ),
        (Bottleneck(targets=["mpl"]), r"method\.targets: no module is called 'mpl'; did you mean 'mlp'"),
        (Bottleneck(targets=["k_proj"]), r"k_proj gives 32 numbers and not the model's 64"),
        (Tokens(tokens=[96]), r"method\.tokens: there is no token 96; ids are 0 to 95"),
        (Tokens(tokens=["<edn>"]), r"method\.tokens: '<edn>' is no token of the base"),
        (Prompt(tokens=100), r"method\.tokens: 100 leave little of the base's 128 positions"),
        (Prompt(text=""), r"method\.text: is empty"),
    ],
    ids=str,
)
def test_a_method_that_does_not_fit_is_refused_by_configuration_alone(base, method, said):
    with pytest.raises(ModelError, match=said):
        check_method(load_config(base), method, load_tokenizer(base))


@pytest.mark.parametrize("method", [LoHa(), LoKr(), Oft(block=8)], ids=str)
def test_layers_that_a_method_cannot_adapt_are_named(method):
    with pytest.raises(ModelError, match=r"method\.kind: .* cannot adapt the Conv1D layers of a GPT2LMHeadModel"):
        check_method(GPT2Config(n_embd=32, n_head=2, n_layer=2), method)


@pytest.mark.parametrize("method", [AdaLora(rank=2), Ia3(), Vera(rank=8), Norms(), Bottleneck(size=4)], ids=str)
def test_gpt_2_has_places_for_a_method_too(method):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_head=2, n_layer=2, vocab_size=40, n_positions=32)).eval()
    ids = torch.arange(8)[None]
    before = logits(model, ids)
    torch.testing.assert_close(logits(adapt(model, method, seed=1, steps=10), ids), before, atol=2e-6, rtol=1e-5)


def test_methods_are_served_as_their_kind_allows():
    assert servability(AdaLora()) == "adapter"
    assert {servability(method) for method in MERGED[2:]} == {"merge"}
    assert {servability(method) for method in APART} == {"beside"}
