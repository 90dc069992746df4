"""A command at a terminal of its own: type, read what appears, interrupt."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Sequence

PATIENCE_S = 60.0
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\x1b\][^\x07]*\x07|\r")


class Terminal:
    def __init__(self, command: Sequence[str], *, columns: int = 80, **environment: str):
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        self._end = ours
        self.raw = ""
        self._seen = 0
        self.child = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env={**os.environ, "TERM": "xterm", "COLUMNS": str(columns), **environment},
        )
        os.close(theirs)

    def until(self, text: str) -> str:
        """What appeared since the last call, up to and with `text`."""
        ends = time.monotonic() + PATIENCE_S
        while True:
            shown = self.shown[self._seen :]
            if text in shown:
                found = shown[: shown.index(text) + len(text)]
                self._seen += len(found)
                return found
            assert time.monotonic() < ends, f"{text!r} does not appear in {shown!r}"
            if not self._read():
                raise AssertionError(f"the command ended without {text!r}: {shown!r}")

    def type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def interrupt(self) -> int:
        """Ctrl-C until the command has ended; its exit code. One that comes just before a read is noticed only by
        the next, so it is typed again."""
        while self.child.poll() is None:
            with contextlib.suppress(OSError):  # it ended just now
                self.type("\x03")
            ends = time.monotonic() + 1.0
            while time.monotonic() < ends and self.child.poll() is None:
                self._read()
        while self._read():
            pass
        return self.child.returncode

    def wait(self) -> int:
        """The exit code, once the command has ended."""
        ends = time.monotonic() + PATIENCE_S
        while self.child.poll() is None:
            assert time.monotonic() < ends, f"still running: {self.shown[self._seen :]!r}"
            self._read()
        return self.child.returncode

    def close(self) -> None:
        self.child.kill()
        self.child.wait()
        os.close(self._end)

    @property
    def shown(self) -> str:
        """Without what only moves the cursor or colours."""
        return _ESCAPES.sub("", self.raw)

    def _read(self) -> bool:
        """False at the end."""
        if not select.select([self._end], [], [], 0.1)[0]:
            return self.child.poll() is None
        try:
            content = os.read(self._end, 65536)
        except OSError:  # Linux says so once nobody is at the terminal's other end
            return False
        self.raw += content.decode(errors="replace")
        return bool(content)
