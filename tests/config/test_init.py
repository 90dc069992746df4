"""The starter run file: it loads as it is, and with every key uncommented."""

from __future__ import annotations

import re

import pytest

from ftray.config.init import starter
from ftray.config.load import load_run
from ftray.config.starters import STARTERS


@pytest.mark.parametrize("method", STARTERS)
def test_a_starter_loads_and_its_comments_are_the_defaults(tmp_path, method):
    path = tmp_path / "run.yaml"
    text = starter(method, ["a.jsonl", "b: c.csv"], "coffee")
    path.write_text(text)
    run = load_run(path)
    assert [source.path for source in run.data.sources] == ["a.jsonl", "b: c.csv"]

    uncommented = re.sub(r"^( *)# (?= *[a-z_]+:( |$))", r"\1", text.split("\n", 2)[2], flags=re.MULTILINE)
    assert uncommented.count("\n") > 60
    path.write_text(uncommented.replace("eval_sources: [held-out.jsonl]", "eval_sources: []"))
    assert load_run(path) == run


def test_starters_say_their_method():
    assert "bits: 4 " in starter("qlora", ["a"], "x")
    assert "kind: pretrain" in starter("pretrain", ["a"], "x")
