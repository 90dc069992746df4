"""The sweep file: what can be searched, and what is refused before anything starts."""

import random

import pytest

from ftray.config.load import load_sweep
from ftray.config.space import draw_at_random, fixed, grid_value, run_of, values_of
from ftray.config.sweeping import Sweep
from ftray.errors import ConfigError

RUN = {"name": "demo", "data": {"sources": "builtin:orders"}}


def sweep(space, *, run=None, **keys):
    return Sweep.model_validate({"name": "demo-sweep", "run": {**RUN, **(run or {})}, "space": space, **keys})


@pytest.fixture
def sweep_file(tmp_path):
    def write(space, more=""):
        (tmp_path / "run.yaml").write_text("name: demo\ndata: {sources: builtin:orders}\noptim: {epochs: 2}\n")
        path = tmp_path / "sweep.yaml"
        path.write_text(f"name: demo-sweep\nrun: run.yaml\nspace:\n{space}\n{more}\n")
        return path

    return write


def refused(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_sweep(path, overrides)
    return str(caught.value)


def test_a_sweep_file_names_a_run_file_beside_it_and_changes_it(sweep_file):
    path = sweep_file("  method.rank: [4, 8]", "set: {optim.batch_size: 32}\ntrials: 7")
    found = load_sweep(path)
    assert found.run.name == "demo"
    assert found.run.optim.batch_size == 32
    assert found.run.optim.epochs == 2
    assert found.count == 7


def test_values_are_drawn_where_the_space_says_and_the_same_for_the_same_seed():
    space = {
        "optim.lr": {"kind": "loguniform", "low": 1e-5, "high": 1e-2},
        "optim.warmup": {"kind": "uniform", "low": 0.0, "high": 0.2},
        "optim.batch_size": {"kind": "randint", "low": 8, "high": 10},
        "method.rank": [4, 8],
    }
    one = sweep(space)
    drawn = [values_of(one, draw_at_random(random.Random(number))) for number in range(200)]
    assert drawn == [values_of(one, draw_at_random(random.Random(number))) for number in range(200)]
    assert {values["optim.batch_size"] for values in drawn} == {8, 9, 10}
    assert {values["method.rank"] for values in drawn} == {4, 8}
    assert 60 < sum(values["optim.lr"] < 10**-3.5 for values in drawn) < 140, "half of the powers of ten lie below"
    assert all(0 <= values["optim.warmup"] <= 0.2 for values in drawn)
    assert run_of(one, drawn[0]).optim.lr == drawn[0]["optim.lr"]


def test_a_key_that_the_method_does_not_have_is_left_out_of_that_trial():
    one = sweep({"method.kind": ["lora", "full"], "method.rank": [4, 8]})
    assert values_of(one, fixed({"method.kind": "full"})) == {"method.kind": "full"}
    found = values_of(one, fixed({"method.kind": "lora", "method.rank": 8}))
    assert found == {"method.kind": "lora", "method.rank": 8}
    assert run_of(one, {"method.kind": "full"}).method.kind == "full"


def test_another_method_does_not_inherit_the_keys_of_the_runs_own():
    one = sweep({"method.kind": ["lora", "freeze"]}, run={"method": {"kind": "lora", "rank": 64, "dropout": 0.1}})
    assert run_of(one, {"method.kind": "freeze"}).method.last_layers == 2
    assert run_of(one, {"method.kind": "lora"}).method.rank == 64


def test_when_keeps_a_key_to_the_trials_it_is_for():
    warmup = {"kind": "uniform", "low": 0.0, "high": 0.1, "when": {"optim.schedule": ["cosine", "linear"]}}
    one = sweep({"optim.schedule": ["cosine", "constant"], "optim.warmup": warmup})
    rng = draw_at_random(random.Random(1))
    assert "optim.warmup" not in values_of(one, fixed({"optim.schedule": "constant"}, rng))
    assert "optim.warmup" in values_of(one, fixed({"optim.schedule": "cosine"}, rng))


def test_alpha_follows_the_rank_where_there_is_one():
    one = sweep({"method.kind": ["lora", "full"], "method.rank": [4, 16]}, alpha_per_rank=1.5)
    assert run_of(one, {"method.kind": "lora", "method.rank": 16}).method.alpha == 24
    assert run_of(one, {"method.kind": "full"}).method.kind == "full"


def test_a_grid_goes_through_every_combination_once():
    one = sweep({"method.rank": [4, 8], "optim.epochs": [1, 2, 3]}, search={"kind": "grid"})
    assert one.count == 6
    assert [tuple(grid_value(one, number).values()) for number in range(6)] == [
        (1, 4), (2, 4), (3, 4), (1, 8), (2, 8), (3, 8)
    ]  # fmt: skip


def test_a_grid_key_under_random_search_takes_every_value_in_turn():
    one = sweep({"method.rank": {"kind": "grid", "values": [4, 8]}, "optim.epochs": [1, 2]}, trials=4)
    assert [grid_value(one, number) for number in range(4)] == [{"method.rank": r} for r in (4, 8, 4, 8)]


@pytest.mark.parametrize(
    ("space", "wanted"),
    [
        ("  method.rnak: [4]", "space.method.rnak: unknown key; did you mean 'rank'? (line 4)"),
        ("  optim.learning_rate: [1]", "here it is optim.lr"),
        ("  method.rank: []", "is empty; name at least one"),
        ("  method.rank: [4, 0]", "space.method.rank: with method.rank: 0: must be at least 1, got 0"),
        ("  method.rank: {kind: uniform, low: 2, high: 9}", "expected a whole number"),
        ("  optim.lr: {kind: uniform, low: 2, high: 1}", "low 2 is not below high 1"),
        ("  optim.lr: {kind: uniformm, low: 2, high: 3}", "there is no 'uniformm'; did you mean 'uniform'?"),
        ("  optim.lr: {kind: loguniform, low: 0, high: 1}", "must be greater than 0"),
        ("  method.last_layers: [1]", "it belongs to kind: freeze"),
        ("  optim.micro_batch_size: [4, 5]", "not a multiple of micro_batch_size"),
        ("  storage: [a]", "storage says where results go"),
        ("  optim.lr: [1]\nserach: 1", "serach: unknown key; did you mean 'search'?"),
        ("  optim.lr: [1]\nstopping: {kind: pbt}\nsearch: {kind: tpe}", "PBT draws its first trials at random"),
        ("  method.rank: [4]\nstopping: {kind: pbt}", "PBT varies the learning rate"),
        ("  optim.lr: {kind: uniform, low: 1, high: 2}\nsearch: {kind: grid}", "optim.lr has no list of values"),
        ("  optim.lr: [1]\ntrials: 0", "trials: must be at least 1"),
        ("  optim.lr: [1]\nbudget: {hours: 0}", "budget.hours: must be greater than 0"),
        ("  optim.epochs: [1]\nset: {optim.steps: 9}", "optim.epochs changes nothing while the run has optim.steps"),
        ("  optim.lr: [1]\nset: {optim.stepps: 9}", "optim.stepps: unknown key"),
    ],
)
def test_what_is_wrong_is_told_with_its_key_before_anything_starts(sweep_file, space, wanted):
    assert wanted in refused(sweep_file(space))


def test_an_empty_space_is_told(sweep_file, tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("name: a\nrun: {name: a, data: {sources: builtin:orders}}\nspace: {}\n")
    assert "space: is empty; name at least one" in refused(path)


def test_a_run_file_that_is_not_there_or_wrong_is_told_by_its_own_name(sweep_file, tmp_path):
    path = sweep_file("  method.rank: [4]")
    (tmp_path / "run.yaml").write_text("name: demo\ndata: {sources: builtin:orders}\noptim: {epohcs: 2}\n")
    assert "run.yaml: 1 problem" in (told := refused(path))
    assert "optim.epohcs: unknown key; did you mean 'epochs'? (line 3)" in told
    (tmp_path / "run.yaml").unlink()
    assert "no such file" in refused(path)


def test_a_large_space_is_checked_by_each_end_and_by_samples(sweep_file):
    space = "\n".join(
        f"  {key}: {{kind: uniform, low: 0.0, high: 0.5}}"
        for key in ("optim.warmup", "optim.weight_decay", "method.dropout", "objective.label_smoothing")
    )
    space += "\n  method.rank: [1, 2, 4, 8, 16, 32]\n  optim.batch_size: [1, 2, 4, 8, 16]"
    assert load_sweep(sweep_file(space)).count == 10
    assert "method.rank: 0" in refused(sweep_file(space.replace("[1, 2,", "[0, 2,")))


def test_overrides_change_the_sweep(sweep_file):
    found = load_sweep(sweep_file("  method.rank: [4]"), ["trials=3", "search={kind: tpe}", "budget.hours=2"])
    assert (found.trials, found.search.kind, found.budget.hours) == (3, "tpe", 2)
