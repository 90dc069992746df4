"""Rows of objectives that sample: what the model is asked, and what answers are compared with."""

import json

import pytest

from ftray.config.objectives import Grpo, Sft
from ftray.config.schema import Data, Model
from ftray.data.prepare import prepare
from ftray.data.prompts import prompt_of, reference_of
from ftray.errors import DataError
from ftray.models.load import load_tokenizer
from ftray.store.paths import Storage


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(Model(base="builtin:tiny"))


@pytest.fixture
def prepared(tmp_path, tokenizer):
    def make(rows, *, new=16, objective=None, **data):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        section = Data(**{"sources": str(path), "eval_fraction": 0.0, "max_length": 64, **data})
        asked = objective or Grpo(rewards=[{"kind": "regex", "pattern": "a"}], max_new_tokens=new)
        return prepare(
            section, objective=asked, tokenizer=tokenizer, fingerprint="f", seed=1, storage=Storage(str(tmp_path / "s"))
        )

    return make


def asked_of(tokenizer, data, row=0):
    return tokenizer.decode(prompt_of(data.train, row)), reference_of(data.train, row, tokenizer)


TURNS = [{"role": "user", "content": "two lattes"}, {"role": "assistant", "content": "for whom?"}]
MORE = [*TURNS, {"role": "user", "content": "Priya"}]


@pytest.mark.parametrize(
    ("row", "turns", "reference"),
    [
        ({"prompt": "two lattes"}, TURNS[:1], ""),
        ({"question": "two lattes"}, TURNS[:1], ""),
        ({"prompt": "two lattes", "answer": "#### 2"}, TURNS[:1], "#### 2"),
        ({"problem": "two lattes", "solution": "2"}, TURNS[:1], "2"),
        ({"prompt": MORE, "reference": "ok"}, MORE, "ok"),
        ({"prompt": MORE}, MORE, ""),
        ({"messages": TURNS}, TURNS[:1], "for whom?"),
        ({"messages": MORE}, MORE, ""),
        ({"instruction": "two", "input": "lattes", "output": "2"}, [{"role": "user", "content": "two\n\nlattes"}], "2"),
        ({"text": "two lattes"}, TURNS[:1], ""),
    ],
)
def test_a_row_in_any_layout_is_a_prompt_and_perhaps_a_reference(prepared, tokenizer, row, turns, reference):
    whole = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert asked_of(tokenizer, prepared([row])) == (whole, reference)


def test_the_prompt_is_what_a_held_out_question_asks(prepared):
    rows = [{"prompt": f"order {n}", "answer": str(n)} for n in range(40)]
    data = prepared(rows, eval_fraction=0.3)
    assert len(data.questions) == len(data.eval) > 4
    for number, question in enumerate(data.questions):
        assert prompt_of(data.eval, number) == question.prompt_ids
        assert int(question.answer) == int(question.row.rpartition(":")[2]) - 1


def test_a_prompt_without_room_for_an_answer_is_dropped_and_a_long_reference_is_not(prepared):
    rows = [{"prompt": "hi", "answer": "word " * 200}, {"prompt": "word " * 60, "answer": "x"}]
    data = prepared(rows, new=40)
    assert len(data.train) == 1
    assert data.report.dropped == {"longer than max_length": 1}
    assert "40 new ones, max_length 64" in data.report.sources[0].examples[0].reason


def test_other_rewards_and_kinds_ask_the_same(prepared):
    rows = [{"prompt": "hi", "answer": "x"}]
    keys = {
        prepared(rows).key,
        prepared(rows, objective=Grpo(rewards=[{"kind": "numeric"}], samples=4, max_new_tokens=16)).key,
    }
    assert len(keys) == 1
    assert prepared(rows, new=17).key not in keys


def test_prompts_alone_are_nothing_to_imitate(prepared):
    with pytest.raises(DataError, match="cannot tell how its rows are laid out"):
        prepared([{"prompt": "hi"}], objective=Sft())
