"""A saved folder becomes the next version of an adapter, whoever else publishes, wherever the process dies.

1. claim a number (exclusive creation);  2. write the files and the card;
3. create `publications/<key>/<k>.json` {number, complete}: the point of no return, which one writer of a publication
   reaches;  4. write the marker.

Killed before 3: the number stays invisible, and the next try takes another one and removes it. Killed between 3 and 4:
whoever publishes the same again writes the marker. A second writer who finds the record taken drops its own number.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ftray.errors import RegistryError, StorageError
from ftray.store.admission import CARD, Content, admit
from ftray.store.localfiles import file_sha256
from ftray.store.numbered import Numbered
from ftray.store.paths import MARKER
from ftray.store.process import this_process
from ftray.store.versions import Shelf, Version

log = logging.getLogger(__name__)


def publish(shelf: Shelf, folder: Path, card: Mapping[str, Any], publication: str) -> Version:
    if (version := _published(shelf, publication)) is not None:
        return version
    content = admit(folder, card)
    number = _claim(shelf, publication)
    try:
        _write(shelf, number, folder, card, publication, content)
    except StorageError:
        # A second writer of this publication may have been first, and swept this one's files away.
        if (version := _published(shelf, publication)) is None:
            raise
        _drop(shelf, number, reason=f"the same publication as v{version.number}")
        return version
    version = _commit(shelf, number, publication, content)
    try:
        _sweep(shelf, publication)
    except StorageError as error:  # the version is there; what is left over goes with the next publication
        log.warning("cannot remove what earlier attempts left: %s", error)
    return version


def _published(shelf: Shelf, publication: str) -> Version | None:
    """The version of a publication, its marker written if the publisher died before that; None: none yet."""
    records = _records(shelf, publication)
    record = records.read(max(records.numbers(), default=0))
    if record is None or record["number"] in shelf.deleted():
        return None
    number, complete = record["number"], record["complete"]
    version = shelf.version(number)
    if version is not None:
        return version
    found = shelf.storage.files(shelf.folder(number))
    if CARD not in found or any(found.get(name) != info["size"] for name, info in complete["files"].items()):
        return None  # removed by hand
    shelf.storage.write_json(shelf.storage.join(shelf.folder(number), MARKER), complete)
    return shelf.version(number)


def _records(shelf: Shelf, publication: str) -> Numbered:
    """A series, because a publication may be repeated after its version was deleted."""
    short = hashlib.sha256(publication.encode()).hexdigest()[:32]
    return Numbered(shelf.storage, shelf.key("publications", short))


def _claim(shelf: Shelf, publication: str) -> int:
    while True:
        number = max(shelf.taken(), default=0) + 1
        if shelf.claims.create(number, {**this_process(), "publication": publication, "at": time.time()}):
            return number


def _write(
    shelf: Shelf, number: int, folder: Path, card: Mapping[str, Any], publication: str, content: Content
) -> None:
    for name, info in content.files.items():
        with shelf.storage.staged(shelf.storage.join(shelf.folder(number), name)) as temp:
            shutil.copyfile(folder / name, temp)
            if file_sha256(temp) != info["sha256"]:
                raise RegistryError(
                    f"{folder / name} changed while it was published; publish a folder that is finished"
                )
    added = {
        "name": shelf.name,
        "version": number,
        "created": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "publication": publication,
        "digest": content.digest,
    }
    shelf.storage.write_json(shelf.storage.join(shelf.folder(number), CARD), {**card, **added})


def _commit(shelf: Shelf, number: int, publication: str, content: Content) -> Version:
    records = _records(shelf, publication)
    complete = {"digest": content.digest, "files": content.files}
    while True:
        # In this order: a record that appears after the listing makes the creation fail.
        last = max(records.numbers(), default=0)
        if (version := _published(shelf, publication)) is not None:
            _drop(shelf, number, reason=f"the same publication as v{version.number}")
            return version
        if records.create(last + 1, {"number": number, "complete": complete}):
            break
    version = _published(shelf, publication)
    if version is None:
        raise RegistryError(f"{shelf.name}@v{number} was removed while it was published; publish it again")
    return version


def _sweep(shelf: Shelf, publication: str) -> None:
    """Removes what killed processes left: other attempts at this publication, and folders of deleted versions."""
    deleted = shelf.deleted()
    for number in shelf.numbers():
        if number in deleted:
            shelf.clear(number)
        elif shelf.version(number) is None:
            claim = shelf.claims.read(number)
            if claim is not None and claim.get("publication") == publication:
                _drop(shelf, number, reason="abandoned")


def _drop(shelf: Shelf, number: int, *, reason: str) -> None:
    shelf.bury(number, reason=reason)
    shelf.clear(number)
