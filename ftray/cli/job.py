"""Entry of the scripts in `jobs/`: a command run as the driver of a Ray job."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

UPLOADS = "runtime_resources/working_dir_files"


def run(command: str) -> int:
    """`ftray <command>` with the script's arguments; the exit code."""
    _settle()
    from ftray.cli import main

    return main([command, *sys.argv[1:]])


def _settle() -> None:
    """Go on from a copy of the uploaded working folder.

    Where several nodes share a machine, Ray unpacks the upload once for each into the same folder, and wipes it first
    (`download_and_unpack_package(overwrite=True)`): a driver that already runs from it would lose its files.
    """
    folder = os.getcwd()
    if UPLOADS not in folder:
        return
    copy = str(Path(tempfile.mkdtemp(prefix="ftray-job-"), "working_dir"))
    shutil.copytree(folder, copy)
    moved = {name: value.replace(folder, copy) for name, value in os.environ.items() if name == "PYTHONPATH"}
    script = str(Path(sys.argv[0]).absolute()).replace(folder, copy)
    os.chdir(copy)
    os.execve(sys.executable, [sys.executable, script, *sys.argv[1:]], {**os.environ, **moved})
