"""Servers that several test modules ask; each is started once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from app_server import Engine, Running, publish, running

from ftray.config.schema import Model
from ftray.config.serving import Serving
from ftray.models.load import load_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return load_tokenizer(Model())


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """orders@v1 and v2, of which v1 is prod, and refunds@v1."""
    root = tmp_path_factory.mktemp("app") / "store"
    publish(root, "orders", "first", "second")
    publish(root, "refunds", "money")
    return root


@pytest.fixture(scope="module")
def server(storage: Path, tokenizer: Any) -> Iterator[Running]:
    """Without keys; the engine takes 2 ms a token."""
    serving = Serving(storage=str(storage), adapters={"watch_s": 0.2}, limits={"max_body_mb": 0.5})
    with running(serving, engine=Engine(slots=4, pause_s=0.002), tokenizer=tokenizer) as started:
        started.registry.promote("orders@v1")
        started.call(started.catalog.refresh())
        yield started
