"""Whole runs on a GPU: what no CPU can show. Each trains the built-in model on the sample task and must get better."""

import importlib.util
import json

import pytest

from ftray.config.load import load_run

pytestmark = [pytest.mark.gpu, pytest.mark.ray]


@pytest.fixture
def improves(tmp_path):
    """Trains with some keys changed; the loss on held-out rows must halve."""

    def train_with(**keys):
        from ftray.train.launch import train

        path = tmp_path / "run.yaml"
        path.write_text(json.dumps({"name": "gpu", "data": {"sources": "builtin:orders"}}))
        plain = {
            "storage": str(tmp_path / "store"),
            "data__eval_sources": "builtin:orders-eval",
            "optim__steps": "40",
            "optim__batch_size": "32",
            "scale__gpus_per_worker": "1",
            "evaluate__generate_rows": "8",
        }
        overrides = [f"{key.replace('__', '.')}={value}" for key, value in (plain | keys).items()]
        comparison = train(load_run(path, overrides), as_json=True).comparison
        assert comparison["after"]["loss"] < comparison["before"]["loss"] / 2

    return train_with


def test_bf16_lora_with_ragged_attention(improves):
    improves(model__dtype="bf16")


def test_a_paged_8_bit_optimiser_over_an_nf4_base(improves):
    improves(method="{kind: lora, bits: 4}", optim__optimizer="paged_adamw_8bit")


@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_zero_3_full_fine_tuning(improves, offload):
    improves(method="{kind: full}", scale__zero="3", scale__offload=offload)


def test_zero_2_with_gradient_checkpointing(improves):
    improves(scale__zero="2", scale__gradient_checkpointing="true")


def test_flash_attention(improves):
    if importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed")
    improves(model__attention="flash_attention_2")
