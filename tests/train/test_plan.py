"""The plan's numbers against figures that others published, against torch, and against values worked by hand."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from ftray.config.schema import Freeze, Full, Lora
from ftray.models.adapt import adapt, trainable
from ftray.models.attention import register
from ftray.models.load import Shape
from ftray.objectives.language import loss_sum, pack, pad
from ftray.train import plan
from ftray.train.layout import Layout, Node
from ftray.train.memory import GIB, QUANTISED, RUNTIME_BYTES, learning

MLP_AND_ATTENTION = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
H100 = Node("a", cpus=64, gpus=8, gpu_bytes=80 * GIB, gpu_kind="NVIDIA-H100-80GB-HBM3", ram_bytes=10**12)


def llama(hidden, layers, mlp, heads, kv_heads, vocab):
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=mlp,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        tie_word_embeddings=False,
    )


BASES = {
    "llama-3.1-8b": (4096, 32, 14336, 32, 8, 128256),
    "llama-3.1-70b": (8192, 80, 28672, 64, 8, 128256),
    "llama-2-7b": (4096, 32, 11008, 32, 32, 32000),
    "llama-2-13b": (5120, 40, 13824, 40, 40, 32000),
    "llama-2-70b": (8192, 80, 28672, 64, 8, 32000),
}
SMALL = (384, 8, 1024, 8, 4, 8192)  # 19 M parameters


@pytest.fixture(scope="module")
def shapes():
    return {name: Shape.from_config(llama(*sides)) for name, sides in BASES.items()}


@pytest.fixture(scope="module")
def small():
    return Shape.from_config(llama(*SMALL))


def layout(**changes):
    usual = Layout(
        workers=1,
        device="cuda",
        gpus_per_worker=1,
        cpus_per_worker=4,
        zero=0,
        offload="none",
        nvme_path=None,
        dtype="bf16",
        attention="ftray_varlen",
        packing=True,
        micro_batch_size=1,
        gradient_checkpointing=True,
    )
    return replace(usual, **changes)


def predict(shape, method, *, optimizer="adamw", max_length=1024, **changes):
    return plan.predict(shape, method=method, layout=layout(**changes), optimizer=optimizer, max_length=max_length)


def tuned(bits=None, targets=MLP_AND_ATTENTION, dropout=0.0):
    return Lora(rank=8, targets=targets, bits=bits, dropout=dropout)


# Peaks as allocated by torch, so without the runtime. torchtune computes the loss in chunks and so hardly holds logits.
TORCHTUNE = {"micro_batch_size": 2, "max_length": 2048}
ON_8 = {**TORCHTUNE, "workers": 8, "zero": 3}
LITGPT = {"max_length": 1304, "packing": False, "attention": "sdpa", "gradient_checkpointing": False}
ATTENTION_ONLY = ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("base", "method", "setting", "published"),
    [
        ("llama-3.1-8b", tuned(), TORCHTUNE, 16.2 * GIB),
        ("llama-3.1-8b", tuned(bits=4), TORCHTUNE, 7.4 * GIB),
        ("llama-3.1-70b", tuned(), ON_8, 27.6 * GIB),
        ("llama-3.1-70b", Full(), {**ON_8, "offload": "cpu"}, 13.9 * GIB),
        ("llama-2-7b", tuned(targets=ATTENTION_ONLY, dropout=0.05), LITGPT, 21.30e9),
        ("llama-2-7b", tuned(targets=ATTENTION_ONLY, dropout=0.05), {**LITGPT, "micro_batch_size": 2}, 29.07e9),
        ("llama-2-7b", tuned(4, ATTENTION_ONLY, 0.05), LITGPT, 13.84e9),
        ("llama-2-13b", tuned(targets=ATTENTION_ONLY, dropout=0.05), LITGPT, 38.12e9),
        ("llama-2-13b", tuned(4, ATTENTION_ONLY, 0.05), LITGPT, 22.55e9),
    ],
)
def test_memory_is_within_a_third_of_what_others_measured(shapes, base, method, setting, published):
    """torchtune's README (8B on a 4090, 70B on 8 A100), LitGPT's resource tables (A100): other code with other kernels.
    20 % apart at most, but for the 70B in full: its FSDP offload keeps about 4 GiB more on the GPU than we predict."""
    used = predict(shapes[base], method, **setting)
    ours = used.total - RUNTIME_BYTES - (used.logits if base.startswith("llama-3") else 0)
    assert ours == pytest.approx(published, rel=0.33 if isinstance(method, Full) else 0.2)


@pytest.mark.parametrize(
    ("base", "method", "setting", "published"),
    [
        ("llama-2-7b", Full(), {"zero": 1}, 120e9),
        ("llama-2-70b", Full(), {"zero": 1}, 1200e9),
        ("llama-2-7b", Lora(), {}, 16e9),
        ("llama-2-70b", Lora(), {}, 160e9),
        ("llama-2-7b", Lora(bits=4), {}, 6e9),
        ("llama-2-70b", Lora(bits=4), {}, 48e9),
    ],
)
def test_memory_is_within_a_fifth_of_llama_factorys_estimates(shapes, base, method, setting, published):
    assert predict(shapes[base], method, **setting).total == pytest.approx(published, rel=0.2)


@pytest.mark.parametrize(("zero", "gigabytes"), [(1, 31.4), (2, 16.6), (3, 1.88)])
def test_model_states_are_those_of_the_zero_paper(shapes, zero, gigabytes):
    """Figure 1 of arXiv 1910.02054: 7.5 B parameters over 64 GPUs, Adam in mixed precision."""
    shape = replace(shapes["llama-2-7b"], parameters=7_500_000_000)
    used = predict(shape, Full(), zero=zero, workers=64)
    assert (used.weights + used.gradients + used.optimizer) / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_quantised_weights_cost_what_the_qlora_paper_says():
    assert QUANTISED[4] * 8 == pytest.approx(4 + 0.127, abs=5e-4)


# measured


def saved_bytes(method, *, dtype, zero, packing, checkpointing=False):
    """Bytes that autograd keeps from the forward pass, each storage once, the model's own left out."""
    rows, length = 4, 128
    register()
    torch.manual_seed(0)
    attention = "ftray_varlen" if packing else "sdpa"
    model = AutoModelForCausalLM.from_config(llama(*SMALL), dtype=dtype, attn_implementation=attention)
    model = adapt(model, method, seed=0, fp32=zero == 0).train()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    alive, sizes = [], {}

    def keep(tensor):
        alive.append(tensor)  # so that no storage's address is used twice
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    lengths = [length - (0 if packing else i) for i in range(rows)]  # unequal lengths need a mask
    ids = [np.full(n, 7) for n in lengths]
    trained = [np.ones(n, bool) for n in lengths]
    batch = pack(ids, trained, range(rows)) if packing else pad(ids, trained, range(rows), pad_id=0)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=zero == 0 and dtype == torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        loss_sum(model, batch)
    return sum(size for address, size in sizes.items() if address not in own)


METHODS = {
    "full": Full(),
    "lora": Lora(rank=8),
    "dropout": Lora(rank=8, dropout=0.1),
    "dora": Lora(rank=8, dora=True),
    "freeze": Freeze(last_layers=2),
}
MIXED = [("fp32", 0), ("bf16", 1), ("bf16", 0)]  # computing type, ZeRO stage


@pytest.mark.parametrize(
    ("kind", "dtype", "zero", "packing"),
    [
        *((kind, *mixed, True) for kind in ("full", "lora") for mixed in MIXED),
        *((kind, *MIXED[1], True) for kind in ("dropout", "dora", "freeze")),
        *((kind, *mixed, False) for kind, mixed in zip(METHODS, [*MIXED, *MIXED], strict=False)),
    ],
)
def test_activations_are_what_torch_saves(small, kind, dtype, zero, packing):
    """Off by at most 7 %: copies that autocast makes of frozen parts and masks of unequal rows are counted roughly."""
    method = METHODS[kind]
    kept = saved_bytes(method, dtype=torch.float32 if dtype == "fp32" else torch.bfloat16, zero=zero, packing=packing)
    used = predict(
        small,
        method,
        max_length=128,
        device="cpu",
        dtype=dtype,
        zero=zero,
        packing=packing,
        attention="ftray_varlen" if packing else "sdpa",
        micro_batch_size=4,
        gradient_checkpointing=False,
    )
    log_probabilities = used.logits / 3  # the other two come in the backward pass
    copies = 2 * learning(small, method).matrices if (dtype, zero) == ("bf16", 0) else 0
    assert used.activations + log_probabilities + copies == pytest.approx(kept, rel=0.07)


@pytest.mark.parametrize("method", [Full(), Lora(rank=8)], ids=["full", "lora"])
def test_checkpointing_keeps_the_inputs_of_blocks_and_one_block(small, method):
    kept = saved_bytes(method, dtype=torch.float32, zero=0, packing=True, checkpointing=True)
    setting = {"max_length": 128, "device": "cpu", "dtype": "fp32", "micro_batch_size": 4}
    used = predict(small, method, **setting)
    without = predict(small, method, **setting, gradient_checkpointing=False)
    last_norm = 4 * 128 * 384 * (12 if method.kind == "full" else 4)
    block = (without.activations - last_norm) / 8
    assert used.activations - block + used.logits / 3 == pytest.approx(kept, rel=0.05)


@pytest.mark.parametrize(
    "method",
    [
        Full(),
        Freeze(last_layers=2),
        Freeze(last_layers=1, norms=True, embeddings=True, head=True),
        Freeze(last_layers=0, train=["layers.3", "q_proj"]),
        Lora(rank=8),
        Lora(rank=4, targets=["q_proj", "embed_tokens"]),
        Lora(rank=4, dora=True),
        Lora(rank=4, modules_to_save=["lm_head", "embed_tokens"]),
    ],
    ids=str,
)
def test_learnt_parameters_are_those_that_learn(small, method):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(llama(*SMALL))
    if isinstance(method, Lora):
        model = AutoModelForCausalLM.from_config(llama(*SMALL))
    real = sum(parameter.numel() for parameter in trainable(adapt(model, method, seed=0)).values())
    assert learning(small, method).params == pytest.approx(real, rel=1e-3)  # norms named by a pattern are left out


# layouts


def test_offload_moves_states_off_the_device(shapes):
    kept = predict(shapes["llama-3.1-8b"], Full(), zero=2)
    away = predict(shapes["llama-3.1-8b"], Full(), zero=2, offload="cpu")
    assert away.optimizer == away.gradients == 0
    assert away.host == pytest.approx(kept.optimizer * 16 / 12)  # fp32 gradients too
    disk = predict(shapes["llama-3.1-8b"], Full(), zero=3, offload="nvme")
    assert disk.disk == pytest.approx(kept.optimizer + kept.weights)
    assert disk.total < away.total < kept.total


def test_offload_to_cpu_frees_nothing_on_cpu_workers(small):
    kept = predict(small, Full(), device="cpu", dtype="fp32", zero=2)
    assert predict(small, Full(), device="cpu", dtype="fp32", zero=2, offload="cpu").total >= 0.9 * kept.total


def test_paged_and_8_bit_optimisers_shrink_the_moments(shapes):
    used = {
        name: predict(shapes["llama-2-7b"], Full(), optimizer=name) for name in ("adamw", "adamw_8bit", "paged_adamw")
    }
    assert used["adamw"].optimizer / used["adamw_8bit"].optimizer == pytest.approx(8 / 2.03, rel=0.01)
    assert used["paged_adamw"].host == used["adamw"].optimizer
    assert used["paged_adamw"].optimizer == 0


def test_padded_rows_need_a_mask_that_grows_with_their_length(shapes):
    def a_token(length, packing):
        used = predict(shapes["llama-3.1-8b"], Lora(), max_length=length, packing=packing, gradient_checkpointing=False)
        return used.activations / length

    assert a_token(8192, True) == pytest.approx(a_token(1024, True), rel=1e-6)
    assert a_token(8192, False) - a_token(1024, False) == pytest.approx(32 * 2 * (8192 - 1024), rel=1e-3)


# choices


def test_the_largest_micro_batch_fits_and_the_next_does_not(shapes):
    setting = {"method": Lora(), "layout": layout(), "optimizer": "adamw", "max_length": 2048}
    size = plan.largest_micro_batch(shapes["llama-3.1-8b"], **setting, device_bytes=80 * GIB, per_worker_examples=48)
    assert size is not None
    fits, next_one = (
        predict(shapes["llama-3.1-8b"], Lora(), max_length=2048, micro_batch_size=n) for n in (size, 2 * size)
    )
    assert fits.total <= plan.USABLE * 80 * GIB < next_one.total
    assert size in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)


def test_no_micro_batch_fits_where_the_weights_do_not(shapes):
    setting = {"method": Full(), "layout": layout(), "optimizer": "adamw", "max_length": 2048}
    assert (
        plan.largest_micro_batch(shapes["llama-3.1-8b"], **setting, device_bytes=24 * GIB, per_worker_examples=8)
        is None
    )


def advice(shape, method, *, gib, optimizer="adamw", max_length=4096, **changes):
    return plan.advice(
        shape,
        method=method,
        layout=layout(**changes),
        optimizer=optimizer,
        max_length=max_length,
        device_bytes=gib * GIB,
    )


def test_what_fits_needs_no_advice(shapes):
    assert advice(shapes["llama-3.1-8b"], Lora(), gib=80) == []


def test_advice_names_what_helps_alone_cheapest_first_with_what_it_leads_to(shapes):
    base = shapes["llama-3.1-8b"]
    ways = advice(base, Lora(), gib=32, max_length=1024, micro_batch_size=4, gradient_checkpointing=False)
    led_to = {
        "optim.micro_batch_size: 1": predict(base, Lora(), gradient_checkpointing=False),
        "scale.gradient_checkpointing: true": predict(base, Lora(), micro_batch_size=4),
        "data.max_length: 256": predict(base, Lora(), max_length=256, micro_batch_size=4, gradient_checkpointing=False),
    }
    assert ways == [f"{change} -> {plan.human_bytes(used.total)}" for change, used in led_to.items()]
    assert max(used.total for used in led_to.values()) <= plan.USABLE * 32 * GIB


def test_a_base_too_large_for_its_gpu_is_told_to_quantise_shard_or_offload(shapes):
    ways = advice(shapes["llama-3.1-70b"], Lora(), gib=80)
    assert [way.partition(" ->")[0] for way in ways] == [
        "method.bits: 4",
        "scale.workers: 4, scale.zero: 3",
        "scale.offload: cpu, scale.zero: 3",
    ]
    assert ways[-1].endswith("of RAM a worker")


def test_changes_are_put_together_where_none_is_enough(shapes):
    (way,) = advice(
        shapes["llama-3.1-70b"], Lora(bits=4), gib=48, zero=0, micro_batch_size=8, gradient_checkpointing=False
    )
    assert way.startswith("optim.micro_batch_size: 1, scale.gradient_checkpointing: true")
    assert float(way.rpartition("-> ")[2].split()[0]) <= 0.9 * 48


def test_a_device_too_small_for_anything_is_said(shapes):
    (way,) = advice(shapes["llama-3.1-70b"], Full(), gib=2)
    assert way.startswith("no change is enough")


# time


def test_a_step_takes_about_as_long_as_torchtitan_reports(shapes):
    """5762 tokens/s a GPU for Llama-3.1-8B on 8 H100, which recomputes part of its blocks; we assume none or all."""
    tokens = 8 * 2 * 8192
    times = [
        plan.step_seconds(
            shapes["llama-3.1-8b"],
            method=Full(),
            layout=(whole := layout(workers=8, zero=3, gradient_checkpointing=recompute)),
            tokens=tokens,
            device_flops=plan.device_flops(whole, H100.gpu_kind),
        )
        for recompute in (False, True)
    ]
    published = tokens / (8 * 5762)
    assert times[0] < published
    assert times == [pytest.approx(published, rel=0.3)] * 2


def test_lora_costs_two_thirds_of_full_and_recomputing_a_forward_pass_more(shapes):
    def seconds(method, recompute):
        setting = layout(gradient_checkpointing=recompute)
        return plan.step_seconds(shapes["llama-2-7b"], method=method, layout=setting, tokens=1000, device_flops=1e12)

    weights = shapes["llama-2-7b"].linear_params + shapes["llama-2-7b"].embedding_params
    assert seconds(Full(), False) == pytest.approx(6 * weights * 1000 / 1e12)
    assert seconds(Lora(), False) / seconds(Full(), False) == pytest.approx(4 / 6, rel=0.02)
    assert seconds(Full(), True) / seconds(Full(), False) == pytest.approx(8 / 6, rel=0.01)


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [("NVIDIA A100-SXM4-80GB", 312), ("A10G", 70), ("NVIDIA GeForce RTX 4090", 165), ("Tesla T4", 65), ("H200", 989)],
)
def test_gpus_are_known_by_the_names_that_ray_and_torch_give(name, teraflops):
    assert plan.device_flops(layout(), name) == pytest.approx(plan.MFU * teraflops * 1e12)


# the whole plan


def make(shape, nodes, **changes):
    return plan.make(
        shape,
        method=Lora(),
        layout=layout(**changes),
        optimizer="adamw",
        max_length=1024,
        nodes=nodes,
        steps=1000,
        tokens_per_step=16_384,
    )


def test_a_plan_reads_as_a_table_with_a_verdict(shapes):
    made = make(shapes["llama-3.1-8b"], [H100])
    lines = made.lines()
    assert made.fits
    assert next(line for line in lines if "weights" in line).split() == ["weights", "15.2", "GiB"]
    assert lines[-2].endswith("of 80.0 GiB: fits")
    assert lines[-1].startswith("Course  1,000 steps of 16,384 tokens, about ")
    assert lines[0] == "Learns  41,943,040 parameters, 0.522 % of the base's 8,030,261,248"
    assert len({line.index("iB") for line in lines[2:-1]}) == 1
    assert json.loads(json.dumps(made.to_json()))["memory"]["total"] == made.memory.total


def test_a_plan_that_does_not_fit_says_what_would(shapes):
    made = make(shapes["llama-3.1-70b"], [H100])
    assert not made.fits
    assert any("would fit" in line and made.advice[0] in line for line in made.lines())


def test_an_unknown_machine_gets_no_verdict_and_no_time(small):
    made = make(small, [Node("a", cpus=8, gpus=1, gpu_kind="Abacus 9000")])
    assert made.fits
    assert made.seconds is None
    assert "not known" in made.lines()[-1]
    assert made.lines()[-2].endswith("what a worker has is not known")


def test_workers_share_the_memory_of_their_gpu_and_of_their_node():
    assert plan.device_bytes(layout(gpus_per_worker=0.5), [H100]) == 40 * GIB
    on_cpus = layout(device="cpu", workers=3, cpus_per_worker=2)
    assert (
        plan.device_bytes(on_cpus, [Node("a", cpus=4, ram_bytes=8 * GIB), Node("b", cpus=2, ram_bytes=6 * GIB)])
        == 4 * GIB
    )
    head = Node("head", cpus=0, ram_bytes=2 * GIB)
    assert plan.device_bytes(on_cpus, [head, Node("a", cpus=8, ram_bytes=24 * GIB)]) == 8 * GIB


def test_planning_brings_in_no_torch_and_no_ray():
    code = "import ftray.train.plan, sys; print('torch' in sys.modules, 'ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
