"""All curves, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from parity_drill import Curve, run_group, write_base, write_rows
from parity_runs import ONE, THREE, TWO


@pytest.fixture(scope="session")
def parity_folder(tmp_path_factory) -> Path:
    """Holds base/, square/ (sizes that NF4 takes) and rows/; then also store/ and versions/ of the runs."""
    folder = tmp_path_factory.mktemp("parity")
    write_base(folder / "base")
    write_base(folder / "square", hidden=80, intermediate=64)
    write_rows(folder / "rows")
    return folder


@pytest.fixture(scope="session")
def curves(parity_folder) -> dict[tuple[int, str], Curve]:
    """(workers, variant) -> curve."""
    return {
        (workers, name): curve
        for workers, variants in ((2, TWO), (1, ONE), (3, THREE))
        for name, curve in run_group(parity_folder, workers, variants).items()
    }
