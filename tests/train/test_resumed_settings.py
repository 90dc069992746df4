"""A run that was begun is gone on with, or refused, by what it was begun with."""

import pytest

from ftray.config.schema import Run
from ftray.errors import ConfigError
from ftray.store.paths import Storage
from ftray.store.runs import RunFolder
from ftray.train.launch import _finished


@pytest.fixture
def begun(tmp_path):
    """A run, and a way to say what its folder was begun with."""
    run = Run.model_validate({"name": "a", "storage": str(tmp_path), "data": {"sources": "a.jsonl"}})
    folder = RunFolder(Storage(run.storage), run.name)

    def begin(change):
        kept = run.model_dump(mode="json")
        change(kept)
        folder.begin({"run": kept, "settings": {}}, fresh=True)
        return _finished(run, folder, 0.0)

    return begin


def test_a_run_that_was_begun_before_a_key_was_there_is_gone_on_with(begun):
    assert begun(lambda kept: kept["evaluate"].pop("baselines")) is None


def test_a_run_that_was_begun_with_other_settings_is_refused_with_each(begun):
    with pytest.raises(ConfigError) as error:
        begun(lambda kept: kept["optim"].update(batch_size=64))
    assert error.value.problems[0] == ("optim.batch_size", "was 64, now 16")


def test_a_key_that_means_nothing_today_is_a_difference(begun):
    with pytest.raises(ConfigError, match="shuffle"):
        begun(lambda kept: kept["data"].update(shuffle=True))
