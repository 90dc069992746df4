"""Whole runs of methods that differ from LoRA in the loop, the scores or the version."""

import pytest

from ftray.config.load import load_run
from ftray.store.paths import Storage
from ftray.store.registry import Registry
from tests.cluster.conftest import Live

pytestmark = pytest.mark.ray

METHODS = {
    "adalora": {"kind": "adalora", "rank": 4},
    "prompt": {"kind": "prompt", "tokens": 4},
    "prefix": {"kind": "prefix", "tokens": 4},
    "bottleneck": {"kind": "bottleneck", "size": 8},
}
SERVED = {"adalora": "adapter", "prompt": "beside", "prefix": "beside", "bottleneck": "beside"}


@pytest.fixture(scope="module")
def base_losses():
    return set()


# two of them in every run of the tests: one whose loop differs, one whose base is the same model with its prefix off
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in ("adalora", "prefix") else pytest.mark.slow) for kind in METHODS]
)
def test_a_run_is_scored_against_its_base_and_registered(cluster, run_file, base_losses, kind):
    run = load_run(run_file(f"run-{kind.replace('_', '-')}", method=METHODS[kind], optim__steps=10, optim__lr="auto"))
    live = Live(run)
    live.end()
    folder = Storage(run.storage)
    version = Registry(folder).resolve(f"{run.name}@v1")
    assert version.card["servability"] == SERVED[kind]
    before, after = (folder.read_json(f"{live.folder.key}/{name}.json")["scores"] for name in ("before", "after"))
    base_losses.add(round(before["loss"], 4))
    assert len(base_losses) == 1, "the base was not scored by itself"
    assert after["loss"] < before["loss"]
    if kind == "adalora":
        assert sum(version.card["ranks"].values()) == 4 * len(version.card["ranks"]) == 4 * 14
