"""`submit` and `jobs`: runs on a cluster that this machine is no part of."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ftray.cli import show

if TYPE_CHECKING:
    from ftray.submit.client import Ended, Jobs


def submit(arguments: argparse.Namespace) -> int:
    from ftray.submit.bundle import bundled, wanted
    from ftray.submit.client import Jobs

    root = Path.cwd()
    job = wanted(arguments.file, arguments.overrides, command=arguments.run_command, root=root)
    jobs = Jobs(arguments.address)
    words = [job.file, *arguments.overrides, *(["--fresh"] if arguments.fresh else [])]
    with bundled(job, root) as folder:
        id_ = jobs.submit(run=job.name, command=job.command, script_args=words, folder=folder, python=arguments.python)
    where = shlex.join(["--address", jobs.address])
    lines = {
        "run": job.name,
        "job": id_,
        "follow": f"ftray jobs logs {id_} --follow {where}",
        "stop": f"ftray jobs stop {id_} {where}",
        "resume": "the same command again",
    }
    if arguments.json:
        print(show.as_json(lines), flush=True)
    else:
        print(show.pairs(lines), file=sys.stderr, flush=True)
    return 0 if arguments.no_wait else _followed(jobs, id_)


def list_(arguments: argparse.Namespace) -> int:
    from ftray.submit.client import Jobs

    found = Jobs(arguments.address).list_()
    if arguments.json:
        print(show.as_json(found))
        return 0
    rows = [[job["id"], job["run"], job["status"], show.when(job["started"]), show.when(job["ended"])] for job in found]
    print(show.columns(["job", "run", "status", "started", "ended"], rows) if rows else "No jobs.")
    return 0


def logs(arguments: argparse.Namespace) -> int:
    from ftray.submit.client import Jobs

    jobs = Jobs(arguments.address)
    job = jobs.find(arguments.name)
    if arguments.follow:
        return _followed(jobs, job)
    print(jobs.logs(job), end="")
    return 0


def stop(arguments: argparse.Namespace) -> int:
    from ftray.submit.client import OVER, Jobs

    jobs = Jobs(arguments.address)
    job = jobs.find(arguments.name)
    status = jobs.stop(job)
    print(f"{job}: {status}")
    return 0 if status in OVER else 1


def _followed(jobs: Jobs, job: str) -> int:
    ended: Ended = jobs.follow(job, lambda text: print(text, end="", flush=True))
    if ended.code:
        last = (ended.message.strip().splitlines() or [""])[0]
        print(f"ftray: job {job}: {ended.status}{f', {last}' if last else ''}", file=sys.stderr)
    return ended.code
