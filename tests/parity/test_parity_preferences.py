"""Objectives that compare answers: one curve on one worker and two, packed or padded, under ZeRO 0 and 2, resumed."""

from __future__ import annotations

import numpy as np
import pytest
from parity_drill import SAVED_AFTER, Variant, run_group, write_base

from ftray.config.methods import AdaLora, Full, Lora, Prefix
from ftray.config.objectives import Dpo, Kto, Orpo
from tests.objectives.answers import write_rows

OBJECTIVES = {"dpo": Dpo(sft_weight=0.1), "orpo": Orpo(), "kto": Kto(beta=0.5)}
METHODS = {
    "full": Full(),
    "lora": Lora(rank=4),
    "prefix": Prefix(tokens=4),
    "adalora": AdaLora(rank=2, start_rank=4),  # its allocator looks at gradients, its reference switches it off
    "pissa": Lora(rank=4, init="pissa"),  # its reference is read once
}
RUNS = [f"{kind}-{method}" for kind in OBJECTIVES for method in ("full", "lora", "prefix")]
RUNS += ["dpo-adalora", "dpo-pissa"]


def run(name, cut, **changes):
    kind, method = name.split("-")
    return Variant(
        f"{name}-{cut}", method=METHODS[method], objective=OBJECTIVES[kind], rows=kind, base="square", **changes
    )


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preferences")
    write_base(folder / "square", hidden=80, intermediate=64)
    for kind in OBJECTIVES:
        write_rows(folder / kind, kind, count=13)
    two = [run(name, "two-z2", zero=2, saves=f"{name}-two-z2") for name in RUNS]
    two += [run(name, "two", packing="prefix" not in name) for name in RUNS]
    one = [run(name, "alone", micro=3) for name in RUNS]
    one += [run(name, "resumed", resumes=f"{name}-two-z2") for name in RUNS if "prefix" not in name]
    two += [run("dpo-lora", "two-z3", zero=3), run("kto-full", "two-z3", zero=3)]
    return run_group(folder, 2, two) | run_group(folder, 1, one)


@pytest.mark.parametrize("name", RUNS)
def test_no_cut_changes_the_curve(curves, name):
    alone = curves[f"{name}-alone"]
    assert max(alone.losses) - min(alone.losses) > 1e-3, "nothing was learnt, so nothing could differ"
    mine = {cut: curve for cut, curve in curves.items() if cut.startswith(f"{name}-")}
    assert len(mine) >= 3
    for cut, curve in mine.items():
        np.testing.assert_allclose(curve.losses, alone.losses[curve.first :], atol=5e-5, err_msg=cut)
        np.testing.assert_allclose(curve.norms, alone.norms[curve.first :], rtol=1e-3, atol=1e-5, err_msg=cut)


def test_a_resumed_run_makes_only_the_steps_that_are_left(curves):
    assert all(curve.first == SAVED_AFTER for cut, curve in curves.items() if cut.endswith("-resumed"))
