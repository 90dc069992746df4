"""Entry of the scripts in `jobs/`: a command run as the driver of a Ray job."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

UPLOADS = "runtime_resources/working_dir_files"
ON_USER_ERROR = "FTRAY_ON_USER_ERROR"
"""`stop`: a job that ends with what a user can fix stops itself: KubeRay tries failed jobs again, stopped ones not."""
STOPPING_S = 60


def run(command: str) -> int:
    """`ftray <command>` with the script's arguments; the exit code."""
    _settle()
    from ftray.cli import main

    code = main([command, *sys.argv[1:]])
    if code == 2 and os.environ.get(ON_USER_ERROR) == "stop":
        _stop_myself()
    return code


def _stop_myself() -> None:
    """Comes back only where this is no Ray job, or its cluster does not answer."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    submission = job.get("metadata", {}).get("job_submission_id")
    if not submission:
        return
    from ray.job_submission import JobSubmissionClient

    with suppress(Exception):  # whatever Ray's client has to complain of: the exit code says it all the same
        sys.stdout.flush()
        JobSubmissionClient(os.environ.get("RAY_API_SERVER_ADDRESS")).stop_job(submission)
        time.sleep(STOPPING_S)  # SIGTERM comes meanwhile


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
