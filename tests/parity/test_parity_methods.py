"""Every method beside full, freeze and LoRA: one curve on one worker and two, under ZeRO 0 to 2, and resumed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from parity_drill import SAVED_AFTER, Variant, run_group, write_base, write_rows
from peft import PeftModel
from safetensors.torch import load_file

import ftray.models.bottleneck  # noqa: F401  (PEFT learns of the method)
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
from ftray.config.schema import Model
from ftray.models.load import load_base

METHODS = {
    "adalora": AdaLora(rank=2, start_rank=4),
    "loha": LoHa(rank=4),
    "lokr": LoKr(rank=2),
    "ia3": Ia3(),
    "oft": Oft(block=16, targets=["q_proj", "down_proj"]),
    "vera": Vera(rank=16),
    "norms": Norms(),
    "tokens": Tokens(tokens=["w3", "w5", *range(20, 60)]),
    "bottleneck": Bottleneck(size=8),
    "prefix": Prefix(tokens=4, projection=16),
    "prompt": Prompt(tokens=4, text="w3"),
    "p_tuning": PTuning(tokens=4, width=16),
}
RESUMED = ("adalora", "bottleneck", "prefix")
PROMPTS = ("prefix", "prompt", "p_tuning")


def run(kind, name, **changes):
    return Variant(f"{kind}-{name}", method=METHODS[kind], base="square", **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    write_base(folder / "square", hidden=80, intermediate=64)
    write_rows(folder / "rows")
    return folder


@pytest.fixture(scope="module")
def curves(folder):
    two = [run(kind, "z2", zero=2, saves=f"{kind}-z2", version=True, spread=kind == "adalora") for kind in METHODS]
    two += [run(kind, "z1", zero=1) for kind in RESUMED] + [run("adalora", "z0", saves="adalora-z0", version=True)]
    one = [run(kind, "alone", packing=kind not in PROMPTS) for kind in METHODS]
    one += [run(kind, "resumed", resumes=f"{kind}-z2") for kind in RESUMED]
    return run_group(folder, 2, two) | run_group(folder, 1, one)


@pytest.mark.parametrize("kind", METHODS)
def test_two_workers_under_zero_2_train_as_one_without(curves, kind):
    alone = curves[f"{kind}-alone"]
    for name, curve in curves.items():
        if name.startswith(f"{kind}-"):
            np.testing.assert_allclose(curve.losses, alone.losses[curve.first :], atol=5e-5, err_msg=name)
            np.testing.assert_allclose(curve.norms, alone.norms[curve.first :], rtol=1e-3, err_msg=name)


@pytest.mark.parametrize("kind", RESUMED)
def test_a_method_resumes_on_another_number_of_workers(curves, kind):
    assert curves[f"{kind}-resumed"].first == SAVED_AFTER


@pytest.mark.parametrize("kind", METHODS)
def test_a_version_answers_in_plain_peft_as_where_it_was_trained(curves, folder, kind):
    from ftray.data.tokens import TokenStore

    version = folder / "versions" / f"{kind}-z2"
    base = load_base(Model(base=str(folder / "square")), method=METHODS[kind], dtype=torch.float32)
    model = PeftModel.from_pretrained(base, version).eval()
    ids = torch.from_numpy(TokenStore.open(folder / "rows").ids(0).astype(np.int64))[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, -ids.shape[1] :]
    assert (torch.load(version / "logits") - logits).abs().max() < 1e-5


@pytest.mark.parametrize("stage", ["z0", "z2"])
def test_adalora_ends_with_the_ranks_that_it_may_have(curves, folder, stage):
    tensors = load_file(folder / "versions" / f"adalora-{stage}" / "adapter_model.safetensors")
    ranks = [tensor.shape[0] for name, tensor in tensors.items() if name.endswith("lora_A.weight")]
    layers = 14
    assert sum(ranks) == METHODS["adalora"].rank * layers
    assert max(ranks) <= METHODS["adalora"].first_rank
    assert len(set(ranks)) > 1, "every layer kept the same rank: nothing was allocated"
