"""Who uses a version, and deleting the ones that nobody does.

```text
adapters/<name>/leases/<n>/<holder>.json     a replica serves version n until a time
adapters/<name>/deleting/<n>/<token>.json    a process is about to delete version n
```
Deleting against taking a lease or moving an alias: each side first leaves its own sign (`deleting/`; the lease, the
move) and looks for the other's after that. So at least one of two sees the other: the deleter gives way, and the user
waits until the deleter has decided.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ftray.errors import RegistryError
from ftray.store.aliases import AliasState
from ftray.store.process import this_process
from ftray.store.versions import Shelf, given_up

_SETTLE_S = 10.0


def hold(shelf: Shelf, number: int, holder: str, ttl_s: float) -> None:
    """Keeps a version from being deleted for `ttl_s` seconds; RegistryError if it is deleted."""
    key = _lease_key(shelf, number, holder)
    shelf.storage.write_json(key, {"holder": holder, "until": time.time() + ttl_s})
    try:
        settle(shelf, [number])
    except RegistryError:
        shelf.storage.remove(key)
        raise


def release(shelf: Shelf, number: int, holder: str) -> None:
    shelf.storage.remove(_lease_key(shelf, number, holder))


def holders(shelf: Shelf, number: int) -> list[str]:
    """Whose hold has not run out."""
    leases = _documents(shelf, "leases", number)
    return sorted(lease["holder"] for lease in leases if lease["until"] > time.time())


def settle(shelf: Shelf, numbers: Iterable[int]) -> None:
    """After leaving a sign that versions are used: waits for deleters that may have missed it; RegistryError if one
    of the versions is deleted."""
    numbers = sorted(numbers)
    deadline = time.monotonic() + _SETTLE_S
    for number in numbers:
        while deleters := [sign for sign in _documents(shelf, "deleting", number) if not given_up(sign)]:
            if time.monotonic() > deadline:
                raise RegistryError(
                    f"{shelf.name}@v{number} is being deleted by pid {deleters[0]['pid']} on host "
                    f"{deleters[0]['host']}; wait for it, or stop it, and try again"
                )
            time.sleep(0.02)
    if gone := sorted(shelf.deleted() & set(numbers)):
        raise RegistryError(f"{shelf.name}@v{gone[0]} was deleted; choose another version")


def delete(
    shelf: Shelf, number: int, aliases: Callable[[], Mapping[str, AliasState]], made_of: Callable[[], Sequence[str]]
) -> None:
    """Buries and clears a version; `aliases()` says where the aliases point now, `made_of()` which versions began
    from it."""
    sign = shelf.key("deleting", str(number), f"{secrets.token_hex(8)}.json")
    shelf.storage.write_json(sign, {**this_process(), "at": time.time()})
    try:
        _check_unused(shelf, number, aliases(), made_of())
        shelf.bury(number, reason="deleted")
    finally:
        shelf.storage.remove(sign)
    shelf.storage.remove(shelf.key("deleting", str(number)))
    shelf.clear(number)


def _check_unused(shelf: Shelf, number: int, aliases: Mapping[str, AliasState], made_of: Sequence[str]) -> None:
    for alias, state in aliases.items():
        if number in state.targets:
            used = f"{shelf.name}@v{number} is {shelf.name}@{alias}"
            raise RegistryError(f"{used}; promote another version, or drop the alias, and delete it then")
    if names := holders(shelf, number):
        raise RegistryError(f"{shelf.name}@v{number} is held by {', '.join(names)}; unload it there, or wait")
    if made_of:
        shown = ", ".join(made_of[:5]) + (f" and {len(made_of) - 5} more" if len(made_of) > 5 else "")
        raise RegistryError(
            f"{shelf.name}@v{number} is part of the base of {shown}, which may not be served without it; "
            "delete those first"
        )


def _lease_key(shelf: Shelf, number: int, holder: str) -> str:
    return shelf.key("leases", str(number), f"{hashlib.sha256(holder.encode()).hexdigest()[:32]}.json")


def _documents(shelf: Shelf, kind: str, number: int) -> list[dict[str, Any]]:
    folder = shelf.key(kind, str(number))
    documents = []
    for entry in shelf.storage.list(folder):
        with contextlib.suppress(FileNotFoundError):  # removed since the listing
            documents.append(shelf.storage.read_json(shelf.storage.join(folder, entry)))
    return documents
