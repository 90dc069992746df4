"""Documents `<folder>/<n>.json`, n = 1, 2, …: taking the next number is a compare-and-swap on every backend.

Whoever read number n and creates n + 1 knows that nobody else followed n. Aliases, version numbers, publications and
leases are such series.
"""

from __future__ import annotations

import secrets
from typing import Any

from ftray.errors import StorageError
from ftray.store.paths import Storage, json_bytes


class Numbered:
    def __init__(self, storage: Storage, folder: str):
        self.storage = storage
        self.folder = folder

    def numbers(self) -> list[int]:
        """Taken numbers, ascending."""
        stems = (name.removesuffix(".json") for name in self.storage.list(self.folder) if name.endswith(".json"))
        return sorted(int(stem) for stem in stems if stem.isdecimal())

    def key(self, number: int) -> str:
        return self.storage.join(self.folder, f"{number}.json")

    def read(self, number: int) -> dict[str, Any] | None:
        """None where the document is gone, or was left half-written by a backend without atomic creation."""
        try:
            document = self.storage.read_json(self.key(number))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except StorageError as error:
            if isinstance(error.__cause__, ValueError):
                return None
            raise
        return document if isinstance(document, dict) else None

    def create(self, number: int, document: dict[str, Any]) -> bool:
        """Takes a number; False if another writer has it."""
        nonce = secrets.token_hex(8)
        if self.storage.create(self.key(number), json_bytes({**document, "nonce": nonce})):
            return True
        # A client that repeats a request after a lost answer is told "exists" about its own document.
        return (self.read(number) or {}).get("nonce") == nonce
