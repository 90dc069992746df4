"""The vectors of a run's texts, for feature tuning: from the store where they are kept, and the rest computed once.

Every worker looks the texts up; those that one of them misses are dealt to all by length, read by the base in rounds,
kept, and told to everybody. A round that was kept is not read again, whatever becomes of the run.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ftray.config.schema import Feature, Model, Run
from ftray.data.labelled import SECOND
from ftray.data.tokens import TokenStore
from ftray.errors import TrainError
from ftray.models.features import Text, load_reader, pooling_for
from ftray.models.load import load_config
from ftray.objectives.features import Vectors, texts_of
from ftray.store.paths import Storage
from ftray.store.vectors import VectorStore
from ftray.train.layout import READ_TOKENS, Layout

ROUND = 4096  # texts of a worker between two writes; also a shard
LAYOUT = 1  # of what is kept; another number, and nothing kept before is found

Read = Callable[[Sequence[Text]], torch.Tensor]


def vector_store(storage: Storage, model: Model, method: Feature, *, base: str, dtype: str) -> VectorStore:
    """Where the vectors of a base are kept. `base`: its fingerprint; `dtype`: of its weights while it reads."""
    about = {
        "layout": LAYOUT,
        "base": base,
        "pooling": pooling_for(model, method),
        "dtype": dtype,
        "width": load_config(model).get_text_config().hidden_size,
    }
    return VectorStore(storage, about)


def told(run: Run, storage: Storage, *, stores: Sequence[TokenStore], model: Model, base: str, dtype: str) -> str:
    """What the plan says of the cache: how many of the run's texts are in it."""
    assert isinstance(run.method, Feature)
    _, keys, _ = texts_of(stores)
    there = vector_store(storage, model, run.method, base=base, dtype=dtype).known(keys)
    return f"{int(there.sum()):,} of {len(keys):,} texts are in the cache"


def reading(model: Model, method: Feature, *, layout: Layout, device: Any) -> Callable[[], Read]:
    """What loads the base, where a text is missing."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[layout.dtype]
    return lambda: load_reader(model, pooling=pooling_for(model, method), dtype=dtype, device=device)


def gather(
    kept: VectorStore,
    stores: Sequence[TokenStore],
    *,
    load: Callable[[], Read],
    device: str,
    log: Callable[[dict[str, Any]], None] = lambda row: None,
    beat: Callable[[], None] = lambda: None,
) -> Vectors:
    """A vector for every row of the stores, the same on every worker. Collective. `load` is called where one misses."""
    stands, keys, places = texts_of(stores)
    there, vectors = kept.read(keys)
    everywhere = torch.from_numpy(there.astype(np.int32)).to("cuda" if device == "cuda" else "cpu")
    dist.all_reduce(everywhere, op=dist.ReduceOp.MIN)  # another run may be writing, and one saw more than the other
    missing = np.flatnonzero(everywhere.cpu().numpy() == 0)
    had = len(keys) - len(missing)
    for shard in kept.damaged:
        log({"kind": "warning", "text": f"{shard} is damaged; its texts are read again. Remove it"})
    rest = f"; the base reads the other {len(missing):,}, once" if len(missing) else ""
    log({"kind": "phase", "text": f"{had:,} of {len(keys):,} texts are in the cache{rest}"})
    if len(missing):
        lengths = np.array([len(store.ids(row)) for store, row in stands])
        order = missing[np.argsort(lengths[missing], kind="stable")]
        read = load()
        for start in range(0, len(order), ROUND * dist.get_world_size()):
            places_now = order[start : start + ROUND * dist.get_world_size()]
            mine = places_now[dist.get_rank() :: dist.get_world_size()]
            found = _read(read, [stands[place] for place in mine], lengths[mine], budget=READ_TOKENS[device], beat=beat)
            kept.add(keys[mine], found)
            for rank, theirs in enumerate(_everyones(found)):
                vectors[places_now[rank :: dist.get_world_size()]] = theirs
        del read
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return Vectors(torch.from_numpy(vectors), places)


def _read(
    read: Read, stands: list[tuple[TokenStore, int]], lengths: np.ndarray, *, budget: int, beat: Callable[[], None]
) -> np.ndarray:
    """[n, D] of texts in the order of their lengths; a batch has at most `budget` tokens with its padding."""
    texts = [Text(store.ids(row).tolist(), int(store.column(SECOND)[row])) for store, row in stands]
    parts: list[np.ndarray] = []
    at = 0
    while at < len(texts):
        end = at + 1
        while end < len(texts) and (end + 1 - at) * lengths[end] <= budget:
            end += 1
        try:
            part = read(texts[at:end]).float().cpu().numpy()
        except torch.OutOfMemoryError:
            if end == at + 1:
                raise
            torch.cuda.empty_cache()
            budget = int((end - at) * lengths[end - 1]) // 2
            continue
        bad = np.flatnonzero(~np.isfinite(part).all(1))
        if len(bad):
            store, row = stands[at + int(bad[0])]
            raise TrainError(f"the base gives a vector that is not finite for {store.row_name(row)}; look at the row")
        parts.append(part)
        at = end
        beat()
    return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)


def _everyones(mine: np.ndarray) -> list[np.ndarray]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return [part if len(part) else np.zeros((0, 1), np.float32) for part in everyone]
