"""The versions of one adapter as they lie in storage: which numbers are taken, complete, deleted.

```text
adapters/<name>/
    claims/<n>.json                  who took number n; a number is never used twice
    v<n>/ files, card.json, COMPLETE.json {digest, files}; invisible without the marker
    deleted/<n>.json                 the tombstone, which counts before anything is removed
```
The rest of the layout: publish.py, aliases.py, usage.py.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from ftray.config.schema import NAME_PATTERN
from ftray.errors import BadReference, StorageError
from ftray.store.admission import CARD
from ftray.store.numbered import Numbered
from ftray.store.paths import MARKER, Storage, json_bytes
from ftray.store.process import is_gone

GIVEN_UP_S = 600.0


@dataclass(frozen=True)
class Version:
    """A complete version. `key` is its folder under the storage root, `digest` covers weights and config."""

    name: str
    number: int
    key: str
    card: dict[str, Any] = field(hash=False, compare=False, repr=False)
    digest: str

    @property
    def id(self) -> str:
        return f"{self.name}@v{self.number}"

    @property
    def created(self) -> str:
        """ISO 8601, UTC."""
        return self.card.get("created", "")


class Shelf:
    """One adapter's folder. BadReference for a name that cannot be one."""

    def __init__(self, storage: Storage, name: str):
        if not NAME_PATTERN.fullmatch(name):
            raise BadReference(f"{name!r} is not an adapter's name; use a-z, 0-9 and -, at most 64 characters")
        self.storage = storage
        self.name = name
        self.claims = Numbered(storage, self.key("claims"))

    def key(self, *parts: str) -> str:
        return self.storage.join("adapters", self.name, *parts)

    def folder(self, number: int) -> str:
        return self.key(f"v{number}")

    def numbers(self) -> set[int]:
        """Numbers with a folder, complete or not."""
        entries = (entry.removeprefix("v") for entry in self.storage.list(self.key()) if entry.startswith("v"))
        return {int(entry) for entry in entries if entry.isdecimal()}

    def deleted(self) -> set[int]:
        return set(Numbered(self.storage, self.key("deleted")).numbers())

    def taken(self) -> set[int]:
        """Every number that was ever given out."""
        return self.numbers() | self.deleted() | set(self.claims.numbers())

    def version(self, number: int) -> Version | None:
        """A complete version; None where the marker is missing. Look at `deleted` as well."""
        folder = self.folder(number)
        try:
            complete = self.storage.read_json(self.storage.join(folder, MARKER))
            card = self.storage.read_json(self.storage.join(folder, CARD))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except StorageError as error:
            if isinstance(error.__cause__, ValueError):
                return None  # a marker that a backend without atomic writes left half-written
            raise
        return Version(self.name, number, folder, card, complete["digest"])

    def versions(self) -> list[Version]:
        """Complete ones that are not deleted, oldest first."""
        found = (self.version(number) for number in sorted(self.numbers() - self.deleted()))
        return [version for version in found if version is not None]

    def bury(self, number: int, *, reason: str) -> None:
        """From here on the version does not exist."""
        document = json_bytes({"at": time.time(), "reason": reason})
        self.storage.create(self.key("deleted", f"{number}.json"), document)

    def clear(self, number: int) -> None:
        """Removes what a buried version left."""
        self.storage.remove(self.folder(number))
        self.storage.remove(self.key("leases", str(number)))


def given_up(sign: dict[str, Any]) -> bool:
    """Whether the process that left a sign died over it; one elsewhere is taken for dead after 10 minutes."""
    gone = is_gone(sign)
    return time.time() - sign["at"] > GIVEN_UP_S if gone is None else gone
