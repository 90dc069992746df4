"""The commands for a cluster elsewhere, with their options."""

from __future__ import annotations

import argparse

from ftray.cli import checkup, jobs
from ftray.cli.options import add_command, add_group, address, as_json, fresh, run_file


def add(commands: argparse._SubParsersAction) -> None:
    _submit(commands)
    _jobs(commands)
    _doctor(commands)


def _submit(commands: argparse._SubParsersAction) -> None:
    command = add_command(
        commands,
        "submit",
        jobs.submit,
        "run a file on a cluster elsewhere, and follow it",
        "ftray submit run.yaml --address http://localhost:8265\n"
        "ftray submit run.yaml storage=s3://models/ftray optim.lr=2e-4\n"
        "ftray submit run.yaml --as evaluate\n"
        "ftray submit sweep.yaml --no-wait",
        "Uploads this ftray, the file, and data it names by relative paths; absolute ones and URIs are the cluster's.\n"
        "The exit code is the job's own. Ctrl-C stops following, not the job. The same command resumes a run.",
    )
    run_file(command)
    address(command)
    command.add_argument(
        "--as",
        dest="run_command",
        choices=("train", "sweep", "evaluate", "serve", "doctor"),
        help="what to do with the file (default: what kind of file it is says)",
    )
    fresh(command)
    command.add_argument("--no-wait", action="store_true", help="return once it is submitted")
    command.add_argument("--python", default="python", help="the Python of the cluster's nodes (default: python)")
    as_json(command)


def _jobs(commands: argparse._SubParsersAction) -> None:
    group = add_group(commands, "jobs", "what was submitted to a cluster")
    command = add_command(group, "list", jobs.list_, "every job of the cluster, newest first", "ftray jobs list")
    address(command)
    as_json(command)
    command = add_command(
        group,
        "logs",
        jobs.logs,
        "what a job printed",
        "ftray jobs logs coffee-bot\nftray jobs logs coffee-bot --follow",
    )
    command.add_argument("name", help="a job, or a run: its newest job")
    command.add_argument("--follow", action="store_true", help="until it is over; the exit code is the job's own")
    address(command)
    command = add_command(
        group, "stop", jobs.stop, "stop a job; its run resumes when submitted again", "ftray jobs stop coffee-bot"
    )
    command.add_argument("name", help="a job, or a run: its newest job")
    address(command)


def _doctor(commands: argparse._SubParsersAction) -> None:
    command = add_command(
        commands,
        "doctor",
        checkup.doctor,
        "look for what is wrong with a cluster, and say what to do",
        "ftray doctor\nftray doctor run.yaml\nftray submit run.yaml --as doctor --address http://localhost:8265",
        "Asks this machine and every node: versions, disk, shared memory, clocks, GPUs, token, and for an all-reduce;\n"
        "with a run file also its storage and model. Holds no CPU and no GPU. The exit code is 2 after a fault.",
    )
    command.add_argument(
        "overrides", nargs="*", default=[], metavar="[run.yaml] key=value", help="the run file; dotted overrides"
    )
    command.add_argument("--ray", metavar="ADDRESS", help="the cluster, host:port (default: the one around us)")
    as_json(command)
