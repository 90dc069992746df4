"""Rows in, token stores out: once, the same for everybody, with every dropped row accounted for."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from ftray.config.schema import Data, Pretrain, Sft
from ftray.data.prepare import open_prepared
from ftray.data.report import DataReport
from ftray.errors import DataError
from ftray.store.paths import Storage

REAL = Path(__file__).resolve().parents[2] / "../shared/data"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the shared data sets are not on this machine")
PAIRS = [{"prompt": f"Question {n}?", "completion": f"Answer {n}."} for n in range(40)]


def _all(store, tokenizer):
    return [tokenizer.decode(store.ids(i)) for i in range(len(store))]


def _trained(store, tokenizer):
    return [tokenizer.decode(store.ids(i)[store.trained(i)]) for i in range(len(store))]


def test_rows_become_tokens_with_the_loss_on_answers(write, prepared, tokenizer):
    data = prepared(write("a.jsonl", PAIRS))
    assert len(data.train) == 40
    assert _trained(data.train, tokenizer) == [f"Answer {n}.<|im_end|>" for n in range(40)]
    assert data.train.row_name(3).endswith("a.jsonl:4")
    assert data.report.trained_tokens == data.train.trained_tokens == int(data.train.trained_counts.sum())


def test_held_out_rows_are_asked_with_the_generation_prompt(write, prepared, tokenizer):
    data = prepared(write("a.jsonl", PAIRS), eval_fraction=0.2)
    assert len(data.train) + len(data.eval) == 40
    assert len(data.eval) == len(data.questions) > 0
    question = data.questions[0]
    number = int(question.answer.removeprefix("Answer ").removesuffix("."))
    assert tokenizer.decode(question.prompt_ids) == (
        f"<|im_start|>user\nQuestion {number}?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert question.row.endswith(f"a.jsonl:{number + 1}")
    assert data.eval.ids(0)[: len(question.prompt_ids)].tolist() == question.prompt_ids


def test_the_same_is_not_prepared_twice(write, prepared):
    path = write("a.jsonl", PAIRS)
    calls = []

    def counting(fn, chunks):
        calls.append(1)
        return map(fn, chunks)

    first = prepared(path, map_chunks=counting)
    again = prepared(path, map_chunks=counting)
    assert calls == [1]
    assert (again.key, again.report) == (first.key, first.report)


def test_whatever_decides_about_tokens_decides_about_the_key(write, prepared, make_tokenizer):
    path = write("a.jsonl", PAIRS)
    keys = {
        prepared(path).key,
        prepared(path, seed=1).key,
        prepared(path, max_length=64).key,
        prepared(path, objective=Sft(train_on="all")).key,
        prepared(path, objective=Pretrain()).key,
        prepared(path, tokenizer=make_tokenizer(eos_token="<|endoftext|>")).key,
        prepared(write("a.jsonl", PAIRS[:-1])).key,
    }
    assert len(keys) == 7


def test_weights_and_packing_change_no_tokens(write, prepared):
    path = write("a.jsonl", PAIRS)
    first = prepared(path)
    other = prepared([{"path": path, "weight": 3}], packing="off", objective=Sft(label_smoothing=0.1))
    assert other.key == first.key
    assert (first.report.weights, other.report.weights) == ({path: 1}, {path: 3})


def test_an_unfinished_preparation_is_done_again(write, prepared, storage):
    path = write("a.jsonl", PAIRS)
    data = prepared(path)
    (storage.local_path(data.key) / "COMPLETE.json").unlink()
    (storage.local_path(data.key) / "train" / "ids.bin").write_bytes(b"")
    with pytest.raises(DataError, match="no prepared data set here"):
        open_prepared(storage, data.key)
    assert len(prepared(path).train) == 40


def test_chunks_and_their_encoder_can_be_sent_to_other_processes(write, prepared, tokenizer):
    path = write("a.jsonl", PAIRS * 17)

    def remote(fn, chunks):
        packed = pickle.dumps(fn)
        for chunk in chunks:
            yield pickle.loads(pickle.dumps(pickle.loads(packed)(pickle.loads(pickle.dumps(chunk)))))

    options = {"eval_fraction": 0.2, "clean": {"duplicates": "keep"}}
    sent = prepared(path, map_chunks=remote, **options)
    here = prepared(path, storage=Storage(str(Path(path).parent / "other")), **options)
    assert _all(sent.train, tokenizer) == _all(here.train, tokenizer)
    assert sent.questions == here.questions
    assert len(sent.train) > 500


def test_a_process_builds_an_encoder_once_however_often_it_is_sent(tokenizer):
    from ftray.data.encode import Encoder

    packed = pickle.dumps(Encoder(tokenizer, max_length=77, few_shot=2))
    first, again = pickle.loads(packed), pickle.loads(packed)
    assert first is again
    assert (first.max_length, first.few_shot, first.tokenizer.chat_template) == (77, 2, tokenizer.chat_template)


def test_rows_are_streamed(write, prepared, storage, tokenizer):
    from ftray.data.prepare import prepare

    path = write("a.jsonl", [{"prompt": f"q{n}", "completion": "a"} for n in range(2500)])
    read, seen = [0], []

    def watching(fn, chunks):
        for chunk in chunks:
            seen.append(read[0])
            yield fn(chunk)

    prepare(
        Data(sources=path), objective=Sft(), tokenizer=tokenizer, fingerprint="", seed=0, storage=storage,
        map_chunks=watching, on_progress=lambda rows: read.__setitem__(0, rows),
    )  # fmt: skip
    assert seen[0] <= 1000
    assert read[0] == 2500


def test_a_prepared_set_in_an_object_store_is_copied_once(write, prepared, tokenizer, tmp_path, monkeypatch):
    storage = Storage("memory://prepared-test")
    data = prepared(write("a.jsonl", PAIRS), storage=storage)
    first = open_prepared(storage, data.key, tmp_path / "cache")
    assert str(first.folder).startswith(str(tmp_path / "cache"))
    monkeypatch.setattr(Storage, "download", None)
    again = open_prepared(storage, data.key, tmp_path / "cache")
    assert _all(again.train, tokenizer) == _all(data.train, tokenizer)


def test_dropped_rows_are_counted_and_named(write, prepared):
    lines = [json.dumps(row) for row in PAIRS[:5]] + [
        "{broken",
        json.dumps(PAIRS[0]),
        json.dumps({"prompt": "x", "completion": ""}),
        json.dumps({"prompt": "x"}),
        '{"prompt": "x", "completion": "\\ud800"}',
        json.dumps({"prompt": "x", "completion": None}),
    ]
    path = write("a.jsonl", "\n".join(lines) + "\n")
    with Path(path).open("ab") as file:
        file.write(b'{"prompt": "\xff", "completion": "y"}\n')
    report = prepared(path).report
    assert report.dropped == {
        "no value in column 'completion'": 2,
        "not JSON": 1,
        "duplicate": 1,
        "empty answer": 1,
        "not Unicode text": 1,
        "not UTF-8": 1,
    }
    assert (report.rows_read, report.rows_kept, report.train_examples) == (12, 5, 5)
    named = {example.line: example.reason for example in report.sources[0].examples}
    assert named[6].startswith("not JSON: Expecting property name")
    assert named[12] == "not UTF-8: byte 0xff at column 13"
    assert all(example.file == path for example in report.sources[0].examples)


def test_under_strict_the_bad_rows_are_an_error_that_names_them_all(write, prepared, make_tokenizer):
    check = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    answered = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    opened = {"messages": [answered["messages"][1], *answered["messages"]]}
    path = write("a.jsonl", "\n".join([json.dumps(answered), "nonsense", json.dumps(opened), json.dumps(answered)]))
    tokenizer = make_tokenizer(check + make_tokenizer().chat_template)
    assert prepared(path, tokenizer=tokenizer).report.train_examples == 1
    with pytest.raises(DataError) as error:
        prepared(path, tokenizer=tokenizer, strict=True)
    assert "2 bad rows, and data.strict is set" in str(error.value)
    assert "a.jsonl:2: not JSON" in str(error.value)
    assert "a.jsonl:3: the chat template refuses the row: user first (roles: " in str(error.value)
    # a repeated row is cleaning, not an error
    assert prepared(write("b.jsonl", [answered, answered]), strict=True).report.dropped == {"duplicate": 1}


def test_a_failed_preparation_leaves_nothing_behind(write, prepared, storage):
    with pytest.raises(DataError):
        prepared(write("a.jsonl", "nonsense\n"), strict=True)
    assert storage.list("data") == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"a\.jsonl: no rows in it"),
        ("\n\n", r"a\.jsonl: no rows in it"),
        ("x\ny\n", r"a\.jsonl: none of its 2 rows can be used:\n  2: not JSON\n  e\.g\. .*a\.jsonl:1: not JSON"),
        ('{"prompt": "a", "completion": ""}\n', r"none of its 1 rows can be used:\n  1: empty answer"),
        ('{"a": 1}\n', r"cannot tell how its rows are laid out; its columns are a"),
    ],
)
def test_data_without_a_usable_row_is_an_error(write, prepared, content, message):
    with pytest.raises(DataError, match=message):
        prepared(write("a.jsonl", content))


def test_zero_trained_tokens_are_an_error(write, prepared):
    quiet = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}
    with pytest.raises(DataError, match="1: no message to train on"):
        prepared(write("a.jsonl", [quiet]))
    long = {"prompt": "many words " * 200, "completion": "b"}
    with pytest.raises(DataError, match=r"the prompt alone fills max_length, 32 tokens"):
        prepared(write("a.jsonl", [long]), max_length=32)


def test_a_template_that_refuses_every_row_says_why(write, prepared, make_tokenizer):
    refuses = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(DataError, match=r"refuses the row: System role not supported \(roles: system, user"):
        prepared(write("a.jsonl", PAIRS), tokenizer=make_tokenizer(refuses), system="Be brief.")


def test_rows_with_equal_prompts_are_never_on_both_sides(write, prepared, tokenizer):
    rows = [{"prompt": f"Question {n % 50}", "completion": f"Answer {n}"} for n in range(400)]
    rows += [{"prompt": f"question  {n} ", "completion": f"Other {n}"} for n in range(50)]
    data = prepared([write("a.jsonl", rows[:225]), write("b.jsonl", rows[225:])], eval_fraction=0.3, eval_rows=60)
    prompts = [
        {text.split("<|im_end|>")[0].casefold().split()[-1] for text in _all(store, tokenizer)}
        for store in (data.train, data.eval)
    ]
    assert not prompts[0] & prompts[1]
    assert 0 < len(data.eval) <= 60
    assert len(data.train) + len(data.eval) == 450


def test_held_out_sources_are_held_out_and_their_prompts_leave_the_training_rows(write, prepared, tokenizer):
    held = [*PAIRS[:4], {"prompt": "Question 4?", "completion": "Another answer."}]
    data = prepared(write("a.jsonl", PAIRS), eval_sources=[write("b.jsonl", held)], eval_rows=3)
    assert data.report.sources[0].dropped == {"also held out": 5}
    assert data.report.sources[1].dropped == {"more than eval_rows": 2}
    assert data.report.sources[1].held_out
    assert (len(data.train), len(data.eval), len(data.questions)) == (35, 3, 3)
    assert {data.eval.task(i) for i in range(3)} == {str(Path(data.questions[0].row.rsplit(":", 1)[0]))}
    assert data.eval.row_name(0).startswith(data.report.sources[1].path)


def test_a_mixture_keeps_its_sources_apart(write, prepared):
    paths = [write("a.jsonl", PAIRS[:5]), write("b.csv", "text,label\nx,1\ny,2\n")]
    columns = {"prompt": "text", "completion": "label"}
    data = prepared([{"path": paths[0]}, {"path": paths[1], "columns": columns, "weight": 2}])
    assert data.train.sources.tolist() == [0] * 5 + [1] * 2
    assert data.train.task(5) == paths[1]
    assert data.train.row_name(6) == f"{paths[1]}:3"
    assert [source.rows_kept for source in data.report.sources] == [5, 2]
    assert data.report.sources[1].columns == columns


def test_long_examples_are_cut_dropped_or_split(write, prepared, tokenizer):
    path = write("a.jsonl", [PAIRS[0], {"prompt": "Q", "completion": "word " * 100}])
    cut = prepared(path, max_length=40)
    assert (cut.train.lengths.max(), cut.report.truncated) == (40, 1)
    assert cut.train.ids(1)[-1] != tokenizer.eos_token_id
    dropped = prepared(path, max_length=40, too_long="drop")
    assert dropped.report.dropped == {"longer than max_length": 1}
    split = prepared(path, max_length=40, too_long="split")
    assert split.train.lengths.max() == 40
    assert split.train.tokens == prepared(path).train.tokens
    assert split.report.rows_kept == 2


def test_a_question_longer_than_max_length_is_not_asked(write, prepared):
    turns = [("user", "a"), ("assistant", "b"), ("user", "word " * 100), ("assistant", "c")]
    long = {"messages": [{"role": role, "content": content} for role, content in turns]}
    data = prepared(write("a.jsonl", PAIRS), eval_sources=[write("b.jsonl", [long])], max_length=40)
    assert (len(data.eval), data.questions, data.report.questions_too_long) == (1, [], 1)
    assert any("are not asked" in line for line in data.report.lines())


def test_pretraining_learns_every_token_of_a_text_in_windows(write, prepared, tokenizer):
    text = "".join(f"Line {n} of a longer story about coffee.\n\n" for n in range(120))
    data = prepared(write("a.txt", text), objective=Pretrain(), max_length=64)
    assert data.train.trained_tokens == data.train.tokens - len(data.train)  # each window but its first token
    assert data.train.lengths.max() == 64
    blocks = "".join(_all(data.train, tokenizer)).split("<|im_end|>")
    assert "\n\n".join(block for block in blocks if block) == text.strip()
    assert data.questions == []


def test_pretraining_on_conversations_learns_them_whole(write, prepared, tokenizer):
    data = prepared(write("a.jsonl", PAIRS[:1]), objective=Pretrain())
    assert ["<|im_start|>" + trained for trained in _trained(data.train, tokenizer)] == _all(data.train, tokenizer)
    assert _all(data.train, tokenizer)[0].endswith("Answer 0.<|im_end|>")


def test_few_shot_examples_are_shown_and_not_trained_and_never_the_row_itself(write, prepared, tokenizer):
    data = prepared(write("a.jsonl", PAIRS), few_shot=2, eval_fraction=0.2, system="S")
    held = {question.answer for question in data.questions}
    for text, trained in zip(_all(data.train, tokenizer), _trained(data.train, tokenizer), strict=True):
        assert text.startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQuestion")
        assert text.count("<|im_start|>assistant") == 3
        assert text.count(trained) == 1
        assert trained.count("<|im_end|>") == 1
        assert not any(answer in text for answer in held)
    shown = {tokenizer.decode(question.prompt_ids).rsplit("Question", 1)[0] for question in data.questions}
    assert len(shown) == 1


def test_few_shot_examples_for_held_out_sources_come_from_training_rows(write, prepared, tokenizer):
    held = [{"prompt": "Held?", "completion": "Yes."}]
    data = prepared(write("a.jsonl", PAIRS), eval_sources=[write("b.jsonl", held)], few_shot=1)
    assert "Answer" in tokenizer.decode(data.questions[0].prompt_ids)


def test_a_template_and_a_system_message_reach_the_prompt(write, prepared, tokenizer):
    path = write("a.csv", "text,category\nWhere is my card?,card\n")
    source = {"path": path, "columns": {"prompt": "text", "completion": "category"}}
    data = prepared([source], template="Classify: {text}", system="S")
    assert _all(data.train, tokenizer) == [
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nClassify: Where is my card?<|im_end|>\n"
        "<|im_start|>assistant\ncard<|im_end|>"
    ]


def test_held_out_sources_may_be_left_out_by_eval_rows(write, prepared):
    data = prepared(write("a.jsonl", PAIRS[:5]), eval_sources=[write("b.jsonl", PAIRS[5:7])], eval_rows=0)
    assert (len(data.train), len(data.eval)) == (5, 0)
    assert any("b.jsonl: no row of it is used; more than eval_rows" in note for note in data.report.notes)


def test_a_full_disk_is_one_clear_error(write, prepared, monkeypatch):
    import errno

    from ftray.data.tokens import TokenWriter
    from ftray.errors import StorageError

    def full(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TokenWriter, "close", full)
    with pytest.raises(StorageError, match=r"disk full while preparing data in .*TMPDIR"):
        prepared(write("a.jsonl", PAIRS))


def test_near_duplicates_are_dropped_when_asked_for(write, prepared):
    rows = [{"prompt": f"Please tell me where my new card is, it was sent last week{end}", "completion": "card_arrival"}
            for end in (".", "!", "?")]  # fmt: skip
    rows.append({"prompt": "I want to close my account at the end of this month", "completion": "close"})
    data = prepared(write("a.jsonl", rows), clean={"duplicates": "near"})
    assert data.report.dropped == {"near duplicate": 2}
    assert "a.jsonl:1 (" in data.report.sources[0].examples[0].reason


def test_the_report_survives_json_and_reads_in_a_terminal(write, prepared):
    data = prepared(write("a.jsonl", [*PAIRS, PAIRS[0], {**PAIRS[1], "id": 7}]), eval_fraction=0.1)
    report = data.report
    assert DataReport.from_json(json.loads(json.dumps(report.to_json()))) == report
    text = "\n".join(report.lines())
    assert "prompt_completion, weight 1, 42 rows read, 40 kept" in text
    assert "dropped 2: duplicate" in text
    assert "not used: id" in text or report.sources[0].unused_columns == ()
    assert "«Answer" in text
    assert sum(count for _, count in report.length_histogram) == report.train_examples


def test_line_separators_in_answers_survive(write, prepared):
    answer = "one\u2028two\x85three\x0bfour"
    data = prepared(write("a.jsonl", PAIRS), eval_sources=[write("b.jsonl", [{"prompt": "p", "completion": answer}])])
    assert [question.answer for question in data.questions] == [answer]


def test_notes_say_what_to_change(write, prepared):
    path = write("a.jsonl", [{"prompt": f"Q{n}", "completion": "word " * 50} for n in range(5)])
    notes = prepared(path, max_length=30).report.notes
    assert any("100% of the examples are cut at 30 tokens" in note for note in notes)
    assert any("no rows are held out" in note for note in notes)


def test_the_packaged_sample_task_is_prepared(prepared):
    data = prepared(["builtin:orders-eval"], eval_fraction=0.2)
    assert len(data.questions) == len(data.eval) > 20
    assert data.train.row_name(0).startswith("builtin:orders-eval:")


@needs_real
@pytest.mark.parametrize(
    ("path", "options", "examples"),
    [
        ("taskmaster4/dialogs.test.jsonl", {}, (280, 297)),
        ("gsm8k/test.jsonl", {}, (1319, 1319)),
        ("corpus/sgd.test.jsonl.gz", {"objective": Pretrain()}, (280, 600)),
        ("corpus/wikitext2.valid.txt.gz", {"objective": Pretrain(), "max_length": 512}, (500, 3000)),
        ("taskmaster4/feedback.test.jsonl", {}, (200, 323)),
    ],
)
def test_stock_files_are_prepared_as_they_are(prepared, tokenizer, path, options, examples):
    data = prepared(str(REAL / path), **options)
    assert examples[0] <= len(data.train) <= examples[1]
    assert data.report.trained_tokens > 1000
    if not options:
        ends = [data.train.ids(i)[data.train.trained(i)][-1] for i in range(len(data.train))]
        assert np.mean(np.array(ends) == tokenizer.eos_token_id) > 0.9


@needs_real
def test_labelled_csv_needs_its_columns_named(prepared, tokenizer):
    path = str(REAL / "banking77/test.csv")
    with pytest.raises(DataError, match="its columns are text, category"):
        prepared(path)
    data = prepared([{"path": path, "columns": {"prompt": "text", "completion": "category"}}], eval_fraction=0.1)
    assert len(data.train) + len(data.eval) > 3000
    assert set(_trained(data.train, tokenizer)) <= {f"{q}<|im_end|>" for q in _labels(path)}


def _labels(path):
    import csv

    with open(path, newline="") as file:
        return {row["category"] for row in csv.DictReader(file)}
