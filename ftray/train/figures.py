"""Figures of every row of a data set, computed by all workers once in a run: a resumed run finds them in its folder."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch.distributed as dist

from ftray.store.paths import Storage
from ftray.train.keeper import agreed


def kept(
    storage: Storage, key: str, *, compute: Callable[[], np.ndarray], log: Callable[[dict[str, Any]], None]
) -> np.ndarray:
    """The array at `key`, computed and written where it is not there yet; the same on every worker."""
    first = dist.get_rank() == 0
    found = agreed(storage.read_bytes(key) if first and storage.exists(key) else None)
    if found is not None:
        return np.load(io.BytesIO(found))
    log({"kind": "phase", "text": "reading the rows with the base, once"})
    figures = compute()
    if first:
        written = io.BytesIO()
        np.save(written, figures)
        storage.write_bytes(key, written.getvalue())
    return figures
