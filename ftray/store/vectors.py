"""Vectors of texts by what the texts are: computed once, kept for every later run over the same base.

```text
features/<digest>/about.json            base, pooling, number type and width: what the digest is of
features/<digest>/<shard>.safetensors   "keys" uint8 [n, 16] and "vectors" fp32 [n, D]
```
A text's key says what the base reads of it, so data sets, splits, labels and length limits may change. A shard appears
whole and is never changed: what a process that died had written stays good, and several may write at once.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ftray.store.paths import Storage, json_bytes

KEY_BYTES = 16
_SUFFIX = ".safetensors"


class VectorStore:
    """The vectors that one base gives in one way. `about`: what they depend on, plain data."""

    def __init__(self, storage: Storage, about: Mapping[str, Any]):
        self.storage, self.about = storage, dict(about)
        self.key = f"features/{hashlib.sha256(json_bytes(self.about)).hexdigest()[:32]}"
        self.damaged: list[str] = []
        """Shards that could not be read, and count as not there."""

    def known(self, keys: np.ndarray) -> np.ndarray:
        """Which of these keys [n, 16] have a vector, bool [n]. Reads no vectors."""
        return self._found(keys, with_vectors=False)[0]

    def read(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(bool [n]: which are there, fp32 [n, D]: their vectors, 0 where none is)."""
        return self._found(keys, with_vectors=True)

    def add(self, keys: np.ndarray, vectors: np.ndarray) -> None:
        """A shard with these; it is there when this returns."""
        from safetensors.numpy import save

        if not len(keys):
            return
        if not self.storage.exists(f"{self.key}/about.json"):
            self.storage.write_json(f"{self.key}/about.json", self.about)
        tensors = {"keys": np.ascontiguousarray(keys), "vectors": np.ascontiguousarray(vectors, np.float32)}
        self.storage.write_bytes(f"{self.key}/{secrets.token_hex(8)}{_SUFFIX}", save(tensors))

    def _found(self, keys: np.ndarray, *, with_vectors: bool) -> tuple[np.ndarray, np.ndarray]:
        wanted = {key.tobytes(): place for place, key in enumerate(np.ascontiguousarray(keys, np.uint8))}
        there = np.zeros(len(keys), np.bool_)
        vectors = np.zeros((len(keys), int(self.about["width"]) if with_vectors else 0), np.float32)
        for name in self.storage.list(self.key):
            if not name.endswith(_SUFFIX) or there.all():
                continue
            shard = self._shard(name)
            if shard is None:
                continue
            theirs = np.ascontiguousarray(shard["keys"])
            hits = [(row, at) for row, key in enumerate(theirs) if (at := wanted.get(key.tobytes())) is not None]
            if hits:
                rows, places = map(np.array, zip(*hits, strict=True))
                there[places] = True
                if with_vectors:
                    vectors[places] = shard["vectors"][rows]
        return there, vectors

    def _shard(self, name: str) -> Mapping[str, Any] | None:
        """Of a local one, a part is read when it is asked for."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        key = f"{self.key}/{name}"
        try:
            local = self.storage.local_path(key)
            return _Opened(local) if local is not None else load(self.storage.read_bytes(key))
        except FileNotFoundError:
            return None  # someone is clearing the cache
        except SafetensorError:
            self.damaged.append(self.storage.uri(key))
            return None


class _Opened(Mapping[str, Any]):
    """A local shard."""

    def __init__(self, path: Any):
        from safetensors import safe_open

        self._file = safe_open(str(path), "np")

    def __getitem__(self, name: str) -> Any:
        return self._file.get_tensor(name)

    def __iter__(self):
        return iter(self._file.keys())

    def __len__(self) -> int:
        return len(self._file.keys())


def text_key(ids: np.ndarray, second: int) -> bytes:
    """What a base reads of a text: its token ids, and where a second text begins."""
    text = np.ascontiguousarray(ids, np.uint32).tobytes() + int(second).to_bytes(4, "little")
    return hashlib.blake2b(text, digest_size=KEY_BYTES).digest()


def keys_of(texts: Sequence[bytes]) -> np.ndarray:
    """[n, 16] of so many keys."""
    return np.frombuffer(b"".join(texts), np.uint8).reshape(len(texts), KEY_BYTES)
