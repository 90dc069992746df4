"""The command line as a user meets it: help, wrong input, `init`. No command here starts Ray."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ftray.cli import main, parser
from ftray.config.load import load_run

GROUPS = {
    "runs": ("list", "show"),
    "adapters": ("list", "show", "promote", "rollback", "unalias", "merge", "export", "delete"),
}
COMMANDS = [
    ["init"],
    ["check"],
    ["train"],
    ["evaluate"],
    *([group, name] for group in GROUPS for name in GROUPS[group]),
]


def exit_of(*argv: str) -> int:
    """`main`'s code, whether it returns or exits from the parser."""
    try:
        return main(argv)
    except SystemExit as done:
        return int(done.code or 0)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_an_example_that_parses(command, capsys):
    assert exit_of(*command, "--help") == 0
    shown = capsys.readouterr().out
    examples = shown.partition("examples:\n")[2].splitlines()
    assert examples
    for example in examples:
        words = example.strip().removeprefix("ftray ").replace("'", "").split()
        assert parser.parse(words).command


def imported(*argv: str, code: int) -> set[str]:
    """Top-level packages that `ftray argv` imports."""
    command = [sys.executable, "-X", "importtime", "-m", "ftray.cli", *argv]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


def test_help_and_a_config_error_import_nothing_heavy(tmp_path):
    (tmp_path / "run.yaml").write_text("name: a\ndata: {sources: x}\nmethod: {kind: lora, rnak: 1}\n")
    heavy = {"torch", "ray", "transformers", "peft", "deepspeed", "datasets", "numpy", "pandas"}
    assert "ftray" in imported("--help", code=0)
    assert not imported("--help", code=0) & heavy
    assert not imported("train", str(tmp_path / "run.yaml"), code=2) & heavy


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "there is no 'trian'; did you mean 'train'?"),
        (["adapters", "rollbakc", "x"], "did you mean 'rollback'?"),
        (["train"], "missing file"),
        (["train", "run.yaml", "--frsh"], "unknown argument --frsh; did you mean '--fresh'?"),
        (["runs", "list", "surplus"], "unknown argument surplus"),
        (["init", "--method", "qlor"], "did you mean 'qlora'?"),
        (["adapters", "merge", "a"], "missing --out"),
    ],
)
def test_wrong_words_get_the_right_ones_and_code_2(argv, message, capsys):
    assert exit_of(*argv) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["runs"], ["adapters"]])
def test_no_command_shows_the_help(argv, capsys):
    assert exit_of(*argv) == 2
    assert "commands:" in capsys.readouterr().err


def test_overrides_may_stand_after_options():
    arguments = parser.parse(["train", "run.yaml", "optim.lr=1", "--fresh", "scale.workers=2", "--json", "seed=3"])
    assert (arguments.file, arguments.fresh, arguments.json) == ("run.yaml", True, True)
    assert arguments.overrides == ["optim.lr=1", "scale.workers=2", "seed=3"]


@pytest.mark.parametrize("command", ["check", "train", "evaluate"])
def test_a_wrong_run_file_ends_with_2_and_one_message_without_a_traceback(command, tmp_path, capsys):
    run = tmp_path / "run.yaml"
    run.write_text("name: a\ndata: {sources: x}\nmethod: {kind: lora, rnak: 1}\n")
    assert main([command, str(run), "optim.lrr=1"]) == 2
    assert capsys.readouterr().err == (
        f"ftray: {run}: 2 problems\n"
        "  method.rnak: unknown key; did you mean 'rank'? (line 3)\n"
        "  optim.lrr: unknown key; did you mean 'lr'? (on the command line)\n"
    )


def test_debug_shows_where_an_error_was_raised(monkeypatch):
    monkeypatch.setenv("FTRAY_DEBUG", "1")
    with pytest.raises(Exception, match="no such file"):
        main(["train", "nowhere.yaml"])


def test_init_writes_a_file_that_loads_and_never_overwrites_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "My Orders.jsonl").touch()
    assert main(["init", "--data", "My Orders.jsonl", "--data", "more.csv", "--method", "qlora"]) == 0
    shown = capsys.readouterr().out
    assert "run.yaml written. Next: `ftray check run.yaml`" in shown
    assert "Not there yet: more.csv" in shown
    run = load_run("run.yaml")
    assert (run.name, len(run.data.sources), run.method.bits) == ("my-orders", 2, 4)

    before = (tmp_path / "run.yaml").read_bytes()
    assert main(["init", "--data", "b.jsonl"]) == 2
    assert "overwrite it with --force" in capsys.readouterr().err
    assert (tmp_path / "run.yaml").read_bytes() == before
    assert main(["init", "--data", "b.jsonl", "--force"]) == 0
    assert load_run("run.yaml").name == "b"


def test_init_refuses_a_name_the_registry_would_not_take(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "--name", "Coffee Bot"]) == 2
    assert "is not a name" in capsys.readouterr().err
    assert not os.listdir(tmp_path)


def test_a_terminal_without_unicode_gets_a_substitute(tmp_path):
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    argv = [sys.executable, "-m", "ftray.cli", "init", "--out", "-"]
    done = subprocess.run(argv, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert "full ? freeze ? lora" in done.stdout


def test_a_closed_pipe_is_no_error(tmp_path):
    command = f"{sys.executable} -m ftray.cli init --out - | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
