"""Methods: what learns, how it begins, and what is refused before any weight is read."""

from itertools import pairwise

import pytest
import torch

from ftray.config.schema import Freeze, Full, Lora
from ftray.errors import ModelError
from ftray.models.adapt import adapt, check_method, default_lr, matches, servability, trainable
from ftray.models.load import load_base, load_config


def adapted(base, method, *, seed=7, dtype=torch.float32, **options):
    return adapt(load_base(base, method=method, dtype=dtype), method, seed=seed, **options)


def test_full_trains_every_parameter_in_fp32(base):
    model = adapted(base, Full(), dtype=torch.bfloat16)
    assert len(trainable(model)) == len(list(model.parameters()))
    assert {parameter.dtype for parameter in trainable(model).values()} == {torch.float32}


def test_learning_weights_stay_16_bit_where_deepspeed_keeps_the_fp32_copy(base):
    for method in (Full(), Lora(rank=4)):
        model = adapted(base, method, dtype=torch.bfloat16, fp32=False)
        assert {parameter.dtype for parameter in trainable(model).values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("method", "learns", "rests"),
    [
        (Freeze(last_layers=1), "model.layers.2.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"),
        (Freeze(last_layers=0, train=["layers.1"]), "model.layers.1.mlp.up_proj.weight", "model.norm.weight"),
        (Freeze(last_layers=0, train=["*.k_proj.*"]), "model.layers.0.self_attn.k_proj.weight", "model.norm.weight"),
        (Freeze(last_layers=0, embeddings=True), "model.embed_tokens.weight", "lm_head.weight"),
        (Freeze(last_layers=0, head=True), "lm_head.weight", "model.embed_tokens.weight"),
        (Freeze(last_layers=0, norms=True), "model.norm.weight", "lm_head.weight"),
    ],
)
def test_freeze_trains_what_it_names_and_nothing_else(untied_bf16_base, method, learns, rests):
    names = trainable(adapted(untied_bf16_base, method))
    assert learns in names
    assert rests not in names


def test_a_tied_head_is_trained_with_its_embeddings(base):
    assert list(trainable(adapted(base, Freeze(last_layers=0, head=True)))) == ["model.embed_tokens.weight"]


def test_patterns_fit_whole_parts_of_a_name():
    assert matches("model.layers.1.mlp.up_proj.weight", "layers.1")
    assert not matches("model.layers.10.mlp.up_proj.weight", "layers.1")
    assert matches("model.layers.10.mlp.up_proj.weight", "layers.1*")


def test_lora_by_itself_adapts_every_linear_layer_but_the_head(base, untied_bf16_base):
    for model in (adapted(base, Lora(rank=4)), adapted(untied_bf16_base, Lora(rank=4))):
        layers = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trainable(model)}
        assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_two_workers_begin_with_the_same_adapter_and_another_seed_with_another(base):
    torch.manual_seed(1)
    first = trainable(adapted(base, Lora(rank=4)))
    torch.manual_seed(2)
    second = trainable(adapted(base, Lora(rank=4)))
    other = trainable(adapted(base, Lora(rank=4), seed=8))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_making_an_adapter_leaves_the_random_stream_where_it_was(base):
    model = load_base(base, method=Lora(), dtype=torch.float32)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    adapt(model, Lora(rank=4), seed=1)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    "method",
    [
        Lora(rank=4),
        Lora(rank=4, rslora=True),
        Lora(rank=4, dora=True),
        Lora(rank=4, init="orthogonal"),
        Lora(rank=4, init="pissa"),
        Lora(rank=4, init="pissa", rslora=True, dora=True),
        Lora(rank=4, modules_to_save=["lm_head"]),
    ],
    ids=str,
)
def test_an_adapter_begins_as_the_base(base, ids, method):
    before = load_base(base, method=method, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(adapted(base, method)(ids).logits, before, atol=2e-6, rtol=1e-5)


def test_scales_are_alpha_over_rank_and_over_its_root(base):
    def scale(method):
        return adapted(base, method).base_model.model.model.layers[0].mlp.up_proj.scaling["default"]

    assert scale(Lora(rank=16)) == 2
    assert scale(Lora(rank=16, alpha=8)) == 0.5
    assert scale(Lora(rank=16, alpha=8, rslora=True)) == 2


def test_modules_to_save_are_those_called_so_and_not_all_that_end_so(base):
    names = [name for name in trainable(adapted(base, Lora(rank=4, modules_to_save=["norm"]))) if "norm" in name]
    assert names == ["base_model.model.model.norm.modules_to_save.default.weight"]


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (Lora(rank=40), r"method\.rank: 40 .*k_proj \(32\); use at most 32, or leave k_proj out"),
        (Lora(rank=70, targets=["q_proj"]), r"q_proj \(64\)"),
        (Lora(targets=["q_prj"]), r"method\.targets: no layer is called 'q_prj'; did you mean 'q_proj'"),
        (Lora(targets=["model.layers.0.self_atn.q_proj"]), r"did you mean 'model\.layers\.0\.self_attn\.q_proj'"),
        (
            Lora(targets=["xyz"]),
            r"there are down_proj, embed_tokens, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj",
        ),
        (Lora(targets=["norm"]), r"'norm' is a LlamaRMSNorm"),
        (Lora(modules_to_save=["lm_haed"]), r"method\.modules_to_save: .* did you mean 'lm_head'"),
        (Lora(rank=7, init="orthogonal"), r"even rank, not 7; use 8"),
        (Freeze(train=["mlpp"]), r"method\.train: 'mlpp' fits no parameter; did you mean 'mlp'"),
        (Freeze(last_layers=9), r"method\.last_layers: 9 is more than the model's 3 blocks"),
    ],
    ids=str,
)
def test_a_method_that_does_not_fit_is_refused_by_configuration_alone(base, method, said):
    with pytest.raises(ModelError, match=said):
        check_method(load_config(base), method)


def test_every_problem_is_named_at_once(base):
    with pytest.raises(ModelError) as caught:
        check_method(load_config(base), Lora(rank=99, targets=["q_prj", "k_proj"], modules_to_save=["nope"]))
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "method.targets",
        "method.modules_to_save",
        "method.rank",
    ]


def test_a_rank_of_the_smaller_side_fits(base):
    check_method(load_config(base), Lora(rank=32))


def test_methods_are_served_as_their_kind_allows():
    assert servability(Lora(rslora=True, init="pissa")) == "adapter"
    assert servability(Lora(dora=True)) == servability(Lora(modules_to_save=["lm_head"])) == "merge"
    assert servability(Full()) == servability(Freeze()) == "model"


def test_learning_rates_fall_with_size_and_rise_for_adapters():
    assert default_lr(Full(), 5_000_000) == 1e-3
    assert default_lr(Lora(), 5_000_000) == 2e-3
    assert default_lr(Full(), 8_000_000_000) == 2e-5
    assert default_lr(Lora(), 8_000_000_000) == 2e-4
    sizes = [10**n for n in range(6, 12)]
    assert all(default_lr(Full(), a) >= default_lr(Full(), b) for a, b in pairwise(sizes))
