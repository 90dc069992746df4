"""Which sweeps' trials may share passes over one base, and how many at a time."""

import pytest
from sweeps import sweep

from ftray.models.load import load_config
from ftray.store.paths import Storage
from ftray.sweep.fusing import why_not
from ftray.sweep.planning import Planner
from ftray.train.layout import Node

GIB = 2**30
RUN = {
    "name": "demo",
    "data": {"sources": "builtin:orders", "max_length": 192},
    "optim": {"steps": 4, "batch_size": 16},
    "scale": {"cpus_per_worker": "auto"},
}
RANKS = {"method.rank": [4, 8]}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Prepared data are kept between the tests."""
    return str(tmp_path_factory.mktemp("store"))


@pytest.fixture
def planned(root):
    def plan(space=RANKS, *, run=None, nodes=None, **keys):
        merged = {"storage": root, **RUN}
        for section, values in (run or {}).items():
            merged[section] = {**merged.get(section, {}), **values} if isinstance(values, dict) else values
        asked = sweep(space, run=merged, **{"trials": 8, "fuse": "auto", **keys})
        planner = Planner(asked, Storage(root), nodes or [Node("here", cpus=2, ram_bytes=24 * GIB)])
        planner.check()
        return planner

    return plan


def test_lora_trials_that_differ_in_what_is_their_own_share_one_group(planned):
    space = {
        "optim.lr": [1e-4, 1e-2],
        "optim.schedule": ["cosine", "constant"],
        "optim.weight_decay": [0.0, 0.1],
        "method.rank": [4, 64],
        "method.dropout": [0.0, 0.1],
        "method.targets": ["auto", ["q_proj"]],
        "seed": [1, 2],
    }
    planner = planned(space, run={"scale": {"workers": 2}})
    assert planner.alone is None
    assert (planner.fusing.groups, planner.fusing.seats, planner.parallel) == (1, 8, 8)
    assert "8 trials at a time over one base in one worker group (2 workers with 1 CPU)" in planner.notes()[0]


@pytest.mark.parametrize(
    ("space", "run", "keys", "reason"),
    [
        ({"method.kind": ["lora", "full"]}, {}, {}, "method.kind: full is no LoRA"),
        ({"optim.batch_size": [8, 16]}, {}, {}, "optim.batch_size differs between trials"),
        ({"data.max_length": [128, 192]}, {}, {}, "data differs between trials"),
        ({"method.bits": [None, 4]}, {}, {}, "method.bits differs between trials"),
        ({"method.dora": [True]}, {}, {}, "method.dora reads the base's weights anew"),
        ({"method.init": ["default", "pissa"]}, {}, {}, "method.init: pissa changes the base"),
        ({"method.modules_to_save": [["norm"]]}, {}, {}, "method.modules_to_save learns weights of the base"),
        ({"method.targets": ["auto", ["q_proj", "lm_head"]]}, {}, {}, "method.targets: lm_head does not see the rows"),
        ({"method.targets": [["embed_tokens"]]}, {}, {}, "method.targets: model.embed_tokens does not see the rows"),
        (RANKS, {"scale": {"zero": 2}}, {}, "scale.zero and scale.offload"),
        (
            {"method.dropout": [0.0, 0.1]},
            {"scale": {"gradient_checkpointing": True}},
            {},
            "method.dropout is drawn twice under scale.gradient_checkpointing",
        ),
        (
            {"optim.lr": {"kind": "loguniform", "low": 1e-4, "high": 1e-2}},
            {},
            {"stopping": {"kind": "pbt"}},
            "stopping: pbt",
        ),
        (RANKS, {}, {"parallel": 1}, "one trial runs at a time"),
    ],
)
def test_trials_that_cannot_are_trained_alone_and_the_reason_is_told(planned, space, run, keys, reason):
    planner = planned(space, run=run, **keys)
    assert planner.fusing is None
    assert planner.notes() == [f"each trial alone: {planner.alone}"]
    assert planner.alone.startswith(reason)


def test_a_sweep_that_does_not_ask_is_the_ordinary_one_without_a_word(planned):
    assert sweep(RANKS).fuse == "off"
    planner = planned(fuse="off")
    assert planner.fusing is None
    assert planner.notes() == []


def test_a_base_with_dropout_or_experts_of_its_own_is_left_alone(planned):
    planner = planned()
    every = [planner.plan({"method.rank": rank}) for rank in (4, 8)]
    config = load_config(planner.sweep.run.model)
    assert why_not(planner.sweep, every, config) is None
    config.attention_dropout = 0.1
    assert "dropout of its own (attention_dropout)" in why_not(planner.sweep, every, config)
    config.attention_dropout, config.num_local_experts = 0.0, 8
    assert "mixture of experts" in why_not(planner.sweep, every, config)


def test_memory_the_search_and_the_sweep_bound_the_trials_of_a_group(planned):
    assert planned(trials=40).fusing.seats == 16
    assert planned(trials=40, search={"kind": "tpe", "startup": 5}).fusing.seats == 5
    assert planned(trials=40, parallel=6).fusing.seats == 6
    one = planned(trials=40).fusing
    each = (one.total - planned(trials=40, parallel=2).fusing.total) / 14
    room = (one.total - 12.5 * each) / 0.9
    tight = planned(trials=40, nodes=[Node("here", cpus=2, ram_bytes=int(room))])
    assert tight.fusing.seats == 3
    assert tight.fusing.total <= 0.9 * room


def test_every_gpu_has_a_group_while_each_has_four_trials(planned):
    nodes = [Node("here", cpus=16, gpus=4, gpu_bytes=80 * GIB, ram_bytes=200 * GIB)]
    assert (planned(trials=12, nodes=nodes).fusing.groups, planned(trials=12, nodes=nodes).fusing.seats) == (3, 4)
    many = planned(trials=64, nodes=nodes)
    assert (many.fusing.groups, many.fusing.seats, many.held(64)) == (4, 16, 4)
