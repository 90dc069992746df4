"""What `auto` becomes on a cluster, and what is said when the cluster cannot hold a run."""

import pytest
from transformers import LlamaConfig

from ftray.config.schema import Run, Scale
from ftray.errors import ClusterError, ConfigError, ModelError
from ftray.models.load import Shape
from ftray.train.layout import Node
from ftray.train.resolve import lay_out, place

GIB = 2**30
CPUS = Node("a", cpus=4)
GPUS = Node("g", cpus=32, gpus=8, gpu_bytes=80 * GIB, gpu_kind="NVIDIA-H100-80GB-HBM3", ram_bytes=1000 * GIB)
HEAD = Node("head", cpus=0)


@pytest.fixture(scope="module")
def llama_8b():
    return Shape.from_config(
        LlamaConfig(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            tie_word_embeddings=False,
        )
    )


@pytest.fixture(scope="module")
def small():
    return Shape.from_config(
        LlamaConfig(
            vocab_size=4096,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
        )
    )


def run_of(**sections):
    return Run.model_validate({"name": "r", "data": {"sources": [{"path": "rows.jsonl"}]}} | sections)


def rows(**more):
    return {"sources": [{"path": "rows.jsonl"}]} | more


def test_workers_share_the_cpus_that_let_all_start_at_once():
    assert place(Scale(workers=1), [CPUS]) == (0, 4)
    assert place(Scale(workers=2), [CPUS]) == (0, 2)
    assert place(Scale(workers=3), [CPUS]) == (0, 1)
    assert place(Scale(workers=3), [CPUS, Node("b", cpus=2)]) == (0, 2)
    assert place(Scale(workers=1), [Node("big", cpus=96)]) == (0, 16)
    assert place(Scale(workers=(2, 3)), [CPUS]) == (0, 1)
    assert place(Scale(workers=(2, 8)), [CPUS]) == (0, 1), "as many as there is room for"


def test_a_range_of_workers_is_laid_out_for_what_is_there_and_sized_for_the_least(small):
    run = run_of(data=rows(max_length=64), optim={"batch_size": 12}, scale={"workers": [2, 6]})
    layout = lay_out(run, nodes=[CPUS], shape=small, packs=True)
    assert (layout.workers, layout.micro_batch_size, layout.zero) == (4, 6, 2)
    with pytest.raises(ClusterError, match="5 workers with 1 CPU each"):
        place(Scale(workers=(5, 6)), [CPUS])


def test_a_gpu_each_where_there_are_gpus_and_a_head_without_any_is_left_out():
    assert place(Scale(workers=8), [HEAD, GPUS]) == (1, 4)
    assert place(Scale(workers=16, gpus_per_worker=0.5), [GPUS]) == (0.5, 2)
    assert place(Scale(workers=2, gpus_per_worker=0), [GPUS]) == (0, 16)


@pytest.mark.parametrize(
    ("scale", "nodes", "parts"),
    [
        ({"workers": 5}, [CPUS], ["5 workers with 1 CPU each", "room for 4 (a: 4 CPU)", "set scale.workers: 4"]),
        ({"workers": 2, "cpus_per_worker": 3}, [CPUS], ["room for 1", "or a smaller cpus_per_worker"]),
        ({"workers": 9}, [HEAD, GPUS], ["9 workers with 1 CPU and 1 GPU each", "room for 8", "or add nodes"]),
        ({"workers": 1, "gpus_per_worker": 1}, [CPUS], ["room for 0", "add nodes"]),
        ({"workers": 1}, [], ["no nodes", "add nodes"]),
    ],
)
def test_more_workers_than_the_cluster_holds_are_refused_with_what_it_holds(scale, nodes, parts):
    with pytest.raises(ClusterError) as refused:
        place(Scale(**scale), nodes)
    assert all(part in str(refused.value) for part in parts), refused.value


def test_on_cpus_a_run_is_fp32_packed_and_fills_a_micro_batch_of_4096_tokens(small):
    layout = lay_out(run_of(data=rows(max_length=1024)), nodes=[CPUS], shape=small, packs=True)
    assert (layout.device, layout.dtype, layout.packing, layout.attention) == ("cpu", "fp32", True, "ftray_varlen")
    assert (layout.zero, layout.micro_batch_size, layout.gradient_checkpointing) == (0, 4, False)


def test_a_micro_batch_is_no_larger_than_a_workers_share_of_the_batch(small):
    run = run_of(data=rows(max_length=64), optim={"batch_size": 6}, scale={"workers": 2})
    assert lay_out(run, nodes=[CPUS], shape=small, packs=True).micro_batch_size == 3


def test_on_gpus_a_run_is_bf16(small):
    layout = lay_out(run_of(), nodes=[GPUS], shape=small, packs=True)
    assert (layout.device, layout.dtype, layout.gpus_per_worker) == ("cuda", "bf16", 1)


def test_a_model_that_mixes_packed_examples_is_padded_or_refused(small):
    layout = lay_out(run_of(), nodes=[CPUS], shape=small, packs=False)
    assert (layout.packing, layout.attention) == (False, "sdpa")
    with pytest.raises(ModelError, match=r"data\.packing"):
        lay_out(run_of(data=rows(packing="on")), nodes=[CPUS], shape=small, packs=False)


def test_a_kernel_that_knows_no_packed_rows_gets_padded_ones(small):
    layout = lay_out(run_of(model={"attention": "sdpa"}), nodes=[CPUS], shape=small, packs=True)
    assert (layout.packing, layout.attention) == (False, "sdpa")


@pytest.mark.parametrize(
    ("sections", "zero"),
    [
        ({}, 0),
        ({"scale": {"workers": 8}}, 2),
        ({"scale": {"workers": 8}, "method": {"kind": "full"}}, 2),
        ({"scale": {"workers": 2}, "method": {"kind": "full"}}, 3),
        ({"scale": {"workers": 8}, "method": {"kind": "lora", "bits": 4}}, 2),
        ({"scale": {"workers": 8, "zero": 1}}, 1),
        ({"scale": {"workers": 8}, "optim": {"optimizer": "adamw_8bit"}}, 0),
        ({"scale": {"offload": "cpu"}}, 2),
        ({"scale": {"offload": "nvme", "nvme_path": "/nvme"}}, 3),
        ({"model": {"dtype": "fp16"}}, 1),
    ],
)
def test_the_stage_spreads_what_learns_and_the_weights_where_they_do_not_fit(llama_8b, sections, zero):
    assert lay_out(run_of(**sections), nodes=[GPUS], shape=llama_8b, packs=True).zero == zero


def test_a_small_model_trains_in_full_without_spreading_its_weights(small):
    run = run_of(scale={"workers": 8}, method={"kind": "full"})
    assert lay_out(run, nodes=[GPUS], shape=small, packs=True).zero == 2


def test_the_micro_batch_is_what_fits_and_activations_are_recomputed_where_nothing_else_does(llama_8b):
    lora = run_of(optim={"batch_size": 64}, data=rows(max_length=1024))
    roomy = lay_out(lora, nodes=[GPUS], shape=llama_8b, packs=True)
    tight_node = Node("t", cpus=8, gpus=1, gpu_bytes=24 * GIB)
    tight = lay_out(lora, nodes=[tight_node], shape=llama_8b, packs=True)
    assert roomy.micro_batch_size > tight.micro_batch_size >= 1
    assert tight.gradient_checkpointing
    assert not roomy.gradient_checkpointing


def test_a_micro_batch_that_was_asked_for_is_kept(llama_8b):
    run = run_of(optim={"batch_size": 64, "micro_batch_size": 2}, scale={"gradient_checkpointing": False})
    layout = lay_out(run, nodes=[GPUS], shape=llama_8b, packs=True)
    assert (layout.micro_batch_size, layout.gradient_checkpointing) == (2, False)


def test_runs_that_share_an_nvme_disk_swap_into_folders_of_their_own(small):
    run = run_of(scale={"offload": "nvme", "nvme_path": "/nvme/"})
    layout = lay_out(run, nodes=[GPUS], shape=small, packs=True)
    assert (layout.nvme_path, layout.largest_weight) == ("/nvme/r", 4096 * 256)


def test_fp16_needs_a_gpu_and_a_stage_that_keeps_fp32(small):
    with pytest.raises(ClusterError, match="fp16 needs GPUs"):
        lay_out(run_of(model={"dtype": "fp16"}), nodes=[CPUS], shape=small, packs=True)
    with pytest.raises(ConfigError, match=r"scale\.zero"):
        lay_out(run_of(model={"dtype": "fp16"}, scale={"zero": 0}), nodes=[GPUS], shape=small, packs=True)
