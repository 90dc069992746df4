"""Offload to NVMe is the same run too. Its operator is compiled at first use, which takes minutes."""

from __future__ import annotations

import numpy as np
import pytest
from parity_drill import Variant, run_group, write_base, write_rows

from ftray.train import nvme

pytestmark = pytest.mark.slow
DECAYED = {"zero": 3, "weight_decay": 0.1}


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nvme")
    if (lacking := nvme.problem(str(folder / "nvme"))) is not None:
        pytest.skip(lacking[1])
    write_base(folder / "base", vocab=9000)  # below 1 MiB a worker, DeepSpeed swaps nothing
    write_rows(folder / "rows")
    two = [
        Variant("memory", **DECAYED, saves="memory"),
        Variant("nvme", **DECAYED, offload="nvme", saves="nvme"),
    ]
    one = [
        Variant("nvme-resumed-in-memory", **DECAYED, resumes="nvme"),
        Variant("nvme-resumed", **DECAYED, offload="nvme", resumes="nvme"),
        Variant("memory-resumed-on-nvme", **DECAYED, offload="nvme", resumes="memory"),
    ]
    curves = run_group(folder, 2, two)
    assert list((folder / "nvme").rglob("exp_avg-*.swp"))
    assert list((folder / "nvme").rglob("*_param.tensor.swp"))
    return curves | run_group(folder, 1, one)


def test_a_run_offloaded_to_nvme_is_the_run_in_memory(curves):
    np.testing.assert_allclose(curves["nvme"].losses, curves["memory"].losses, atol=2e-5)


@pytest.mark.parametrize("name", ["nvme-resumed-in-memory", "nvme-resumed", "memory-resumed-on-nvme"])
def test_a_checkpoint_goes_to_nvme_and_back(curves, name):
    curve = curves[name]
    np.testing.assert_allclose(curve.losses, curves["memory"].losses[curve.first :], atol=2e-5)
