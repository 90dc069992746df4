"""native.c, compiled for this processor and loaded; where there is no compiler, the engine goes without.

The library lies in the user's cache folder, named by the source, the compiler and the processor, so that it is built
once a machine (about 3 s) and never used on another.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("native.c")
FLAGS = ("-O3", "-march=native", "-ffast-math", "-fno-finite-math-only", "-shared", "-fPIC")
SWITCH = "FTRAY_NATIVE"  # set to 0: torch alone
WIDTHS = (32, 64, 128)
GROUPS, LANES, TOKENS = 4, 16, 4
NAMES = {torch.float32: "float", torch.bfloat16: "bf16"}

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64


class Layers:
    """Layers over one input: A [S, R, I] and B [S, R, o] of each, whose outputs lie beside each other in y."""

    def __init__(self, halves: Sequence[tuple[Any, Any]]):
        self.halves = halves
        self.rank = halves[0][0].shape[1]
        rows, begin = [], 0
        for a, b in halves:
            rows.append((a.data_ptr(), b.data_ptr(), begin, b.shape[2]))
            begin += b.shape[2]
        self._layout = torch.tensor(rows)
        self.given = (self._layout.data_ptr(), len(rows))


class Tokens:
    """Which tokens of a step are of which slot: `segments` of (slot, begin, end). `ranks` [S], int64: what each slot
    uses of R; `widest`: the largest I + R of any layer."""

    def __init__(self, segments: Sequence[tuple[int, int, int]], *, ranks: Any, widest: int):
        self._kept = ranks, torch.tensor(segments), torch.empty(TOKENS * widest)
        self.given = (ranks.data_ptr(), self._kept[1].data_ptr(), len(segments))
        self.room = self._kept[2].data_ptr()


class Native:
    """The library's two loops over torch's tensors. One thread; the interpreter is free meanwhile."""

    def __init__(self, library: ctypes.CDLL):
        self._lora = {dtype: getattr(library, f"lora_{name}") for dtype, name in NAMES.items()}
        self._attend = {dtype: getattr(library, f"attend_{name}") for dtype, name in NAMES.items()}
        p, n = _POINTER, _SIZE
        for function in self._lora.values():
            function.restype, function.argtypes = None, [p, n, p, n, p, n, p, p, n, n, n, p]
        for function in self._attend.values():
            function.restype = None
            function.argtypes = [p, p, n, n, p, n, n, p, n, n, p, p, p, p, n, n, n, n, n, ctypes.c_float, n, p]

    def lora(self, y: Any, x: Any, *, layers: Layers, tokens: Tokens) -> None:
        """y [1, N, O] += B_s A_s x [1, N, I] for layers over one x; all of one dtype, fp32 or bf16, sums in fp32."""
        self._lora[y.dtype](
            y.data_ptr(), y.stride(1), x.data_ptr(), x.stride(1), *layers.given, *tokens.given, layers.rank, x.shape[2],
            tokens.room,
        )  # fmt: skip

    def attend(
        self,
        query: Any,
        key: Any,
        value: Any,
        keys: Any,
        values: Any,
        *,
        rows: Any,
        positions: Any,
        scale: float,
        window: int,
        room: Any,
    ) -> Any:
        """Stores key and value [K, N, D] in the slabs [R, K, L, D], and gives [N, H, D] for query [H, N, D].

        `room`: fp32, at least 4 * (L + 16). `window` 0: all positions up to a token's own.
        """
        heads, count, width = query.shape
        out = query.new_empty(count, heads, width)
        self._attend[query.dtype](
            out.data_ptr(),
            query.data_ptr(),
            query.stride(0),
            query.stride(1),
            key.data_ptr(),
            key.stride(0),
            key.stride(1),
            value.data_ptr(),
            value.stride(0),
            value.stride(1),
            keys.data_ptr(),
            values.data_ptr(),
            rows.data_ptr(),
            positions.data_ptr(),
            count,
            heads,
            keys.shape[1],
            width,
            keys.shape[2],
            scale,
            window,
            room.data_ptr(),
        )
        return out


@functools.cache
def load() -> Native | None:
    """None where it is switched off, or cannot be built; that is said once, and costs speed only."""
    if os.environ.get(SWITCH) == "0":
        return None
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        log.warning(
            "no C compiler (cc, gcc) here: adapters and attention go through torch alone, at 0.5 to 0.8 the speed"
        )
        return None
    try:
        return Native(ctypes.CDLL(str(_built(compiler))))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", b"") or str(error).encode()
        log.warning("native.c cannot be built, so torch goes alone: %s", detail.decode(errors="replace")[:500])
        return None


def _built(compiler: str) -> Path:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
    what = SOURCE.read_bytes() + version + _processor() + " ".join(FLAGS).encode()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ftray" / "native"
    path = folder / f"{hashlib.sha256(what).hexdigest()[:24]}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, temp = tempfile.mkstemp(dir=folder, suffix=".so")
    os.close(handle)
    try:
        command = [compiler, *FLAGS, "-o", temp, str(SOURCE)]
        subprocess.run(command, capture_output=True, check=True, timeout=300)
        os.replace(temp, path)  # several replicas may build at once: each puts a whole file there
    finally:
        Path(temp).unlink(missing_ok=True)
    return path


def _processor() -> bytes:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags"))})).encode()
    except OSError:
        return platform.processor().encode() + platform.machine().encode()
