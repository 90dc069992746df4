"""What can be typed: every command with its options, help and examples."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from ftray import __version__
from ftray.cli import adapters, elsewhere, runs, serving, sweeping, training
from ftray.cli.options import Parser, add_command, add_group, as_json, did_you_mean, fresh, number, run_file, storage
from ftray.config.starters import STARTERS

_OVERRIDES = """\
Any key of the run file can be set for one run with a dotted override:
  optim.lr=2e-4   data.sources.0.weight=2   'method={kind: full}'   scale.workers=4"""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command (`.command`, a function of these arguments) with its options. Exits with 2 on what it cannot read."""
    parser = build()
    arguments, rest = parser.parse_known_args(argv)
    if not hasattr(arguments, "command"):
        arguments.help_of.print_help(sys.stderr)
        raise SystemExit(2)
    # argparse fills `overrides` once, so those that follow an option are left over.
    unknown = [word for word in rest if word.startswith("-") or not hasattr(arguments, "overrides")]
    if unknown:
        known = [option for action in arguments.help_of._actions for option in action.option_strings]
        hint = did_you_mean(unknown[0].partition("=")[0], known)
        arguments.help_of.error(f"unknown argument {unknown[0]}{'; ' + hint if hint else ''}")
    if rest:
        arguments.overrides += rest
    return arguments


def build() -> Parser:
    parser = Parser(
        prog="ftray",
        description="Tune language models on Ray: from a run file to a tuned, evaluated, registered adapter.",
        epilog="Start with `ftray init --data rows.jsonl`, then `ftray check run.yaml`, then `ftray train run.yaml`.\n"
        "Exit codes: 0 done, 1 a fault of ours, 2 something you can fix, 75 workers lost too often, 130 interrupted,\n"
        "143 stopped with a checkpoint left. FTRAY_DEBUG=1 shows the traceback of every error.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"ftray {__version__}")
    parser.set_defaults(help_of=parser, resumes=False)
    commands = parser.add_subparsers(title="commands", metavar="<command>", parser_class=Parser)
    _init(commands)
    _check(commands)
    _train(commands)
    _sweep(commands)
    _evaluate(commands)
    _runs(commands)
    _adapters(commands)
    _serve(commands)
    _chat(commands)
    elsewhere.add(commands)
    return parser


def _init(commands: argparse._SubParsersAction) -> None:
    command = add_command(
        commands,
        "init",
        training.init,
        "write a commented run file",
        "ftray init --data orders.jsonl\n"
        "ftray init --method qlora --base Qwen/Qwen3-4B --data a.jsonl --data b.csv --out mixture.yaml",
    )
    command.add_argument(
        "--method",
        choices=STARTERS,
        default="lora",
        metavar="METHOD",
        help=f"how the weights adapt, or an objective to begin with (default: lora): {', '.join(STARTERS)}",
    )
    command.add_argument("--data", action="append", metavar="PATH", help="training rows; again for a mixture")
    command.add_argument("--name", help="name in the registry (default: from the data file)")
    command.add_argument("--base", default="builtin:tiny", help="Hub id or folder of the base (default: builtin:tiny)")
    command.add_argument(
        "--out", default="run.yaml", metavar="FILE", help="where (default: run.yaml; - is the terminal)"
    )
    command.add_argument("--force", action="store_true", help="overwrite the file")


def _check(commands: argparse._SubParsersAction) -> None:
    command = add_command(
        commands,
        "check",
        training.check,
        "read the data and plan the run before any GPU is held",
        "ftray check run.yaml\nftray check run.yaml scale.zero=3 --json",
        f"Prints the data report, an example with its trained tokens marked, and whether the run fits.\n\n{_OVERRIDES}",
    )
    run_file(command)
    as_json(command)


def _train(commands: argparse._SubParsersAction) -> None:
    command = add_command(
        commands,
        "train",
        training.train,
        "train, evaluate and register; again after a crash: resume",
        "ftray train run.yaml\nftray train run.yaml optim.lr=2e-4 name=coffee-fast\nftray train run.yaml --fresh",
        f"The same command after a crash of anything resumes from the newest complete checkpoint.\n\n{_OVERRIDES}",
    )
    command.set_defaults(resumes=True)
    run_file(command)
    fresh(command)
    as_json(command)


def _sweep(commands: argparse._SubParsersAction) -> None:
    command = add_command(
        commands,
        "sweep",
        sweeping.sweep,
        "try values of any keys of a run, and register the best",
        "ftray sweep sweep.yaml --check\n"
        "ftray sweep sweep.yaml trials=30 budget.hours=2\n"
        "ftray sweep sweep.yaml --fresh",
        "The same command after a crash of anything goes on: trials that ended are kept, the others resume.\n\n"
        "Any key of the sweep file can be set with a dotted override: trials=30   'search={kind: tpe}'",
    )
    command.set_defaults(resumes=True)
    run_file(command, "the sweep file")
    command.add_argument("--check", action="store_true", help="say what it would take, and start nothing")
    command.add_argument("--fresh", action="store_true", help="start over: delete what an earlier start left")
    as_json(command)


def _evaluate(commands: argparse._SubParsersAction) -> None:
    command = add_command(
        commands,
        "evaluate",
        training.evaluate,
        "base against tuned on held-out rows, forgetting included",
        "ftray evaluate run.yaml\nftray evaluate run.yaml --ref coffee-bot@v3 evaluate.generate_rows=500",
        _OVERRIDES,
    )
    run_file(command)
    command.add_argument(
        "--ref", help="a version or alias, e.g. coffee-bot@v3 (default: the run's name: its @prod, or else its newest)"
    )
    as_json(command)


def _runs(commands: argparse._SubParsersAction) -> None:
    group = add_group(commands, "runs", "what was trained, and how far it got")
    command = add_command(group, "list", runs.list_, "every run under the storage root", "ftray runs list")
    storage(command)
    as_json(command)
    command = add_command(
        group,
        "show",
        runs.show,
        "one run: its state, last metrics, settings and run file",
        "ftray runs show coffee-bot",
    )
    command.add_argument("name")
    storage(command)
    as_json(command)


def _adapters(commands: argparse._SubParsersAction) -> None:
    group = add_group(commands, "adapters", "the registry: versions and the aliases that point at them")

    def add(name: str, function: Callable, about: str, examples: str, subject: str | None, what: str = "") -> Parser:
        command = add_command(group, name, function, about, examples)
        if subject:
            command.add_argument(subject, help=what)
        storage(command)
        return command

    ref = "a version or alias: coffee-bot@v3, coffee-bot@prod; the bare name is @prod, or else the newest"
    version = "a version by its number: coffee-bot@v3"
    base = "the base, where it now lies elsewhere (default: as the card names it)"
    as_json(add("list", adapters.list_, "every adapter, its versions and aliases", "ftray adapters list", None))
    as_json(add("show", adapters.show, "a version's card", "ftray adapters show coffee-bot@v3", "ref", ref))

    command = add(
        "promote",
        adapters.promote,
        "point an alias at a version",
        "ftray adapters promote coffee-bot@v3\nftray adapters promote coffee-bot@v4 --alias canary",
        "ref",
        "a version: coffee-bot@v3; the bare name is its newest",
    )
    command.add_argument("--alias", default="prod", help="default: prod")
    command.add_argument("--force", action="store_true", help="although the version failed its gate")

    command = add(
        "rollback",
        adapters.rollback,
        "point an alias back at what it pointed at before",
        "ftray adapters rollback coffee-bot",
        "name",
        "the adapter's name",
    )
    command.add_argument("--alias", default="prod", help="default: prod")

    command = add(
        "unalias",
        adapters.unalias,
        "remove an alias; the versions stay",
        "ftray adapters unalias coffee-bot --alias canary",
        "name",
        "the adapter's name",
    )
    command.add_argument("--alias", required=True, help="the alias")

    command = add(
        "merge",
        adapters.merge,
        "merge a version into its base: a plain model folder",
        "ftray adapters merge coffee-bot@v3 --out ./coffee-model",
        "ref",
        ref,
    )
    command.add_argument("--out", required=True, metavar="FOLDER", help="new folder for the model")
    command.add_argument("--base", help=base)
    command.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the base")
    command.add_argument(
        "--dtype", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="default: the base's own"
    )

    command = add(
        "export",
        adapters.export,
        "copy a version as a plain PEFT or Hugging Face folder",
        "ftray adapters export coffee-bot@prod --out ./coffee-adapter",
        "ref",
        ref,
    )
    command.add_argument("--out", required=True, metavar="FOLDER", help="new folder")
    command.add_argument("--base", help=base)
    command.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the base")

    command = add(
        "delete",
        adapters.delete,
        "delete a version for good; its number is never used again",
        "ftray adapters delete coffee-bot@v1 --yes",
        "ref",
        version,
    )
    command.add_argument("--yes", action="store_true", help="do not ask")


def _serve(commands: argparse._SubParsersAction) -> None:
    command = add_command(
        commands,
        "serve",
        serving.serve,
        "answer over HTTP: a base and its adapters, swapped while it runs",
        "ftray serve\n"
        "ftray serve serve.yaml http.port=8080 'adapters.preload=[coffee-bot]'\n"
        "ftray serve serve.yaml --check\n"
        "ftray serve --new-key alice\n"
        "ftray serve serve.yaml --config-out rayservice.yaml",
        "OpenAI's API for the base and every adapter under the storage root, with a page for trying them at /.\n"
        "Ctrl-C or SIGTERM ends it once the requests in flight are answered.\n\n"
        "Any key of the serve file can be set with a dotted override: http.port=8080   scale.replicas=2",
    )
    command.add_argument(
        "overrides", nargs="*", default=[], metavar="[serve.yaml] key=value", help="the serve file; dotted overrides"
    )
    command.add_argument("--check", action="store_true", help="say what would be served, and start nothing")
    command.add_argument("--new-key", metavar="NAME", help="make a key, and print its entry for the serve file")
    command.add_argument("--admin", action="store_true", help="with --new-key: it may also promote, load and unload")
    command.add_argument("--config-out", metavar="FILE", help="write a Ray Serve config instead (- is the terminal)")
    as_json(command)


def _chat(commands: argparse._SubParsersAction) -> None:
    command = add_command(
        commands,
        "chat",
        serving.chat,
        "talk to a version in the terminal, alone or beside the base",
        "ftray chat coffee-bot\n"
        "ftray chat coffee-bot@v2 --compare\n"
        "ftray chat coffee-bot --url http://127.0.0.1:8000\n"
        "ftray chat coffee-bot -m 'Two lattes, please' --json\n"
        "ftray chat Qwen/Qwen3-0.6B",
        "Without --url the base that the version's card names is loaded in this process. Keys of the serve file can\n"
        "be set for it: model.dtype=bf16   engine.kind=bank   model.base=/data/moved-base",
    )
    command.add_argument("name", help="coffee-bot, coffee-bot@v2, coffee-bot@canary, base, or a model of its own")
    command.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="not with --url")
    command.add_argument("--compare", action="store_true", help="the base's answer beside it")
    command.add_argument("--url", help="a running server, e.g. http://127.0.0.1:8000")
    command.add_argument("--key", help="its API key (default: $FTRAY_API_KEY, which `ps` does not show)")
    command.add_argument("-m", "--message", metavar="TEXT", help="ask this, print the answer alone, and end (-: stdin)")
    command.add_argument("--system", metavar="TEXT", help="system prompt")
    command.add_argument(
        "--temperature", type=number(0, 2), default=0.0, help="0: the likeliest answer (default); 1: the model's own"
    )
    command.add_argument("--max-new-tokens", type=number(1, whole=True), metavar="N", help="longest answer")
    command.add_argument("--seed", type=int, help="the same answer again")
    storage(command)
    as_json(command)
