"""How commands and the options that several of them have are added to the command line."""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Callable, Sequence
from typing import NoReturn

from ftray.cli.serving import STORAGE


class Parser(argparse.ArgumentParser):
    """argparse with a did-you-mean, and the command's own help named in its errors."""

    def error(self, message: str) -> NoReturn:
        choice = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if choice:
            known = re.findall(r"[\w-]+", choice[2])
            message = (
                f"there is no {choice[1]!r}; {did_you_mean(choice[1], known) or 'choose from ' + ', '.join(known)}"
            )
        required = re.fullmatch(r"the following arguments are required: (.*)", message)
        if required:
            message = f"missing {required[1]}"
        self.exit(2, f"ftray: {message}\nSee `{self.prog} --help`.\n")


def add_command(
    commands: argparse._SubParsersAction, name: str, function: Callable, about: str, examples: str, more: str = ""
) -> Parser:
    lines = "\n".join(f"  {line}" for line in examples.splitlines())
    command = commands.add_parser(
        name,
        help=about,
        description=f"{about[0].upper()}{about[1:]}." + (f"\n{more}" if more else ""),
        epilog=f"examples:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.set_defaults(command=function, help_of=command)
    return command


def add_group(commands: argparse._SubParsersAction, name: str, about: str) -> argparse._SubParsersAction:
    group = commands.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.", allow_abbrev=False)
    group.set_defaults(help_of=group)
    return group.add_subparsers(title="commands", metavar="<command>", parser_class=Parser)


def run_file(command: Parser, about: str = "the run file") -> None:
    command.add_argument("file", help=about)
    command.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="dotted overrides")


def storage(command: Parser) -> None:
    where = os.environ.get(STORAGE, "./ftray-store")
    command.add_argument(
        "--storage", default=where, metavar="ROOT", help=f"folder or URI (default: ${STORAGE} or ./ftray-store)"
    )


def fresh(command: Parser) -> None:
    command.add_argument(
        "--fresh", action="store_true", help="start over: delete what an earlier run of this name left"
    )


def as_json(command: Parser) -> None:
    command.add_argument("--json", action="store_true", help="print JSON for scripts")


def number(low: float, high: float = float("inf"), *, whole: bool = False) -> Callable[[str], float]:
    """A number in a range, for argparse."""

    def read(text: str) -> float:
        try:
            value = int(text) if whole else float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            between = f"from {low}" if high == float("inf") else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if whole else ''}number {between}")
        return value

    return read


def did_you_mean(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else ""


def address(command: Parser) -> None:
    command.add_argument(
        "--address", metavar="URL", help="the cluster's dashboard, http://HOST:8265 (default: $RAY_API_SERVER_ADDRESS)"
    )
