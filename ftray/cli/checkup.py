"""`doctor`: what is wrong with a cluster."""

from __future__ import annotations

import argparse

from ftray.cli import show


def doctor(arguments: argparse.Namespace) -> int:
    from ftray.cli.serving import file_and_overrides
    from ftray.config.load import load_runs
    from ftray.doctor.visit import visit

    file, overrides = file_and_overrides(arguments.overrides)
    findings = visit(arguments.ray, load_runs(file, overrides)[0] if file else None)
    print(show.as_json(findings) if arguments.json else "\n".join(one.line() for one in findings))
    return 2 if any(one.level == "fault" for one in findings) else 0
