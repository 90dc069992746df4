"""However a run is cut, it is the same run: the losses agree over workers, ZeRO stages, offload and micro-batches.

Seen on CPUs, in nats per token: fp32 curves differ by at most 1.1e-5 (full), 1.6e-6 (with weight decay) and 9e-7
(LoRA), 4-bit ones by 7e-7; bf16 from fp32 by 1.4e-2 (autocast) and 3.5e-2 (16-bit weights); 8-bit moments from 32-bit
ones by 2.7e-4. On the same layout a resumed run repeats the uninterrupted one to the last bit.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from parity_drill import SAVED_AFTER, Curve
from parity_runs import LORA, OPTIMIZERS, QLORA, STAGES
from safetensors.torch import load_file

from ftray.config.schema import Model
from ftray.store.checkpoints import Checkpoints
from ftray.store.paths import Storage

FP32 = 2e-5


def apart(one: Curve, other: Curve) -> float:
    """The largest difference of two loss curves, over the steps that both made."""
    first = max(one.first, other.first)
    return float(np.abs(np.subtract(one.losses[first - one.first :], other.losses[first - other.first :])).max())


@pytest.mark.parametrize("kind", ["full", "decayed", "lora", "norms"])
def test_no_layout_changes_the_curve(curves, kind):
    reference = curves[1, kind]
    same = {key: curve for key, curve in curves.items() if key[1].split("-")[0] == kind}
    assert len(same) > 8
    far = {key: d for key, curve in same.items() if (d := apart(reference, curve)) > FP32}
    assert not far
    for curve in same.values():
        np.testing.assert_allclose(curve.norms, reference.norms[curve.first :], rtol=1e-4)


def test_a_resumed_run_makes_only_the_steps_that_are_left(curves):
    resumed_ones = [curve for (_, name), curve in curves.items() if name.endswith("-resumed")]
    whole = len(curves[1, "full"].losses)
    assert all(c.first == SAVED_AFTER and len(c.losses) == whole - SAVED_AFTER for c in resumed_ones)


def test_checkpoints_were_written_by_one_worker_and_by_all(curves, parity_folder):
    def parts(run):
        return len(Checkpoints(Storage(str(parity_folder / "store")), run).newest().files)

    assert [parts(f"full-z{stage}") for stage in STAGES] == [1, 2, 1, 2]


@pytest.mark.parametrize("stage", [0, 3])
def test_a_resumed_run_drops_what_the_uninterrupted_one_dropped(curves, stage):
    assert apart(curves[2, f"drops-z{stage}"], curves[2, "lora-z0"]) > 1e-3
    assert apart(curves[2, f"drops-z{stage}"], curves[2, f"drops-z{stage}-resumed"]) < 1e-6


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_trains_close_to_fp32(curves, stage):
    # a bf16 weight keeps 8 bits of mantissa, and the losses go from 5.0 to 3.9
    assert apart(curves[2, f"bf16-z{stage}"], curves[2, f"full-z{stage}"]) < 0.05


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_in_bf16_resumes_where_it_was(curves, stage):
    assert apart(curves[2, f"bf16-z{stage}"], curves[2, f"bf16-z{stage}-resumed"]) < 1e-6


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_in_bf16_resumes_under_another_stage_and_number_of_workers(curves, stage):
    # gradients are summed in bf16, in another order
    assert apart(curves[2, f"bf16-z{stage}"], curves[3, f"bf16-z{stage}-resumed"]) < 0.02


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_other_optimisers_resume_where_they_were(curves, optimizer):
    assert apart(curves[1, optimizer], curves[1, f"{optimizer}-resumed"]) < 1e-6
    assert apart(curves[1, optimizer], curves[1, "full"]) < 1e-3


def logits_of_a_version(parity_folder, name: str, *, base: str, method) -> torch.Tensor:
    """The version on a base that was loaded anew, through peft alone."""
    from peft import PeftModel

    from ftray.data.tokens import TokenStore
    from ftray.models.load import load_base

    loaded = load_base(Model(base=str(parity_folder / base)), method=method, dtype=torch.float32)
    model = PeftModel.from_pretrained(loaded, parity_folder / "versions" / name).eval()
    ids = torch.from_numpy(TokenStore.open(parity_folder / "rows").ids(0).astype(np.int64))[None]
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_writes_the_same_version(curves, parity_folder, stage):
    folder = parity_folder / "versions" / f"lora-z{stage}"
    one, other = load_file(parity_folder / "versions" / "lora-z0" / "gathered"), load_file(folder / "gathered")
    assert one.keys() == other.keys()
    assert max((one[name] - other[name]).abs().max() for name in one) < 1e-4
    logits = torch.load(folder / "logits")
    assert (logits - logits_of_a_version(parity_folder, f"lora-z{stage}", base="base", method=LORA)).abs().max() < 1e-5


def test_qlora_trains_and_its_adapter_reloads_to_the_same_logits(curves, parity_folder):
    curve = curves[2, "qlora-z2"]
    assert curve.losses[-2] < curve.losses[0]
    assert apart(curves[1, "qlora"], curve) < 1e-4
    assert apart(curve, curves[1, "qlora-z2-resumed"]) < 1e-4
    logits = torch.load(parity_folder / "versions" / "qlora-z2" / "logits")
    again = logits_of_a_version(parity_folder, "qlora-z2", base="square", method=QLORA)
    assert (logits - again).abs().max() < 1e-5
