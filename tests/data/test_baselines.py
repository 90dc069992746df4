"""Questions with training examples before them: what the untrained base is asked as a rival of training."""

from __future__ import annotations

import pytest

from ftray.config.schema import Data, Sft
from ftray.data.prepare import content_digest, prepare
from ftray.errors import DataError

PAIRS = [{"prompt": f"Question {n}?", "completion": f"Answer {n}."} for n in range(40)]


@pytest.fixture
def asked(storage, tokenizer):
    def run(sources, baselines, **data):
        section = Data(sources=sources, **{"eval_fraction": 0.2} | data)
        return prepare(
            section, objective=Sft(), tokenizer=tokenizer, fingerprint="", seed=0, storage=storage, baselines=baselines
        )

    return run


def test_the_same_questions_are_asked_with_so_many_training_rows_before_them(write, asked, tokenizer):
    data = asked(write("a.jsonl", PAIRS), [0, 3])
    assert list(data.baselines) == [3]  # without examples it is the run's own question
    held = {question.answer for question in data.questions}
    assert [one.row for one in data.baselines[3]] == [one.row for one in data.questions]
    for plain, shown in zip(data.questions, data.baselines[3], strict=True):
        text = tokenizer.decode(shown.prompt_ids)
        assert text.endswith(tokenizer.decode(plain.prompt_ids))
        assert text.count("Answer") == 3
        assert not any(answer in text for answer in held)
        assert (shown.answer, shown.task) == (plain.answer, plain.task)
    assert data.report.questions == len(data.questions)


def test_training_is_the_same_with_and_without_them(write, asked):
    path = write("a.jsonl", PAIRS)
    plain, rivals = asked(path, []), asked(path, [2])
    assert plain.key != rivals.key
    assert not plain.baselines
    for store in ("train", "eval"):
        one, other = getattr(plain, store), getattr(rivals, store)
        assert [one.ids(i).tolist() for i in range(len(one))] == [other.ids(i).tolist() for i in range(len(other))]
    assert plain.questions == rivals.questions


def test_prompts_longer_than_an_example_may_be_are_asked_all_the_same(write, asked):
    data = asked(write("a.jsonl", PAIRS), [8], max_length=40)
    assert len(data.baselines[8]) == len(data.questions) > 0
    assert all(len(one.prompt_ids) > 40 for one in data.baselines[8])


def test_a_run_that_shows_examples_itself_is_asked_without_them_too(write, asked, tokenizer):
    data = asked(write("a.jsonl", PAIRS), [0, 2], few_shot=2)
    assert list(data.baselines) == [0]
    assert all(tokenizer.decode(one.prompt_ids).count("Answer") == 0 for one in data.baselines[0])


def test_held_out_files_are_asked_with_training_rows(write, asked, tokenizer):
    held = write("b.jsonl", [{"prompt": "Held?", "completion": "Yes."}])
    data = asked(write("a.jsonl", PAIRS), [1], eval_sources=[held])
    assert tokenizer.decode(data.baselines[1][0].prompt_ids).count("Answer") == 1


def test_fewer_training_rows_than_are_to_be_shown_is_an_error(write, asked):
    with pytest.raises(DataError, match=r"evaluate.baselines: .*a.jsonl has 3 training rows to show, not 5"):
        asked(write("a.jsonl", PAIRS[:3]), [5], eval_sources=[write("b.jsonl", PAIRS[5:7])])


def test_without_baselines_prepared_data_keep_their_key(write):
    section = Data(sources=write("a.jsonl", PAIRS))
    keys = [content_digest(section, objective=Sft(), fingerprint="", seed=0, baselines=b) for b in ([], (), [4])]
    assert keys[0] == keys[1] == content_digest(section, objective=Sft(), fingerprint="", seed=0)
    assert keys[2] != keys[0]
