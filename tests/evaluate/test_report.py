"""The report is one file without scripts or network, and nothing that a data row says becomes markup."""

import json
import math
from html.parser import HTMLParser

import pytest

from ftray.config.schema import Run
from ftray.evaluate.compare import Scores, compare
from ftray.evaluate.report import write_report

ATTACK = "</pre></title><script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;{{}}$body"
RUN = Run(name="coffee", data={"sources": "orders.jsonl"}).model_dump(mode="json")
GATE = ["loss < base", "exact_match >= 0.9"]


def parts(**changed):
    tasks = {name: Scores(loss=1.0, exact_match=0.25) for name in ("orders", "chat")}
    before = Scores(loss=2.0, exact_match=0.0, general_loss=3.0, tasks=tasks)
    after = Scores(loss=0.5, exact_match=0.75, general_loss=3.125, tasks=tasks)
    source = {
        "path": "orders.jsonl",
        "format": "messages",
        "rows_read": 1200,
        "dropped": {"empty answer": 7},
        "examples": [{"file": "orders.jsonl", "line": 17, "reason": "empty answer"}],
    }
    return {
        "run": RUN,
        "data": {
            "digest": "ab" * 32,
            "sources": [source],
            "rows_read": 1200,
            "tokens": 4000,
            "trained_tokens": 1000,
            "dropped": {"empty answer": 7},
            "length_histogram": [[32, 10], [64, 30]],
            "preview": "<|user|>hello<|assistant|>«good day»",
            "notes": ["one note"],
        },
        "metrics": [
            *({"kind": "train", "step": step, "loss": 2.0 / step, "lr": 1e-3 / step} for step in range(1, 401)),
            {"kind": "eval", "step": 200, "loss": 0.7},
            {"kind": "recovery", "step": 90, "reason": "worker 1 was killed", "seconds": 83.0},
        ],
        "comparison": compare(before, after, GATE).to_json(),
        "samples": [{"prompt": "two teas", "expected": '{"tea": 2}', "base": "", "tuned": '{"tea":2}'}],
        "plan": {"steps": 400, "memory": {"weights_bytes": 3 * 2**20}, "expected_s": 61},
        "card": {"id": "coffee@v3", "created": "2026-05-01", "seconds": 61.0, "files": ["a", {"b": 1}]},
    } | changed


class Page(HTMLParser):
    """What a browser makes of the page; refuses unbalanced elements."""

    VOID = frozenset({"meta"})

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name not in self.VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, text):
        self.texts.append(text)

    def count(self, name):
        return sum(element == name for element, _ in self.elements)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


@pytest.fixture
def page(tmp_path):
    def read(**changed):
        path = write_report(tmp_path / "new" / "report", **parts(**changed))
        return Page(path.read_text(encoding="utf-8"))

    return read


def test_the_page_says_what_a_reader_comes_for(page):
    text = page().text
    for expected in (
        "coffee@v3",
        "gate failed",
        "exact_match >= 0.9",
        "measured 75.0 %",
        "+0.125",  # forgetting
        "✓ as expected",
        "1,200",
        "worker 1 was killed",
        "1 min 23 s",
        "3.0 MiB",
        "ftray adapters promote coffee@v3 --force",
        "orders.jsonl:17",
    ):
        assert expected in text, expected


def test_trained_tokens_of_the_preview_are_marked(page):
    shown = page()
    assert shown.count("mark") == 1
    assert "good day" in shown.texts


def test_the_page_needs_no_network_and_no_script(page):
    for name, attributes in page().elements:
        assert name not in {"script", "link", "img", "iframe", "object", "form", "a", "base"}
        assert not {"src", "href", "action", "xlink:href"} & attributes.keys()
        assert not [key for key in attributes if key.startswith("on")]


def attacked(value, keep):
    """Every text becomes the attack, but for what stands under a key in `keep`."""
    if isinstance(value, dict):
        return {key: item if key in keep else attacked(item, keep) for key, item in value.items()}
    if isinstance(value, list):
        return [attacked(item, keep) for item in value]
    return ATTACK if isinstance(value, str) else value


def test_no_text_of_any_part_becomes_markup(page):
    keep = {"kind", "rule", "tasks"}
    harmless = parts()
    bad = {name: attacked(part, keep) for name, part in harmless.items()}
    bad["plan"] = {ATTACK: {ATTACK: 1}}
    bad["card"][ATTACK] = [ATTACK, {ATTACK: ATTACK}]
    bad["data"]["sources"][0]["dropped"] = {ATTACK: 3}
    bad["data"]["preview"] = f"{ATTACK}«{ATTACK}»"
    for side in ("before", "after"):
        bad["comparison"][side]["tasks"] = {ATTACK: {"loss": 1.0}, "chat": {"loss": 2.0}}
    bad["samples"].append({"prompt": ATTACK * 20, "expected": ATTACK, "base": ATTACK, "tuned": ATTACK})
    shown = page(**bad)
    assert shown.count("script") == shown.count("img") == 0
    assert shown.count("title") == page().count("title")
    assert not [key for _, attributes in shown.elements for key in attributes if key.startswith("on")]
    assert sum("<script>alert(1)</script>" in text for text in shown.texts) > 15
    assert "$body" in shown.text


def test_empty_parts_are_left_out(page):
    empty = {"data": {}, "metrics": [], "comparison": {}, "samples": [], "plan": {}, "card": {}, "run": {}}
    shown = page(**empty)
    assert [name for name, _ in shown.elements if name in {"h2", "svg", "table"}] == []


def test_curves_of_one_step_constant_and_not_finite_values_are_drawn_or_left_out(page):
    metrics = [{"kind": "train", "step": 5, "loss": 1.0, "lr": 0.0, "tokens_per_s": math.nan, "grad_norm": math.inf}]
    shown = page(metrics=metrics)
    charts = [attributes["aria-label"] for name, attributes in shown.elements if name == "svg" and "role" in attributes]
    assert charts == ["Loss, nats per token", "Learning rate"]
    assert not [v for _, attributes in shown.elements for v in attributes.values() if v and ("nan" in v or "inf" in v)]


def test_long_runs_make_a_small_page(tmp_path):
    metrics = [{"kind": "train", "step": n, "loss": 1 / n, "lr": 1e-4, "tokens_per_s": 9.0} for n in range(1, 50_001)]
    assert write_report(tmp_path, **parts(metrics=metrics)).stat().st_size < 600_000


def test_passwords_in_uris_are_in_neither_file(tmp_path):
    run = RUN | {"track": {"mlflow_uri": "https://ann:s3cret@mlflow.example.com/x"}}
    write_report(tmp_path, **parts(run=run))
    for name in ("report.html", "report.json"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert "s3cret" not in text
        assert "***@mlflow.example.com" in text


def test_the_json_holds_the_same_and_is_strict(tmp_path):
    given = parts(metrics=[{"kind": "train", "step": 1, "loss": math.nan}])
    write_report(tmp_path, **given)

    def refuse(constant):
        raise AssertionError(constant)

    read = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert list(read) == ["run", "data", "metrics", "comparison", "samples", "plan", "card"]
    assert read["comparison"] == given["comparison"]
    assert read["metrics"] == [{"kind": "train", "step": 1, "loss": None}]


def test_text_that_no_file_can_hold_is_replaced_and_nothing_half_written_stays(tmp_path):
    write_report(tmp_path, **parts(samples=[{"prompt": "\ud800", "expected": "é", "base": "\x00", "tuned": ""}]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_an_answer_is_as_expected_as_the_score_counts_it(page):
    said = {"prompt": "3 * 6?", "expected": "3 * 6 = 18\n#### 18", "base": "17", "tuned": "It is 18."}
    counted = {"right": {"base": False, "tuned": True}}
    assert page(samples=[said | counted]).text.count("✓ as expected") == 1
    mixed = compare(Scores(pass_at_1=0.0), Scores(pass_at_1=0.5)).to_json()
    for right in ({}, {"right": {"base": None, "tuned": None}}):  # another task of the run is by number
        assert "✓ as expected" not in page(samples=[said | right], comparison=mixed).text
    same = {
        "prompt": "tea?",
        "expected": "two",
        "base": "two ",
        "tuned": "two",
        "right": {"base": None, "tuned": False},
    }
    assert page(samples=[same]).text.count("✓ as expected") == 1


def test_prompting_without_training_stands_beside_the_tuned_model(page):
    assert "Without training" not in page().text
    compared = compare(Scores(), Scores(exact_match=0.75), baselines={0: Scores(exact_match=0.25), 1: Scores(f1=0.5)})
    text = page(comparison=compared.to_json()).text
    assert "base, no example base, 1 example tuned" in text
    assert "25.0 % – 75.0 %" in text
