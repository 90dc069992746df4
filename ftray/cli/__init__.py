"""The command line. Importing it costs argparse; each command imports what it needs when it runs."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

from ftray.cli import parser
from ftray.errors import FtrayError, Stopped

DEBUG = "FTRAY_DEBUG"  # set to 1: a fixable error shows its traceback too


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    0 done, 2 what the user can fix, 75 what was lost and may go through when tried again, 130 interrupted, 143 stopped.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a '–' must not end a run on a terminal that cannot show it
    arguments = parser.parse(sys.argv[1:] if argv is None else argv)
    try:
        code = arguments.command(arguments)
        sys.stdout.flush()  # so that a closed pipe is seen here and not at exit
        return int(code)
    except FtrayError as error:
        if os.environ.get(DEBUG) == "1" and not isinstance(error, Stopped):
            raise
        print(f"ftray: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        way_on = "; run the same command again to resume" if arguments.resumes else ""
        print(f"\nftray: interrupted{way_on}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe left (`ftray runs list | head`); Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
