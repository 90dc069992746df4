"""A peer of benchmarks/serve.py in a process of its own, as the benchmark sees it: lines of JSON out and in."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

END_S = 30.0
_TOLD = 3000  # characters of a dead child's log


class ChildFailed(Exception):
    """A child ended or did not answer in time; the message ends with what it said last."""


class Child:
    """Started at once; `ready` waits for its first line. Use it in a `with`: it ends with the block."""

    def __init__(self, name: str, command: Sequence[str], *, environment: Mapping[str, str], log: Path):
        self.name, self._log = name, log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                list(command),
                env=dict(environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,  # so that what it started can be ended with it
            )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def ready(self, timeout_s: float) -> Any:
        return self._line(timeout_s)

    def ask(self, question: Any, timeout_s: float) -> Any:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the answer that does not come says it
            print(json.dumps(question), file=self._process.stdin, flush=True)
        return self._line(timeout_s)

    def _line(self, timeout_s: float) -> Any:
        assert self._process.stdout is not None
        late = threading.Timer(timeout_s, self._kill)
        late.start()
        try:
            line = self._process.stdout.readline()
        finally:
            late.cancel()
        if not line:
            self.close()
            said = self._log.read_text(encoding="utf-8", errors="replace")[-_TOLD:]
            why = f"ended with code {self._process.returncode}, or took more than {timeout_s:.0f} s"
            raise ChildFailed(f"{self.name} {why}:\n{said}")
        return json.loads(line)

    def close(self) -> None:
        """Gives it time to end by itself, then ends it and whatever it left."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()  # type: ignore[union-attr]
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        self._kill()
        self._process.wait()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
