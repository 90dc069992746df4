"""Storage roots: a local folder, fsspec's memory, and, where FTRAY_TEST_ROOT names one, a real object store."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import pytest

from ftray.store.paths import Storage

REAL = os.environ.get("FTRAY_TEST_ROOT")


@pytest.fixture(params=["local", "memory", *(["real"] if REAL else [])])
def storage(request: pytest.FixtureRequest, tmp_path: Path):
    if request.param == "local":
        yield Storage(str(tmp_path / "store"))
        return
    root = "memory://tests" if request.param == "memory" else str(REAL)
    storage = Storage(f"{root}/{secrets.token_hex(6)}")
    yield storage
    for name in storage.list("runs"):
        storage.remove(f"runs/{name}")
    for name in storage.list("adapters"):
        storage.remove(f"adapters/{name}")
