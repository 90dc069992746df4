"""Order and surroundings of the tests: those that start Ray come last, and nothing reaches for the network."""

from __future__ import annotations

import gc
import os

import pytest

# Set before any test imports the libraries that read them; children inherit them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("ray") is not None)  # stable: files keep their order
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        import torch

        if not torch.cuda.is_available():
            for item in on_gpu:
                item.add_marker(pytest.mark.skip(reason="no GPU here"))


def pytest_collection_finish() -> None:
    """What was imported stays, so the garbage collector need not look through it again: a twelfth of the time."""
    gc.collect()
    gc.freeze()
