"""What is kept of a run, so that it can be shown, and resumed by name after anything died.

```text
runs/<name>/
    resolved.json        the run with its `auto` values filled in
    state/<field>.json   status, step, …: one file a field, so that driver and worker never undo each other's
    lease/<n>.json       who trains it now
    verdict.json         why the run stopped, when it is the user's to fix: from a worker to the driver
    metrics.jsonl        one line a report; on object stores metrics/<n>.jsonl
    checkpoints/
    clearing.json        there while a fresh start removes what was before
```
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ftray import errors
from ftray.errors import FtrayError, StorageError
from ftray.store import lease
from ftray.store.paths import Storage, json_bytes

STATUSES = ("preparing", "training", "evaluating", "done", "failed", "stopped")

_KEPT_WHEN_CLEARING = {"lease", "clearing.json"}


class RunFolder:
    """The folder of one run."""

    def __init__(self, storage: Storage, name: str):
        self.storage = storage
        self.name = name
        self.key = storage.join("runs", name)
        self._next_segment = 1

    # the run and its state

    def resolved(self) -> dict[str, Any] | None:
        """The run as it began; None if it never did, or is being started over."""
        if self.storage.exists(self._at("clearing.json")):
            return None
        return _read(self.storage, self._at("resolved.json"))

    def begin(self, resolved: dict[str, Any], fresh: bool) -> None:
        """Notes that the run starts or resumes; `fresh` removes what was before. Hold the lease around it.

        A fresh start that was killed half-way is finished by the next begin, fresh or not: what is left over from
        before must not be resumed. The state field `born` tells this life of the run from earlier ones.
        """
        if fresh and self.storage.list(self.key):
            self.storage.write_json(self._at("clearing.json"), {"at": time.time()})
        if self.storage.exists(self._at("clearing.json")):
            for entry in self.storage.list(self.key):
                if entry not in _KEPT_WHEN_CLEARING:
                    self.storage.remove(self._at(entry))
            self.storage.remove(self._at("clearing.json"))
        self.clear_verdict()
        self.storage.write_json(self._at("resolved.json"), resolved)
        if "born" not in self.state():
            self.set_state(started=time.time(), born=secrets.token_hex(8))
        self.set_state(error=None, status="preparing")

    def state(self) -> dict[str, Any]:
        """The fields that were set, and `updated`: seconds since 1970 of the last setting. {} before `begin`."""
        state: dict[str, Any] = {}
        updated = 0.0
        for name in self.storage.list(self._at("state")):
            entry = _read(self.storage, self._at("state", name))
            if isinstance(entry, dict) and "value" in entry:
                state[name.removesuffix(".json")] = entry["value"]
                updated = max(updated, entry["at"])
        return {**state, "updated": updated} if state else {}

    def set_state(self, **fields: Any) -> None:
        """Sets status (one of STATUSES), version, report, error, step, total_steps, …; others stay as they are.

        Of two writers of one field the later wins. `status` is written last: whoever sees "done" sees the version.
        """
        status = fields.get("status", STATUSES[0])
        if status not in STATUSES:
            raise ValueError(f"status {status!r} is none of {STATUSES}")
        for name in sorted(fields, key=lambda name: name == "status"):
            self.storage.write_json(self._at("state", f"{name}.json"), {"value": fields[name], "at": time.time()})

    # who trains it

    def lease(self, owner: dict[str, Any] | None = None, *, beat_s: float = 5.0) -> AbstractContextManager[lease.Lease]:
        """Holds the run in a `with` block, with a heartbeat; StorageError "run X is being trained by pid P on host H".

        `owner` adds to the host, pid and boot id that are noted. A dead process of this machine is followed at once,
        one elsewhere after 6 missed beats. `Lease.check()` raises once another driver has taken over.
        """
        return lease.holding(self.storage, self._at("lease"), what=f"run {self.name}", owner=owner or {}, beat_s=beat_s)

    def holder(self) -> dict[str, Any] | None:
        """Who trains the run now: {host, pid, beat, …}; None: nobody."""
        return lease.holder(self.storage, self._at("lease"))

    # from a worker to the driver

    def verdict(self) -> dict[str, Any] | None:
        """{kind, message, at} if a worker stopped the run on something the user can fix."""
        return _read(self.storage, self._at("verdict.json"))

    def set_verdict(self, kind: str, message: str) -> bool:
        """`kind` names a class of ftray.errors. The first verdict stays: later ones are its consequences (False)."""
        known = getattr(errors, kind, None)
        if not (isinstance(known, type) and issubclass(known, FtrayError)):
            raise ValueError(f"{kind!r} is no error of ftray.errors")
        verdict = {"kind": kind, "message": message, "at": time.time()}
        return self.storage.create(self._at("verdict.json"), json_bytes(verdict))

    def clear_verdict(self) -> None:
        self.storage.remove(self._at("verdict.json"))

    # metrics

    def append_metrics(self, rows: Iterable[dict[str, Any]]) -> None:
        """Adds rows such as {kind: "train", step: 12, loss: 1.5}."""
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        if not lines:
            return
        local = self.storage.local_path(self._at("metrics.jsonl"))
        if local is not None:
            self._append(local, lines)
            return
        while not self.storage.create(self._at("metrics", f"{self._next_segment}.jsonl"), lines):
            self._next_segment = max(self._segments(), default=0) + 1
        self._next_segment += 1

    def metrics(self) -> list[dict[str, Any]]:
        """Rows in the order of their first report; of rows with equal kind and step, which a resumed run repeats,
        the last. Rows without a step are all kept; lines cut off by a crash are left out."""
        rows: dict[Any, dict[str, Any]] = {}
        for row in self._rows():
            key = (row.get("kind"), row["step"]) if "step" in row else len(rows)
            rows[key] = row
        return list(rows.values())

    def _append(self, path: Path, lines: bytes) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            with open(descriptor, "rb+", buffering=0) as file:
                size = file.seek(0, os.SEEK_END)
                if size:
                    file.seek(-1, os.SEEK_END)
                    # A writer that was killed, or met a full disk, left half a line.
                    lines = lines if file.read(1) == b"\n" else b"\n" + lines
                while lines:
                    lines = lines[file.write(lines) :]
        except OSError as error:
            raise self.storage.failure(self._at("metrics.jsonl"), error) from error

    def _rows(self) -> Iterator[dict[str, Any]]:
        keys = [self._at("metrics", f"{number}.jsonl") for number in self._segments()]
        if self.storage.is_local:
            keys.append(self._at("metrics.jsonl"))
        for key in keys:
            with contextlib.suppress(FileNotFoundError):
                for line in self.storage.read_bytes(key).split(b"\n"):
                    with contextlib.suppress(ValueError):  # half a line
                        row = json.loads(line)
                        if isinstance(row, dict):
                            yield row

    def _segments(self) -> list[int]:
        stems = (name.removesuffix(".jsonl") for name in self.storage.list(self._at("metrics")))
        return sorted(int(stem) for stem in stems if stem.isdecimal())

    def _at(self, *parts: str) -> str:
        return self.storage.join(self.key, *parts)


def list_runs(storage: Storage) -> list[dict[str, Any]]:
    """{name, live, status, …} of every run, the one that began last first. `live`: a driver holds it now."""
    folders = [RunFolder(storage, name) for name in storage.list("runs")]
    runs = [{"name": folder.name, "live": folder.holder() is not None, **folder.state()} for folder in folders]
    return sorted(runs, key=lambda run: (run.get("started") or 0.0, run["name"]), reverse=True)


def _read(storage: Storage, key: str) -> Any:
    """None where there is nothing, or a document that a backend without atomic writes left half-written."""
    try:
        return storage.read_json(key)
    except FileNotFoundError:
        return None
    except StorageError as error:
        if isinstance(error.__cause__, ValueError):
            return None
        raise
