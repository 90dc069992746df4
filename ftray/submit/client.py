"""Jobs of a cluster through its dashboard: submitted once, followed over lost connections, stopped."""

from __future__ import annotations

import asyncio
import os
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftray.errors import ClusterError, ConfigError

ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
LOST_S = 120.0  # how long a dashboard may be away while a job is followed
STOP_S = 150.0
YOUNG_S = 60.0  # a dashboard answers some seconds before it can take jobs
OVER = ("SUCCEEDED", "FAILED", "STOPPED")
RUN = "ftray_run"


@dataclass(frozen=True)
class Ended:
    """How a job ended: `code` is its own exit code; 1 where it had none, 130 where it was stopped."""

    status: str
    code: int
    message: str


class Jobs:
    """The jobs of one cluster. Every method raises ClusterError where the cluster does not answer, or refuses."""

    def __init__(self, address: str | None):
        self.address = address or next((os.environ[name] for name in ADDRESSES if os.environ.get(name)), "")
        if not self.address.startswith(("http://", "https://")):
            problem = f"{self.address or 'none'} is no dashboard's address; say --address http://HOST:8265"
            raise ConfigError("ftray", [("--address", f"{problem}, or set {ADDRESSES[0]}")])
        if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
            os.environ.setdefault("RAY_AUTH_MODE", "token")  # else Ray sends none, although it is there
        with self._answering():
            from ray.job_submission import JobSubmissionClient

            self._client = JobSubmissionClient(self.address)

    def submit(self, *, run: str, command: str, script_args: list[str], folder: Path, python: str) -> str:
        """Submits. Where a job of this run goes on, that one's id instead: a run is never trained twice at once."""
        if going := self.of_run(run, command):
            return going
        end = time.monotonic() + YOUNG_S
        while True:
            try:
                with self._answering():
                    return self._client.submit_job(
                        # exec: a shell that is stopped right after it forked would leave the job behind, running
                        entrypoint=f"exec {shlex.join([python, 'job.py', *script_args])}",
                        submission_id=f"{run}-{command}-{time.strftime('%Y%m%d-%H%M%S')}",
                        runtime_env={"working_dir": str(folder)},
                        metadata={RUN: run, "ftray_command": command},
                    )
            except ClusterError as error:
                if "No available agent" not in str(error) or time.monotonic() > end:
                    raise
            time.sleep(1.0)

    def of_run(self, run: str, command: str) -> str | None:
        """The id of a job of this run that is not over."""
        return next(
            (one["id"] for one in self.list_() if (one["run"], one["command"]) == (run, command) and not one["over"]),
            None,
        )

    def list_(self) -> list[dict[str, Any]]:
        """Newest first. `run` is None for jobs that ftray did not submit; times are seconds since 1970."""
        with self._answering():
            found = [job for job in self._client.list_jobs() if job.submission_id]
        told = []
        for job in sorted(found, key=lambda job: job.start_time or 0, reverse=True):
            metadata = job.metadata or {}
            told.append(
                {
                    "id": job.submission_id,
                    "run": metadata.get(RUN),
                    "command": metadata.get("ftray_command"),
                    "status": str(job.status),
                    "over": str(job.status) in OVER,
                    "started": job.start_time and job.start_time / 1000,
                    "ended": job.end_time and job.end_time / 1000,
                    "code": job.driver_exit_code,
                }
            )
        return told

    def find(self, name: str) -> str:
        """The id of a job by its id, or the newest one of a run."""
        jobs = self.list_()
        chosen = next((job["id"] for job in jobs if name in (job["id"], job["run"])), None)
        if chosen is None:
            known = ", ".join(dict.fromkeys(job["run"] or job["id"] for job in jobs)) or "none"
            raise ClusterError(f"{self.address} has no job {name!r}; there are: {known}")
        return chosen

    def logs(self, job: str) -> str:
        with self._answering():
            return self._client.get_job_logs(job)

    def follow(self, job: str, show: Callable[[str], None]) -> Ended:
        """Shows the log until the job is over. A lost connection is taken up again where it broke."""
        shown = 0
        lost_since: float | None = None
        while True:
            try:
                status = self._client.get_job_status(job)
                if str(status) != "PENDING":
                    shown = asyncio.run(self._tail(job, show, shown))
                if str(self._client.get_job_status(job)) in OVER:
                    rest = self._client.get_job_logs(job)
                    show(rest[shown:])
                    return self.ended(job)
                lost_since = None
            except (OSError, RuntimeError) as error:  # Ray wraps a dashboard that is away into RuntimeError too
                lost_since = lost_since or time.monotonic()
                if time.monotonic() - lost_since > LOST_S:
                    problem = f"{self.address} does not answer any more: {_first_line(error)}; the job may go on"
                    raise ClusterError(f"{problem}: `ftray jobs logs {job} --follow` takes it up again") from error
            time.sleep(1.0)

    async def _tail(self, job: str, show: Callable[[str], None], shown: int) -> int:
        """Characters shown in all when the stream ends, for whatever reason. A stream begins with the whole log."""
        seen = 0
        try:
            async for piece in self._client.tail_job_logs(job):
                if seen + len(piece) > shown:
                    show(piece[max(0, shown - seen) :])
                seen += len(piece)
                shown = max(shown, seen)
        except (OSError, RuntimeError):
            pass  # the caller asks for the status, and says so if nobody answers
        return shown

    def ended(self, job: str) -> Ended:
        with self._answering():
            info = self._client.get_job_info(job)
        status = str(info.status)
        code = {"SUCCEEDED": 0, "STOPPED": 130}.get(status, info.driver_exit_code or 1)
        return Ended(status, code, info.message or "")

    def stop(self, job: str) -> str:
        """Asks it to stop, which gives it time for a checkpoint; the status it then has."""
        with self._answering():
            self._client.stop_job(job)
        end = time.monotonic() + STOP_S
        while time.monotonic() < end:
            with self._answering():
                status = str(self._client.get_job_status(job))
            if status in OVER:
                return status
            time.sleep(0.5)
        return status

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except ConfigError:
            raise
        except Exception as error:  # Ray's client raises RuntimeError, ConnectionError, its own and requests' errors
            text = str(error)
            if "413" in text:
                problem = "the upload is too large for it; put data into storage"
            elif "uthenticat" in text or "401" in text or "403" in text or "token" in text.lower():
                problem = "it wants its token: set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file with it"
            else:
                problem = f"{_first_line(error)}; `kubectl port-forward`, `ray dashboard` or `ssh -L` lead there"
            raise ClusterError(f"{self.address}: {problem}") from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
