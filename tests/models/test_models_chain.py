"""A version as the base of the next: its adapter merged into its base, once, the same weights wherever it is read."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ftray.config.schema import Lora, Model, Run
from ftray.config.serving import Serving
from ftray.errors import ModelError, RegistryError
from ftray.models import chain
from ftray.models.adapt import adapt, servability, trainable
from ftray.models.load import fingerprint, load_base, load_tokenizer
from ftray.models.merge import load_version
from ftray.models.save import save_version
from ftray.store.paths import Storage
from ftray.store.registry import Registry


def published(storage, name, model, folder, method=None, *, seed=1):
    """A version with random values of `method` on a base, published as a run does it."""
    method = method or Lora(rank=4)
    located = chain.found(model, storage)
    adapted = adapt(load_base(located, method=method, dtype=torch.float32), method, seed=0)
    generator = torch.Generator().manual_seed(seed)
    learnt = {
        name: torch.randn(parameter.shape, generator=generator) * 0.1 for name, parameter in trainable(adapted).items()
    }
    save_version(adapted, folder, method=method, state=learnt, tokenizer=load_tokenizer(located))
    card = {"base": model.base, "base_fingerprint": fingerprint(located), "method": method.model_dump()}
    card |= {"servability": servability(method), "lineage": chain.lineage([model.version], storage)}
    return Registry(storage).publish(name, folder, card, folder.name)


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def answers_as(storage, base, version, ids, folder):
    """Logits of a version as adapter plus base, in fp32."""
    located = chain.found(base, storage)
    files = Registry(storage).fetch(version, folder)
    return logits(load_version(located, files, version.card, torch.float32)[0], ids)


@pytest.fixture
def storage(tmp_path):
    return Storage(str(tmp_path / "store"))


@pytest.fixture
def first(storage, base, tmp_path):
    return published(storage, "first", base, tmp_path / "one")


def test_the_base_of_the_next_run_answers_as_the_version_did(storage, base, first, ids, tmp_path):
    based = chain.found(Model(base="adapters:first@v1"), storage)
    merged = load_base(based, method=Lora(), dtype=torch.float32).eval()
    torch.testing.assert_close(
        logits(merged, ids), answers_as(storage, base, first, ids, tmp_path), atol=1e-5, rtol=1e-4
    )
    assert merged.name_or_path == based.base == "adapters:first@v1"
    assert load_tokenizer(based).chat_template == load_tokenizer(base).chat_template


def test_a_chain_of_three_is_one_sum(storage, base, first, ids, tmp_path):
    second = published(storage, "second", Model(base="adapters:first@v1"), tmp_path / "two", seed=2)
    third = chain.found(Model(base="adapters:second@v1"), storage)
    merged = load_base(third, method=Lora(), dtype=torch.float32).eval()
    tuned = answers_as(storage, Model(base="adapters:first@v1"), second, ids, tmp_path)
    torch.testing.assert_close(logits(merged, ids), tuned, atol=1e-5, rtol=1e-4)
    assert chain.lineage([third.version], storage) == [
        {"version": "first@v1", "digest": first.digest},
        {"version": "second@v1", "digest": second.digest},
    ]


def test_a_version_is_merged_once_and_marked_last(storage, first, monkeypatch):
    place = chain.found(Model(base="adapters:first@v1"), storage).place
    monkeypatch.setattr(chain, "merge", None)  # a second time would fail
    assert chain.found(Model(base="adapters:first"), storage).place == place
    Path(place, "COMPLETE.json").unlink()
    with pytest.raises(TypeError):  # without its marker it does not count
        chain.found(Model(base="adapters:first@v1"), storage)


def test_a_merged_base_has_a_fingerprint_of_its_own(storage, base, first, tmp_path):
    published(storage, "other", base, tmp_path / "other", seed=3)
    found = {fingerprint(chain.found(Model(base=f"adapters:{name}"), storage)) for name in ("first", "other")}
    assert len(found | {fingerprint(base)}) == 3


def test_on_an_object_store_every_machine_copies_the_merged_base(base, ids, tmp_path, monkeypatch):
    storage = Storage(f"memory://chains-{tmp_path.name}")
    machines = [tmp_path / "one-machine", tmp_path / "another"]
    for machine in machines:
        machine.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(machines[0]))
    version = published(storage, "first", base, tmp_path / "one")
    based = chain.found(Model(base="adapters:first"), storage)
    assert Path(based.place).is_relative_to(machines[0])
    merged = load_base(based, method=Lora(), dtype=torch.float32).eval()
    tuned = answers_as(storage, base, version, ids, tmp_path / "fetched")
    torch.testing.assert_close(logits(merged, ids), tuned, atol=1e-5, rtol=1e-4)
    monkeypatch.setattr("tempfile.tempdir", str(machines[1]))
    elsewhere = chain.found(Model(base="adapters:first"), storage)
    assert Path(elsewhere.place).is_relative_to(machines[1])
    assert fingerprint(elsewhere) == fingerprint(based)


def test_a_whole_model_is_the_base_itself(storage, base, tmp_path):
    from ftray.config.schema import Full

    version = published(storage, "whole", base, tmp_path / "whole", Full())
    place = chain.found(Model(base="adapters:whole"), storage).place
    assert place == str(storage.local_path(version.key))
    assert not storage.list("models")
    assert fingerprint(Model(base="adapters:whole").at(place)) != fingerprint(base)


@pytest.mark.parametrize("kind", ["prefix", "prompt", "p_tuning", "bottleneck"])
def test_a_method_that_is_no_change_of_weights_cannot_be_a_base(storage, base, tmp_path, kind):
    from pydantic import TypeAdapter

    from ftray.config.methods import Method

    method = TypeAdapter(Method).validate_python({"kind": kind, **({"tokens": 2} if kind != "bottleneck" else {})})
    published(storage, "soft", base, tmp_path / kind, method)
    with pytest.raises(ModelError, match=r"soft@v1 is a version of .*, which is no change of weights.* start from its"):
        chain.found(Model(base="adapters:soft"), storage)


def test_an_alias_is_resolved_once(storage, base, first, tmp_path):
    run = Run.model_validate({"name": "next", "model": {"base": "adapters:first@prod"}, "data": {"sources": "a"}})
    Registry(storage).promote("first@v1")
    began = chain.pinned(run, storage)
    assert began.model.base == "adapters:first@v1"
    published(storage, "first", base, tmp_path / "again", seed=5)
    Registry(storage).promote("first@v2")
    assert chain.pinned(run, storage).model.base == "adapters:first@v2"
    assert chain.pinned(run, storage, began="adapters:first@v1").model.base == "adapters:first@v1"
    by_number = run.model_copy(update={"model": Model(base="adapters:first@v2")})
    assert chain.pinned(by_number, storage, began="adapters:first@v1").model.base == "adapters:first@v2"


def test_a_version_that_is_not_there_is_named(storage, first):
    with pytest.raises(RegistryError, match="there is no first@v7; there are first@v1"):
        chain.found(Model(base="adapters:first@v7"), storage)


def test_a_base_that_changed_since_is_refused(storage, base, tmp_path):
    shutil.copytree(base.base, tmp_path / "moving")
    published(storage, "first", Model(base=str(tmp_path / "moving")), tmp_path / "one")
    config = tmp_path / "moving" / "config.json"
    config.write_text(config.read_text().replace("1e-06", "1e-05"))
    with pytest.raises(ModelError, match="put that base back"):
        chain.found(Model(base="adapters:first"), storage)


def test_a_version_that_others_are_made_of_is_not_deleted(storage, first, tmp_path):
    published(storage, "second", Model(base="adapters:first@v1"), tmp_path / "two")
    registry = Registry(storage)
    with pytest.raises(RegistryError, match=r"first@v1 is part of the base of second@v1.*delete those first"):
        registry.delete("first@v1")
    registry.delete("second@v1")
    registry.delete("first@v1")
    assert not registry.names()


def test_a_server_of_the_chains_base_takes_the_version_and_another_base_refuses_it(storage, base, first, tmp_path):
    from ftray.serve.plan import plan

    published(storage, "second", Model(base="adapters:first@v1"), tmp_path / "two")

    def hindrances(model):
        serving = Serving.model_validate({"storage": storage.root, "model": model})
        planned = plan(serving)
        assert planned.ok
        return {adapter.name: adapter.hindrance for adapter in planned.adapters}

    assert hindrances({"base": "adapters:first@v1"}) == {
        "first": f"first@v1 was trained on another base: {base.base}",
        "second": None,
    }
    assert hindrances({"base": base.base}) == {
        "first": None,
        "second": "second@v1 was trained on another base: adapters:first@v1",
    }
    problems = plan(Serving.model_validate({"storage": storage.root, "model": {"base": "adapters:none"}})).problems
    assert "there is no adapter 'none'" in problems[0]


def test_an_adapter_names_the_version_that_it_was_trained_on(storage, first, tmp_path):
    second = published(storage, "second", Model(base="adapters:first@v1"), tmp_path / "two")
    config = storage.read_json(f"{second.key}/adapter_config.json")
    assert config["base_model_name_or_path"] == "adapters:first@v1"
    assert load_file(tmp_path / "two" / "adapter_model.safetensors")


def test_a_card_and_the_terminal_tell_the_chain(storage, base, first, tmp_path, capsys):
    from ftray.cli import main

    second = published(storage, "second", Model(base="adapters:first@v1"), tmp_path / "two")
    assert second.card["base"] == "adapters:first@v1"
    assert main(["adapters", "show", "second", "--storage", storage.root]) == 0
    assert f"{base.base} → first@v1 → second@v1" in capsys.readouterr().out
    assert main(["adapters", "export", "second", "--out", str(tmp_path / "plain"), "--storage", storage.root]) == 0
    assert (tmp_path / "plain" / "base" / "model.safetensors").is_file()  # only ftray could find it otherwise
