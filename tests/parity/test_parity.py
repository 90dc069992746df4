"""However a run is cut, it is the same run: the losses agree over workers, ZeRO stages, offload and micro-batches.

Seen with torch 2.13 on CPUs, in nats per token: differences of at most 3e-6 in fp32.
"""

from __future__ import annotations

import numpy as np
import pytest
from parity_drill import BATCH, SAVED_AFTER, Curve, Variant, run_group, write_base, write_rows

from ftray.config.schema import Full, Lora

FP32 = 2e-5
LORA = Lora(rank=4)
NORMS_TOO = Lora(rank=4, modules_to_save=["norm"])
DROPS = Lora(rank=4, dropout=0.2)
STAGES = (0, 1, 2, 3)


def cuts(method, kind: str, *, decay: float = 0.0, saves: bool = True) -> list[Variant]:
    """One run of a method under every ZeRO stage."""
    return [
        Variant(f"{kind}-z{z}", zero=z, method=method, weight_decay=decay, saves=f"{kind}-z{z}" if saves else None)
        for z in STAGES
    ]


TWO = [
    *cuts(Full(), "full"),
    Variant("full-z2-offloaded", zero=2, offload="cpu", saves="full-z2-offloaded"),
    Variant("full-z3-offloaded", zero=3, offload="cpu", saves="full-z3-offloaded"),
    Variant("full-micro-1", micro=1),
    Variant("full-micro-whole", zero=2, micro=BATCH),
    Variant("full-packed", packing=True),
    Variant("full-packed-z3", packing=True, zero=3),
    Variant("full-recomputed", checkpointing=True),
    *cuts(Full(), "decayed", decay=0.1),
    *cuts(LORA, "lora"),
    Variant("lora-packed-z2", zero=2, packing=True, method=LORA),
    Variant("lora-packed-z3", zero=3, packing=True, method=LORA),
    *cuts(NORMS_TOO, "norms", decay=0.1),
    *(Variant(f"drops-z{z}", zero=z, method=DROPS, saves=f"drops-z{z}") for z in (0, 2, 3)),
    *(Variant(f"drops-z{z}-resumed", zero=z, method=DROPS, resumes=f"drops-z{z}") for z in (0, 2, 3)),
    *(Variant(f"bf16-z{z}", zero=z, dtype="bf16", saves=f"bf16-z{z}") for z in STAGES),
    *(Variant(f"bf16-z{z}-resumed", zero=z, dtype="bf16", resumes=f"bf16-z{z}") for z in STAGES),
]
OPTIMIZERS = ("adamw_8bit", "paged_adamw", "paged_adamw_8bit")
CROSSED = [  # (saved as, resumed under)
    *((f"full-z{z}", 3 - z) for z in STAGES),
    ("full-z2-offloaded", 0),
    ("full-z3-offloaded", 2),
    *((f"decayed-z{z}", 3 - z) for z in STAGES),
    *((f"lora-z{z}", 3 - z) for z in STAGES),
    *((f"norms-z{z}", 3 - z) for z in STAGES),
]


def resumed(saved: str, stage: int) -> Variant:
    kind = saved.split("-")[0]
    method = {"full": Full(), "decayed": Full(), "lora": LORA, "norms": NORMS_TOO}[kind]
    return Variant(
        f"{saved}-resumed",
        zero=stage,
        method=method,
        weight_decay=0.1 if kind in ("decayed", "norms") else 0.0,
        resumes=saved,
    )


ONE = [
    Variant("full"),
    Variant("full-packed-z3", packing=True, zero=3),
    Variant("decayed", weight_decay=0.1),
    Variant("lora", method=LORA, micro=BATCH),
    Variant("norms", method=NORMS_TOO, weight_decay=0.1),
    *(resumed(saved, stage) for saved, stage in CROSSED),
    *(Variant(o, optimizer=o, saves=o) for o in OPTIMIZERS),
    *(Variant(f"{o}-resumed", optimizer=o, resumes=o) for o in OPTIMIZERS),
]
THREE = [
    Variant("full", micro=1),
    Variant("full-packed-z3", packing=True, zero=3),
    Variant("lora-packed-z2", packing=True, zero=2, method=LORA),
    *(resumed(saved, stage) for saved, stage in CROSSED if saved[-1] in "23" or saved.endswith("offloaded")),
]


@pytest.fixture(scope="session")
def curves(tmp_path_factory) -> dict[tuple[int, str], Curve]:
    """(workers, variant) -> curve. The checkpoints that two workers write are resumed on one and on three."""
    folder = tmp_path_factory.mktemp("parity")
    write_base(folder / "base")
    write_rows(folder / "rows")
    return {
        (workers, name): curve
        for workers, variants in ((2, TWO), (1, ONE), (3, THREE))
        for name, curve in run_group(folder, workers, variants).items()
    }


def apart(one: Curve, other: Curve) -> float:
    """The largest difference of two loss curves, over the steps that both made."""
    first = max(one.first, other.first)
    return float(np.abs(np.subtract(one.losses[first - one.first :], other.losses[first - other.first :])).max())


@pytest.mark.parametrize("kind", ["full", "decayed", "lora", "norms"])
def test_no_layout_changes_the_curve(curves, kind):
    reference = curves[1, kind]
    same = {key: curve for key, curve in curves.items() if key[1].split("-")[0] == kind}
    assert len(same) > 10
    far = {key: d for key, curve in same.items() if (d := apart(reference, curve)) > FP32}
    print(kind, len(same), max(apart(reference, c) for c in same.values()))
    assert not far
    for curve in same.values():
        np.testing.assert_allclose(curve.norms, reference.norms[curve.first :], rtol=1e-4)


def test_a_resumed_run_makes_only_the_steps_that_are_left(curves):
    resumed_ones = [curve for (_, name), curve in curves.items() if name.endswith("-resumed")]
    whole = len(curves[1, "full"].losses)
    assert all(c.first == SAVED_AFTER and len(c.losses) == whole - SAVED_AFTER for c in resumed_ones)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_resumed_run_drops_what_the_uninterrupted_one_dropped(curves, stage):
    assert apart(curves[2, f"drops-z{stage}"], curves[2, "lora-z0"]) > 1e-3
    print(apart(curves[2, f"drops-z{stage}"], curves[2, f"drops-z{stage}-resumed"]))
    assert apart(curves[2, f"drops-z{stage}"], curves[2, f"drops-z{stage}-resumed"]) < 1e-6


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_trains_close_to_fp32(curves, stage):
    d = apart(curves[2, f"bf16-z{stage}"], curves[2, f"full-z{stage}"])
    print(stage, d, apart(curves[2, f"bf16-z{stage}"], curves[2, f"bf16-z{stage}-resumed"]))
    assert d < 0.02


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_in_bf16_resumes_where_it_was(curves, stage):
    assert apart(curves[2, f"bf16-z{stage}"], curves[2, f"bf16-z{stage}-resumed"]) < 1e-6


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_other_optimisers_resume_where_they_were(curves, optimizer):
    print(optimizer, apart(curves[1, optimizer], curves[1, f"{optimizer}-resumed"]), apart(curves[1, optimizer], curves[1, "full"]))
    assert apart(curves[1, optimizer], curves[1, f"{optimizer}-resumed"]) < 1e-6
    assert apart(curves[1, optimizer], curves[1, "full"]) < 0.05
