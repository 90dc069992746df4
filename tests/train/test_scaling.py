"""What growing costs, by hand, and the tables of the document as the formulas give them."""

import importlib.util
from pathlib import Path

import pytest

from ftray.config.schema import Full, Lora
from ftray.train.failures import mtbf_s, young_daly_s
from ftray.train.memory import learning
from ftray.train.scaling import Machines, checkpoint_bytes, checkpoint_every, cost, traffic_bytes

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("scaling_tables", ROOT / "benchmarks" / "scaling.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def eight(tables):
    return tables.shape("8 B")


def test_the_volumes_of_the_zero_paper(tables, eight):
    """Full training, one micro-batch, many workers: 2 Psi elements under ZeRO 2, 3 Psi under ZeRO 3, bf16."""
    psi = eight.parameters
    for zero, elements in ((2, 2), (3, 3)):
        sent = traffic_bytes(eight, method=Full(), layout=tables.layout(1024, zero), windows=1)
        assert sent == pytest.approx(2 * elements * psi * 1023 / 1024)


def test_one_worker_sends_nothing(tables, eight):
    assert traffic_bytes(eight, method=Full(), layout=tables.layout(1, 3), windows=4) == 0


def test_an_adapter_sends_and_keeps_its_own_weights_only(tables, eight):
    method = Lora(rank=16)
    params = learning(eight, method).params
    assert traffic_bytes(eight, method=method, layout=tables.layout(2, 2), windows=1) == 2 * params * 2 / 2
    assert checkpoint_bytes(eight, method=method) == 12 * params


def test_a_network_ten_times_as_slow_is_waited_for(tables, eight):
    fast = cost(eight, method=Full(), layout=tables.layout(64, 3), max_length=8192, windows=1)
    slow = cost(
        eight, method=Full(), layout=tables.layout(64, 3), max_length=8192, windows=1, machines=Machines(link=1e9)
    )
    assert fast.exposed_s < slow.exposed_s
    assert slow.tokens_per_s < fast.tokens_per_s


def test_a_short_run_is_saved_twenty_times_and_a_long_one_as_often_as_machines_fail(eight):
    def every(**settings):
        return checkpoint_every(eight, method=Lora(rank=16), **settings)

    assert every(workers=8, steps=2000, step_s=1.0) == 100
    assert every(workers=1024, steps=10**6, step_s=10.0) == pytest.approx(
        young_daly_s(save_s=1, mtbf_s=mtbf_s(1024)) / 10, rel=0.02
    )
    assert every(workers=1024, steps=10**6, step_s=1e5) == 1


def test_the_document_has_the_tables_that_the_formulas_give(tables):
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    for row in [*tables.growth(), *tables.failures()]:
        assert row in text, "python benchmarks/scaling.py prints the tables anew"
