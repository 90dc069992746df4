"""`serve` and `chat`: the commands that answer."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ftray.cli import show
from ftray.errors import ConfigError

STORAGE = "FTRAY_STORAGE"  # the registry's root where no serve file names one

if TYPE_CHECKING:
    from ftray.config.serving import Serving
    from ftray.serve.chat import Settings
    from ftray.serve.speaker import Answer, Speaker


def serve(arguments: argparse.Namespace) -> int:
    from ftray.config.load import load_serving

    if arguments.new_key is not None:
        return _new_key(arguments.new_key, admin=arguments.admin, as_json=arguments.json)
    if arguments.admin:
        raise ConfigError("ftray serve", [("--admin", "says what a new key may do; it goes with --new-key NAME")])
    file, overrides = file_and_overrides(arguments.overrides)
    if file is None and STORAGE in os.environ:
        overrides.insert(0, f"storage={os.environ[STORAGE]}")
    serving = load_serving(file, overrides)
    if arguments.config_out:
        return _write_config(serving, arguments.config_out)
    from ftray.serve.plan import plan

    planned = plan(serving)
    print(show.as_json(planned.to_json()) if arguments.json else "\n".join(planned.lines()), flush=True)
    if arguments.check:
        return 0 if planned.ok else 2
    from ftray.serve.deploy import serve as run

    return run(serving)


def chat(arguments: argparse.Namespace) -> int:
    from ftray.serve.chat import Settings
    from ftray.serve.speaker import BASE

    if arguments.json and arguments.message is None:
        raise ConfigError("ftray chat", [("--json", "is for scripts; say what to ask with -m TEXT")])
    if arguments.compare and arguments.name == BASE:
        raise ConfigError("ftray chat", [("--compare", "puts the base beside a version; name one, e.g. coffee-bot")])
    settings = Settings(arguments.system, arguments.temperature, arguments.max_new_tokens, arguments.seed)
    with _errors_only(), asyncio.Runner() as runner:
        speaker = _speaker(runner, arguments)
        try:
            return _talk(runner, speaker, settings, arguments)
        finally:
            runner.run(speaker.close())


@contextlib.contextmanager
def _errors_only() -> Iterator[None]:
    """What goes wrong in a chat is told where the answer would be."""
    logger = logging.getLogger("ftray")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def file_and_overrides(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """`serve.yaml a.b=c …` with the file left out or not. ConfigError for two files."""
    overrides = [word for word in words if "=" in word and not Path(word).is_file()]
    files = [word for word in words if word not in overrides]
    if len(files) > 1:
        problem = f"one serve file at a time, not {' and '.join(files)}; overrides are written key=value"
        raise ConfigError("ftray serve", [("", problem)])
    return (files[0] if files else None), overrides


def _new_key(name: str, *, admin: bool, as_json: bool) -> int:
    from ftray.config.document import dump
    from ftray.serve.keys import make_key

    secret, key = make_key(name, ["infer", "admin"] if admin else ["infer"])
    entry = key.model_dump(mode="json")
    if as_json:
        print(show.as_json({"key": secret, "entry": entry}))
    else:
        print(f"{secret}\n\nThe key of {name}: it is not kept anywhere, so keep it. For the serve file:\n")
        print(dump({"keys": [entry]}), end="")
    return 0


def _write_config(serving: Serving, out: str) -> int:
    from ftray.config.document import dump
    from ftray.serve.deploy import serve_config

    text = dump(serve_config(serving))
    if not serving.keys:
        print("note: no keys: whoever reaches the cluster's port may ask, promote and load", file=sys.stderr)
    if out == "-":
        print(text, end="")
        return 0
    try:
        Path(out).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            out, [("", f"cannot be written: {error.strerror}; choose another with --config-out")]
        ) from None
    print(f"{out} written: `serve deploy {out}` starts it on a cluster; KubeRay's RayService takes it as serveConfigV2")
    return 0


def _speaker(runner: asyncio.Runner, arguments: argparse.Namespace) -> Speaker:
    """A server where --url names one, else an engine in this process."""
    if arguments.url:
        from ftray.serve.client import KEY, Client

        if arguments.overrides:
            problem = f"a server has its own settings; {' '.join(arguments.overrides)} is for an engine in this process"
            raise ConfigError("ftray chat --url", [("", problem)])
        return Client(arguments.url, arguments.key or os.environ.get(KEY))
    # A chat has the machine to itself; a server's replica takes what Ray reserves for it.
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    from ftray.serve.inprocess import serving_for, start

    serving = serving_for(arguments.name, storage=arguments.storage, overrides=arguments.overrides)
    if sys.stderr.isatty():
        print(f"loading {serving.model.base} …", file=sys.stderr)
    return runner.run(start(serving))


def _talk(runner: asyncio.Runner, speaker: Speaker, settings: Settings, arguments: argparse.Namespace) -> int:
    from ftray.serve.chat import Chat, ask
    from ftray.serve.speaker import BASE

    if arguments.message is None:
        return Chat(runner, speaker, arguments.name, settings, compare=arguments.compare).run()
    message = sys.stdin.read() if arguments.message == "-" else arguments.message
    models = [arguments.name, BASE] if arguments.compare else [arguments.name]
    answers = runner.run(ask(speaker, settings, models, message))
    if arguments.json:
        told = [answer.to_json() for answer in answers]
        print(show.as_json(told if arguments.compare else told[0]))
    else:
        print("\n\n".join(_plain(answer, named=arguments.compare) for answer in answers))
    return 0


def _plain(answer: Answer, *, named: bool) -> str:
    from ftray.serve.screen import printable

    text = printable(answer.text) if sys.stdout.isatty() else answer.text
    return f"{answer.model} ({answer.version}):\n{text}" if named else text
