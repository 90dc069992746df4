"""Versions, aliases, holds and deletions."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from store_drills import save_adapter

from ftray.errors import RegistryError
from ftray.store.paths import MARKER, Storage
from ftray.store.registry import Registry


@pytest.fixture
def registry(storage: Storage) -> Registry:
    return Registry(storage)


@pytest.fixture
def bot(registry: Registry, tmp_path: Path) -> Registry:
    """A registry with bot@v1, v2 and v3; v3 failed its gate."""
    for number in (1, 2, 3):
        gate = {"passed": number < 3, "rules": [{"rule": "loss < base", "value": 2.5, "passed": number < 3}]}
        registry.publish("bot", save_adapter(tmp_path / f"v{number}", number), {"gate": gate}, key=f"run-{number}")
    return registry


def test_a_version_is_what_was_published(registry: Registry, tmp_path: Path):
    folder = save_adapter(tmp_path / "out")
    version = registry.publish("bot", folder, {"base": "builtin:tiny", "servability": "adapter"}, key="run-1")
    assert (version.id, version.number, version.key) == ("bot@v1", 1, "adapters/bot/v1")
    assert version.card["servability"] == "adapter"
    assert version.card["publication"] == "run-1"
    assert version.card["digest"] == version.digest
    assert version.created.endswith("+00:00")
    fetched = registry.fetch(version, tmp_path / "cache")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (fetched / name).read_bytes() == (folder / name).read_bytes()
    assert registry.versions("bot") == [version]
    assert registry.names() == ["bot"]


def test_equal_files_have_equal_digests_and_other_files_others(registry: Registry, tmp_path: Path):
    one, same, other = (
        registry.publish("bot", save_adapter(tmp_path / name, value), {}, key=name)
        for name, value in (("a", 1.0), ("b", 1.0), ("c", 2.0))
    )
    assert one.digest == same.digest != other.digest


def test_publishing_the_same_again_returns_what_is_there(registry: Registry, tmp_path: Path):
    folder = save_adapter(tmp_path / "out")
    first = registry.publish("bot", folder, {"n": 1}, key="run-1")
    assert registry.publish("bot", tmp_path / "gone", {"n": 2}, key="run-1") == first
    assert registry.publish("bot", folder, {}, key="run-2").number == 2
    assert registry.resolve("bot@v1").card["n"] == 1


def test_a_publication_without_its_marker_is_finished_by_the_next(bot: Registry, tmp_path: Path):
    bot.storage.remove(f"adapters/bot/v2/{MARKER}")
    assert [version.number for version in bot.versions("bot")] == [1, 3]
    assert bot.publish("bot", tmp_path / "v2", {}, key="run-2").id == "bot@v2"
    assert bot.fetch(bot.resolve("bot@v2"), tmp_path / "cache")


def test_a_name_and_a_ref_are_checked(bot: Registry, tmp_path: Path):
    for name in ("Bot", "a b", "../x", ""):
        with pytest.raises(RegistryError):
            bot.publish(name, tmp_path / "v1", {}, key="k")
    for ref, message in {
        "bat": "did you mean 'bot'",
        "unlike": "it holds bot",
        "bot@v9": "there is no bot@v9; there are bot@v1, bot@v2, bot@v3",
        "bot@prod": "no alias 'prod'",
        "bot@v1@v2": "names no version",
        "bot@": "names no version",
        "bot@UP": "not an alias",
    }.items():
        with pytest.raises(RegistryError, match=message):
            bot.resolve(ref)


def test_a_bare_name_is_prod_or_the_newest(bot: Registry):
    assert bot.resolve("bot").number == 3
    bot.promote("bot@v1")
    assert bot.resolve("bot").number == 1
    assert bot.resolve("bot@prod").number == 1
    assert bot.resolve("bot@v2").number == 2


def test_a_failed_gate_is_promoted_by_force_only(bot: Registry):
    with pytest.raises(RegistryError, match=r"bot@v3 did not pass its gate: loss < base .*--force"):
        bot.promote("bot@v3")
    with pytest.raises(RegistryError, match="did not pass its gate"):
        bot.split("bot", "canary", {1: 0.9, 3: 0.1})
    assert bot.aliases("bot") == {}
    assert bot.promote("bot", force=True).targets == {3: 1.0}  # a bare name is the newest


def test_an_alias_moves_by_compare_and_swap(bot: Registry):
    first = bot.promote("bot@v1", expect=0, by="ann")
    assert bot.aliases("bot") == {"prod": first}
    assert (first.targets, first.number, first.by) == ({1: 1.0}, 1, "ann")
    second = bot.promote("bot@v2", expect=first.number)
    with pytest.raises(RegistryError, match="was moved by another writer: expected move 1, it is move 2"):
        bot.promote("bot@v1", expect=first.number)
    assert bot.aliases("bot")["prod"] == second
    assert bot.promote("bot@v1").number == 3


def test_rolling_back_twice_goes_back_two_states(bot: Registry):
    with pytest.raises(RegistryError, match="nothing to go back to"):
        bot.rollback("bot")
    for number in (1, 2, 2, 3):
        bot.promote(f"bot@v{number}", force=True)
    back = bot.rollback("bot")
    assert (back.targets, back.number, back.reason) == ({2: 1.0}, 5, "rollback")
    assert bot.rollback("bot").targets == {1: 1.0}
    with pytest.raises(RegistryError, match="nothing to go back to"):
        bot.rollback("bot")
    bot.promote("bot@v3", force=True)
    assert bot.rollback("bot").targets == {1: 1.0}


def test_a_split_has_shares(bot: Registry):
    state = bot.split("bot", "canary", {1: 9, "v2": 1})
    assert state.targets == pytest.approx({1: 0.9, 2: 0.1})
    assert bot.resolve("bot@canary").number == 1
    assert [state.pick(point) for point in (0.0, 0.89, 0.91, 0.9999999)] == [1, 1, 2, 2]
    for wrong in ({}, {1: 0.0}, {1: -1.0}, {1: float("nan")}, {"x": 1.0}, {9: 1.0}):
        with pytest.raises(RegistryError):
            bot.split("bot", "canary", wrong)


def test_a_version_under_an_alias_is_not_deleted(bot: Registry):
    bot.promote("bot@v1")
    bot.split("bot", "canary", {1: 0.5, 2: 0.5})
    for number, alias in ((1, "canary"), (2, "canary")):
        with pytest.raises(RegistryError, match=f"bot@v{number} is bot@{alias}; promote another version"):
            bot.delete(f"bot@v{number}")
    bot.drop_alias("bot", "canary")
    with pytest.raises(RegistryError, match="bot@v1 is bot@prod"):
        bot.delete("bot@v1")
    bot.delete("bot@v2")
    assert [version.number for version in bot.versions("bot")] == [1, 3]


def test_a_version_that_is_held_is_not_deleted(bot: Registry):
    assert bot.hold("bot@v1", "replica a", ttl_s=60).id == "bot@v1"
    bot.hold("bot@v1", "replica b", ttl_s=60)
    bot.hold("bot@v1", "replica b", ttl_s=-1)
    with pytest.raises(RegistryError, match="bot@v1 is held by replica a; unload it"):
        bot.delete("bot@v1")
    assert bot.holders("bot", 1) == ["replica a"]
    bot.release("bot@v1", "replica a")
    bot.release("bot@v1", "replica a")
    bot.delete("bot@v1")
    bot.release("bot@v1", "replica a")
    with pytest.raises(RegistryError, match="bot@v1 was deleted"):
        bot.hold("bot@v1", "replica a", ttl_s=60)


def test_a_hold_runs_out(bot: Registry):
    bot.hold("bot@v1", "replica", ttl_s=0.05)
    time.sleep(0.06)
    bot.delete("bot@v1")


def test_a_number_is_never_used_again(bot: Registry, tmp_path: Path):
    bot.delete("bot@v3")
    bot.delete("bot@v3")
    with pytest.raises(RegistryError, match="bot@v3 was deleted; there are bot@v1, bot@v2"):
        bot.resolve("bot@v3")
    assert bot.storage.files("adapters/bot/v3") == {}
    assert bot.publish("bot", tmp_path / "v3", {}, key="run-3").number == 4
    for ref, message in {"bot": "say which version", "bot@prod": "say which version", "bot@v9": "no bot@v9"}.items():
        with pytest.raises(RegistryError, match=message):
            bot.delete(ref)


def test_a_history_skips_what_was_deleted(bot: Registry):
    for number in (1, 2, 3):
        bot.promote(f"bot@v{number}", force=True)
    bot.delete("bot@v2")
    assert [state.main for state in bot.history("bot")] == [1, 3]
    assert bot.rollback("bot").targets == {1: 1.0}


def test_an_alias_to_a_deleted_version_falls_back(bot: Registry):
    """Only the loser of a race leaves such a move; here it is put there by hand."""
    bot.promote("bot@v1")
    bot.promote("bot@v2")
    bot.storage.write_bytes("adapters/bot/deleted/2.json", b"{}")
    assert bot.resolve("bot@prod").number == 1
    assert bot.promote("bot@v3", force=True).number == 3


def test_half_a_move_does_not_count(bot: Registry):
    bot.promote("bot@v1")
    bot.storage.write_bytes("adapters/bot/aliases/prod/2.json", b'{"targ')
    assert bot.resolve("bot@prod").number == 1
    assert bot.promote("bot@v2").number == 3
    assert bot.resolve("bot@prod").number == 2


def test_changed_files_are_not_fetched(bot: Registry, tmp_path: Path):
    version = bot.resolve("bot@v1")
    key = f"{version.key}/adapter_model.safetensors"
    data = bot.storage.read_bytes(key)
    bot.storage.write_bytes(key, data[:-1] + b"\x01")
    with pytest.raises(RegistryError, match=r"bot@v1 .* adapter_model.safetensors was changed"):
        bot.fetch(version, tmp_path / "cache")
    bot.storage.write_bytes(key, data)
    assert bot.fetch(version, tmp_path / "cache")
    bot.storage.remove(key)
    with pytest.raises(RegistryError, match="bot@v1"):
        bot.fetch(version, tmp_path / "other")


def test_a_fetched_copy_is_repaired(tmp_path: Path):
    registry = Registry(Storage(f"memory://{tmp_path.name}"))
    version = registry.publish("bot", save_adapter(tmp_path / "out"), {}, key="run")
    cache = tmp_path / "cache"
    for damage in (b"", b"x"):
        folder = registry.fetch(version, cache)
        assert torch.equal(
            load_file(folder / "adapter_model.safetensors")["base_model.model.layers.0.q_proj.lora_A.weight"],
            torch.ones(2, 8),
        )
        (cache / "adapter_model.safetensors").write_bytes(damage)
    (cache / "extra.safetensors").write_bytes(b"")
    with pytest.raises(RegistryError, match=r"extra.safetensors was added"):
        registry.fetch(version, cache)


def test_what_a_dead_publisher_left_can_be_deleted(bot: Registry):
    gone = {"host": "other", "boot_id": "b", "pid_namespace": "n", "pid": 1, "publication": "x"}
    for at, message in ((time.time(), "is being published by pid 1 on host other"), (time.time() - 700, None)):
        bot.storage.write_json("adapters/bot/claims/4.json", {**gone, "at": at})
        bot.storage.write_bytes("adapters/bot/v4/adapter_model.safetensors", b"half")
        if message:
            with pytest.raises(RegistryError, match=message):
                bot.delete("bot@v4")
        else:
            bot.delete("bot@v4")
    assert bot.storage.files("adapters/bot/v4") == {}
