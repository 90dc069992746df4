"""The benchmarks run, and what they say of their peers' figures is right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import serve_report

    return serve_report


def run(*, tokens: int = 100, wall_s: float, processor_s: float) -> dict:
    return {
        "tokens": tokens,
        "wall_s": wall_s,
        "processor_s": processor_s,
        "first_s": [0.5],
        "gaps_s": [0.1, 0.3],
        "answers": [[1, 2], [3, 4]],
    }


def test_the_serving_benchmark_runs_and_its_peers_answer_alike():
    command = [sys.executable, str(BENCHMARKS / "serve.py"), "--quick", "--json", "--dtype", "fp32"]
    choice = ["--peers", "ftray", "peft-mixed", "vllm-plain", "--parts", "grid", "loads"]
    environment = {name: value for name, value in os.environ.items() if name != "FTRAY_VLLM_PYTHON"}
    done = subprocess.run([*command, *choice], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert list(told["skipped"]) == ["vllm-plain"]
    compared = [entry["peers"] for entry in told["grid"]["cells"] if entry["kind"] != "base"]
    assert [list(peers) for peers in compared] == [["ftray", "peft-mixed"]] * 4
    assert [peers["peft-mixed"]["same_answers"] for peers in compared] == [1.0] * 4
    assert all(entry["ratio"]["by the clock"] > 0 for entry in told["grid"]["ratios"])
    assert told["loads"]["alone"]["loads"] == 40
    assert told["loads"]["alone"]["load_ms"]["p50"] > 0


def test_a_ratio_is_the_median_of_the_rounds_over_the_better_peer(report):
    asked = report.Asked(32, 8, "mixed")
    ours = {n: run(wall_s=wall, processor_s=1.0) for n, wall in enumerate((1.0, 2.0, 2.0))}
    mixed = {n: run(wall_s=4.0, processor_s=4.0) for n in range(3)}
    sequential = {n: run(wall_s=5.0, processor_s=1.5) for n in range(3)}
    peers = {"ftray": ours, "peft-mixed": mixed, "peft-sequential": sequential}
    [told] = report.ratios({asked: peers})
    assert told["name"] == "mixed over the better PEFT"
    # Over 25 tokens/s: 100, 50, 50. Over 67 tokens per processor-second: 100 each time.
    assert told["ratio"] == {"by the clock": 2.0, "best rounds": 4.0, "by processor time": 1.5}
    assert told["met"] == {"by the clock": True, "best rounds": True, "by processor time": False}


def test_a_round_that_a_slow_peer_left_out_is_in_no_ratio(report):
    asked = report.Asked(256, 32, "mixed")
    ours = {0: run(wall_s=1.0, processor_s=1.0), 1: run(wall_s=50.0, processor_s=50.0)}
    [told] = report.ratios({asked: {"ftray": ours, "vllm-lora": {0: run(wall_s=6.0, processor_s=4.0)}}})
    assert told["ratio"] == {"by the clock": 6.0, "best rounds": 6.0, "by processor time": 4.0}
    assert told["target"] == 5.0


def test_a_peer_is_told_by_its_median_its_best_and_measured_percentiles(report):
    rounds = {n: run(wall_s=wall, processor_s=2.0) for n, wall in enumerate((1.0, 2.0, 4.0))}
    told = report.of_peer(rounds, ours={0: {"answers": [[1, 2], [3, 5]]}})
    assert told["tokens_per_s"] == {"median": 50.0, "best": 100.0}
    assert told["between_tokens_ms"] == {"p50": 300.0, "p99": 300.0}
    assert told["same_answers"] == 0.5
