"""A base, and a smaller one with rows, that the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest
import run_drill

from tests.models.conftest import write_base


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def rollout_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rollouts")
    run_drill.write_base(folder / "base")
    run_drill.write_rows(folder / "rows.jsonl")
    return folder
