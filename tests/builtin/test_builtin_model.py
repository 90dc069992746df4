"""The packaged model is found by its id, whole and unchanged, and small enough for a package."""

import shutil

import pytest

from ftray.errors import ModelError
from ftray.models import builtin


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the packaged model that a test may damage."""
    folder = shutil.copytree(builtin.FOLDERS["builtin:tiny"], tmp_path / "tiny")
    builtin.write_digests(folder)
    monkeypatch.setitem(builtin.FOLDERS, "builtin:tiny", folder)
    builtin.builtin_folder.cache_clear()
    yield folder
    builtin.builtin_folder.cache_clear()


def test_the_packaged_model_is_whole():
    folder = builtin.builtin_folder("builtin:tiny")
    assert (folder / "model.safetensors").stat().st_size <= 16e6


def test_the_packaged_model_is_a_small_llama_with_tied_embeddings():
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(builtin.builtin_folder("builtin:tiny"))
    assert 5e6 < sum(parameter.numel() for parameter in model.parameters()) < 6e6
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_unknown_id_is_refused_with_those_there_are():
    with pytest.raises(ModelError, match="there is builtin:tiny"):
        builtin.builtin_folder("builtin:huge")


def test_a_missing_file_is_named(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors: missing .* install ftray again"):
        builtin.builtin_folder("builtin:tiny")


def test_a_changed_file_is_named(copy):
    with (copy / "config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(ModelError, match=r"config\.json: differs"):
        builtin.builtin_folder("builtin:tiny")
