"""`runs` and `adapters` over a store as a training leaves it."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ftray.cli import main
from ftray.config.load import run_from
from ftray.store.paths import Storage
from ftray.store.runs import RunFolder


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    root = tmp_path / "store"
    monkeypatch.setenv("FTRAY_STORAGE", str(root))
    return root


def a_run(root: Path, name: str, **state) -> RunFolder:
    folder = RunFolder(Storage(str(root)), name)
    run = run_from({"name": name, "data": {"sources": "x"}}).model_dump(mode="json")
    folder.begin({"run": run, "settings": {"zero": 2, "lr": 1e-3}, "base": "sha"}, fresh=False)
    folder.append_metrics([{"kind": "train", "step": step, "loss": 3.0 - step} for step in (1, 2)])
    folder.set_state(**state)
    return folder


def test_runs_are_listed_with_their_state(root, capsys):
    assert main(["runs", "list"]) == 0
    assert (
        capsys.readouterr().out
        == f"No runs under {root}. `ftray train run.yaml` makes one; --storage names another root.\n"
    )

    a_run(root, "coffee", status="done", step=2, total_steps=2, version="coffee@v1")
    a_run(root, "tea", status="training", step=1, total_steps=9)
    assert main(["runs", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "status", "step", "version", "updated"]
    assert lines[1].split()[:4] == ["tea", "training,", "stopped", "1/9"]
    assert lines[2].split()[:4] == ["coffee", "done", "2/2", "coffee@v1"]

    assert main(["runs", "list", "--json"]) == 0
    assert [run["name"] for run in json.loads(capsys.readouterr().out)] == ["tea", "coffee"]


def test_a_run_is_shown_with_its_last_metrics_and_a_run_file_that_trains_it_again(root, capsys, tmp_path):
    folder = a_run(root, "coffee", status="failed", error="a NaN at step 2")
    with folder.lease():
        assert main(["runs", "show", "coffee"]) == 0
    shown = capsys.readouterr().out
    assert "a NaN at step 2" in shown
    assert "train: step 2  loss 1" in shown
    assert "driver   pid" in shown
    assert "  lr    0.001\n  zero  2\n" in shown
    assert shown.index("\nname: coffee\n") < shown.index("\nmodel:\n") < shown.index("\ndata:\n")
    resolved = tmp_path / "again.yaml"
    resolved.write_text(shown.partition("run file\n")[2])
    from ftray.config.load import load_run

    assert load_run(resolved).name == "coffee"

    assert main(["runs", "show", "coffee", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"][-1] == {"kind": "train", "step": 2, "loss": 1.0}


def test_an_unknown_run_is_told_its_near_name(root, capsys):
    a_run(root, "coffee", status="done")
    assert main(["runs", "show", "cofee"]) == 2
    assert "no run 'cofee'" in (shown := capsys.readouterr().err)
    assert "did you mean 'coffee'?" in shown


def publish(root: Path, folder: Path, *, passed: bool = True, publication: str = "run-1") -> str:
    """A rank-1 LoRA of one 4x4 layer, as a run publishes it."""
    import numpy as np
    from safetensors.numpy import save_file

    from ftray.store.registry import Registry

    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "builtin:tiny"}))
    at = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{at}.lora_A.weight": np.ones((1, 4), np.float32), f"{at}.lora_B.weight": np.ones((4, 1), np.float32)}
    save_file(tensors, folder / "adapter_model.safetensors")
    card = {"base": "builtin:tiny", "method": {"kind": "lora", "rank": 1}, "servability": "adapter"}
    gate = {"passed": passed, "rules": [{"rule": "loss < base", "passed": passed}]}
    return Registry(Storage(str(root))).publish("coffee", folder, {**card, "gate": gate}, publication).id


def test_adapters_are_listed_shown_promoted_and_rolled_back(root, tmp_path, capsys):
    assert main(["adapters", "list"]) == 0
    assert "No adapters under" in capsys.readouterr().out
    for number in ("1", "2"):
        publish(root, tmp_path / number, publication=number)
        assert main(["adapters", "promote", "coffee"]) == 0
        assert capsys.readouterr().out == f"coffee@prod is now coffee@v{number}\n"

    assert main(["adapters", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["version", "alias", "method", "base", "gate", "created"]
    assert lines[1].split()[:5] == ["coffee@v1", "–", "lora", "builtin:tiny", "passed"]
    assert lines[2].split()[:5] == ["coffee@v2", "prod", "lora", "builtin:tiny", "passed"]
    assert main(["adapters", "list", "--json"]) == 0
    assert [row["aliases"] for row in json.loads(capsys.readouterr().out)] == [{}, {"prod": 1.0}]

    assert main(["adapters", "rollback", "coffee"]) == 0
    assert capsys.readouterr().out == "coffee@prod is back at coffee@v1\n"
    assert main(["adapters", "show", "coffee"]) == 0
    shown = capsys.readouterr().out
    assert "coffee@v1" in shown.splitlines()[0]
    assert "rank: 1" in shown
    assert main(["adapters", "show", "coffee@v2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["card"]["servability"] == "adapter"

    assert main(["adapters", "unalias", "coffee", "--alias", "prod"]) == 0
    assert capsys.readouterr().out == "coffee@prod is gone; it was coffee@v1\n"
    assert main(["adapters", "unalias", "coffee", "--alias", "prod"]) == 2


def test_a_version_that_failed_its_gate_is_promoted_only_by_force(root, tmp_path, capsys):
    publish(root, tmp_path / "a", passed=False)
    assert main(["adapters", "promote", "coffee@v1"]) == 2
    assert "coffee@v1 did not pass its gate: loss < base" in capsys.readouterr().err
    assert main(["adapters", "promote", "coffee@v1", "--force"]) == 0


def test_deleting_asks_and_is_refused_while_an_alias_points_there(root, tmp_path, capsys):
    publish(root, tmp_path / "a")
    main(["adapters", "promote", "coffee@v1", "--alias", "canary"])
    assert main(["adapters", "delete", "coffee@v1"]) == 2  # no terminal to ask at
    assert "say --yes" in capsys.readouterr().err
    assert main(["adapters", "delete", "coffee@v1", "--yes"]) == 2
    assert "coffee@v1 is coffee@canary" in capsys.readouterr().err
    main(["adapters", "unalias", "coffee", "--alias", "canary"])
    assert main(["adapters", "delete", "coffee@v1", "--yes"]) == 0
    assert main(["adapters", "show", "coffee"]) == 2


@pytest.fixture
def asked(root, tmp_path):
    """`ftray adapters delete coffee@v1` at a terminal, waiting for its answer, and the terminal's other end."""
    publish(root, tmp_path / "a")
    ours, theirs = pty.openpty()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background, by children too
    command = [sys.executable, "-m", "ftray.cli", "adapters", "delete", "coffee@v1"]
    child = subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert child.stdout
    assert child.stdout.read(len("Delete coffee@v1")) == "Delete coffee@v1"
    yield child, ours
    child.kill()
    child.wait()
    for end in (ours, theirs):
        os.close(end)


def test_at_a_terminal_deleting_asks_and_takes_no_for_an_answer(asked, root):
    child, terminal = asked
    os.write(terminal, b"n\n")
    shown, _ = child.communicate(timeout=30)
    assert (child.returncode, "Nothing deleted." in shown) == (0, True)
    assert (root / "adapters/coffee/v1/COMPLETE.json").exists()


def test_ctrl_c_ends_with_130_and_no_traceback(asked):
    child, _ = asked
    while child.poll() is None:  # a signal just before the read starts is noticed only by the next one
        child.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(2)
    shown, _ = child.communicate()
    assert (child.returncode, shown.splitlines()[-1]) == (130, "ftray: interrupted")


@pytest.mark.parametrize("command", ["show", "promote", "delete --yes", "merge --out x", "export --out x"])
def test_an_unknown_adapter_is_an_error_with_a_way_out(root, command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    verb, *rest = command.split()
    assert main(["adapters", verb, "tea@v1", *rest]) == 2
    assert "tea" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_root_that_cannot_be_read_is_an_error(capsys):
    assert main(["adapters", "list", "--storage", "nosuch://bucket/a"]) == 2
    assert "nosuch" in capsys.readouterr().err
