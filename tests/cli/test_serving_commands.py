"""`serve` and `chat` as they are typed: what would be served, keys, and which words are understood."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from ftray.cli import main, parser
from ftray.cli.serving import file_and_overrides
from ftray.config.load import load_serving
from ftray.config.schema import Model
from ftray.errors import ConfigError
from ftray.models.load import fingerprint
from ftray.store.paths import Storage
from ftray.store.registry import Registry

HASH = "ab" * 32


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """orders@v1, prod, and v2, for the packaged base; tea@v1 for another one."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "store"
    monkeypatch.setenv("FTRAY_STORAGE", str(root))
    ours = fingerprint(Model())
    for name, number, base in (("orders", 1, ours), ("orders", 2, ours), ("tea", 1, "sha256:other")):
        folder = tmp_path / f"{name}{number}"
        folder.mkdir()
        at = "base_model.model.model.layers.0.self_attn.q_proj"
        tensors = {f"{at}.lora_{side}.weight": np.ones(shape, np.float32) for side, shape in _SIDES.items()}
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 1, "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        card = {"base": "some/base", "base_fingerprint": base, "method": {"kind": "lora"}}
        Registry(Storage(str(root))).publish(name, folder, card, key=str(number))
    Registry(Storage(str(root))).promote("orders@v1")
    return root


_SIDES = {"A": (1, 4), "B": (4, 1)}


# what would be served


def test_a_check_says_what_would_be_served_and_starts_nothing(root, capsys):
    (root.parent / "serve.yaml").write_text(
        f"storage: {root}\nadapters: {{pin: [orders@prod]}}\nhttp: {{port: 8080}}\n"
        f"keys:\n  - {{name: alice, sha256: {HASH}}}\n"
    )
    assert main(["serve", "serve.yaml", "--check", "scale.replicas=[1, 3]"]) == 0
    shown = capsys.readouterr().out
    for words in (
        "base      builtin:tiny\n",
        "address   http://127.0.0.1:8080; playground at /\n",
        "keys      alice (infer)\n",
        "replicas  1 to 3, as load decides\n",
        "pin       orders@prod\n",
        "orders   2         v2      prod → v1  lora\n",
        "tea@v1 was trained on another base: some/base",
    ):
        assert words in shown, words
    assert "note" not in shown


def test_a_check_for_scripts(root, capsys):
    assert main(["serve", "--check", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is True
    assert told["address"] == "http://127.0.0.1:8000"
    assert told["serving"]["storage"] == str(root)  # $FTRAY_STORAGE, where no file names one
    assert [(one["name"], one["aliases"]) for one in told["adapters"]] == [
        ("orders", {"prod": {"1": 1.0}}),
        ("tea", {}),
    ]
    assert "no keys" in told["notes"][0]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("adapters.preload=[orders@v9]", "adapters.preload: there is no orders@v9"),
        ("adapters.pin=[order]", "adapters.pin: there is no adapter 'order'; did you mean 'orders'?"),
        ("adapters.pin=[tea]", "adapters.pin: tea@v1 was trained on another base"),
        ("model.base=/nowhere/at-all", "model.base: no folder '/nowhere/at-all'"),
        ("storage=nosuch://bucket/a", "storage: "),
    ],
)
def test_what_could_not_be_served_is_a_problem(root, override, said, capsys):
    assert main(["serve", "--check", override]) == 2
    assert f"problem  {said}" in capsys.readouterr().out


def test_an_adapter_without_a_version_is_worth_a_note(root, capsys):
    assert main(["serve", "--check", "adapters.serve=[orders, soon]"]) == 0
    assert "adapters.serve: soon has no version yet" in capsys.readouterr().out
    assert main(["serve", "--check", f"storage={root.parent / 'empty'}"]) == 0
    assert "no adapters under" in capsys.readouterr().out


def test_many_adapters_are_counted_instead_of_listed():
    from ftray.config.serving import Serving
    from ftray.serve.plan import Adapter, Plan

    adapters = tuple(Adapter(f"a{number}", (f"a{number}@v1",), {}, "lora") for number in range(50))
    lines = Plan(Serving(), adapters, (), ()).lines()
    assert len(lines) < 50
    assert lines[-1].startswith("… and 20 more")


def test_a_wrong_serve_file_tells_all_its_problems(root, capsys):
    Path("serve.yaml").write_text("adaptors: {}\nhttp: {port: many}\n")
    assert main(["serve", "serve.yaml", "--check"]) == 2
    told = capsys.readouterr().err
    assert "did you mean 'adapters'" in told
    assert "http.port" in told


def test_overrides_and_the_file_come_in_any_order(root):
    arguments = parser.parse(["serve", "--check", "serve.yaml", "http.port=1", "--json", "scale.replicas=2"])
    assert file_and_overrides(arguments.overrides) == ("serve.yaml", ["http.port=1", "scale.replicas=2"])
    assert file_and_overrides([]) == (None, [])
    Path("a=b.yaml").write_text("")
    assert file_and_overrides(["a=b.yaml"]) == ("a=b.yaml", [])
    with pytest.raises(ConfigError, match=r"one serve file at a time, not a\.yaml and b\.yaml"):
        file_and_overrides(["a.yaml", "b.yaml"])


# keys


def test_a_new_key_comes_with_its_entry_for_the_serve_file(capsys, tmp_path):
    assert main(["serve", "--new-key", "alice"]) == 0
    secret, _, rest = capsys.readouterr().out.partition("\n")
    entry = yaml.safe_load(rest.partition("For the serve file:")[2])
    assert entry == {
        "keys": [{"name": "alice", "sha256": hashlib.sha256(secret.encode()).hexdigest(), "scopes": ["infer"]}]
    }
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(entry))
    assert load_serving(tmp_path / "serve.yaml").keys[0].name == "alice"


def test_an_admins_key_may_move_adapters_too(capsys):
    assert main(["serve", "--new-key", "ops", "--admin", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["entry"]["scopes"] == ["infer", "admin"]
    assert told["entry"]["sha256"] == hashlib.sha256(told["key"].encode()).hexdigest()
    assert main(["serve", "--admin"]) == 2
    assert "goes with --new-key" in capsys.readouterr().err


# for a cluster


def test_a_config_for_a_cluster_holds_the_whole_serve_file(root, capsys):
    assert main(["serve", "http.port=8123", "--config-out", "config.yaml"]) == 0
    assert "no keys" in capsys.readouterr().err
    config = yaml.safe_load(Path("config.yaml").read_text())
    assert config["http_options"]["port"] == 8123
    [application] = config["applications"]
    assert application["args"] == load_serving(None, ["http.port=8123", f"storage={root}"]).model_dump(mode="json")
    assert main(["serve", "--config-out", "no/such/folder.yaml"]) == 2
    assert "cannot be written" in capsys.readouterr().err


# words


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["chat"], "missing name"),
        (["chat", "orders", "--temperature", "3"], "is not a number from 0 to 2"),
        (["chat", "orders", "--temperature", "warm"], "is not a number from 0 to 2"),
        (["chat", "orders", "--max-new-tokens", "0"], "is not a whole number from 1"),
        (["chat", "orders", "--mesage", "Hi"], "did you mean '--message'?"),
        (["serve", "--chek"], "did you mean '--check'?"),
    ],
)
def test_what_cannot_be_read_is_told_with_a_way_out(words, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        parser.parse(words)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["orders", "--json"], "say what to ask with -m"),
        (["base", "--compare"], "puts the base beside a version"),
        (["orders", "--url", "http://127.0.0.1:9", "model.dtype=bf16"], "a server has its own settings"),
        (["orders", "-m", "Hi", "modle.dtype=bf16"], "did you mean 'model'"),
        (["order", "-m", "Hi"], "did you mean 'orders'"),
        (["orders", "-m", "Hi"], "some/base"),  # the base that the card names is not here
    ],
)
def test_a_chat_that_cannot_be_is_told_before_anything_is_loaded(root, words, said, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["chat", *words]) == 2
    assert said in capsys.readouterr().err
