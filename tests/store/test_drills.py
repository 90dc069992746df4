"""Facts about many writers and killed ones, each from a drill with real processes (store_drills.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import store_drills


@pytest.fixture(scope="module")
def found() -> dict[str, str | None]:
    script = Path(store_drills.__file__)
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0
    return json.loads(done.stdout)


@pytest.mark.parametrize("drill", [drill.__name__ for drill in store_drills.DRILLS])
def test_drill(drill: str, found: dict[str, str | None]):
    assert found[drill] is None, found[drill]
