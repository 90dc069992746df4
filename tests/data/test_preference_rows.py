"""Pairs and judged answers: how rows are laid out, what they become, and what is dropped, with its name."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from ftray.config.objectives import Dpo, Kto, Orpo, Sft
from ftray.config.schema import Source
from ftray.data.encode_preferences import PairEncoder
from ftray.data.format import Unusable, recognise
from ftray.errors import DataError

REAL = Path(__file__).resolve().parents[2] / "../shared/data"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the shared data sets are not on this machine")
ASK = [{"role": "user", "content": "a"}]
GIVEN = [{"role": "assistant", "content": "b"}]
OTHER = [{"role": "assistant", "content": "c"}]
PAIRS = [{"prompt": f"Question {n}?", "chosen": f"Right {n}.", "rejected": f"Wrong {n}!"} for n in range(20)]
JUDGED = [{"prompt": f"Question {n}?", "completion": f"Answer {n}.", "label": n % 2 == 0} for n in range(20)]


def layout(*rows, objective="dpo", template=None, system=None, **source):
    return recognise(rows, Source(path="x.jsonl", **source), objective=objective, template=template, system=system)


def both(row, **options):
    example = layout(row, **options).example(row)
    return example.messages, example.rejected


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"question": "a", "chosen": "b", "rejected": "c"},
        {"prompt": ASK, "chosen": GIVEN, "rejected": OTHER},
        {"prompt": json.dumps(ASK), "chosen": json.dumps(GIVEN), "rejected": json.dumps(OTHER)},
        {"chosen": ASK + GIVEN, "rejected": ASK + OTHER},
        {"prompt": "a", "chosen": ASK + GIVEN, "rejected": ASK + OTHER, "score_chosen": 5},
        {"prompt": ASK, "chosen": "b", "rejected": OTHER},
    ],
    ids=["texts", "question", "messages", "json", "implicit", "repeated", "mixed"],
)
@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_every_layout_of_a_pair_gives_the_same_conversations(row, objective):
    assert layout(row, objective=objective).kind == "pairs"
    assert both(row, objective=objective) == (ASK + GIVEN, ASK + OTHER)
    assert layout(row).example(row).shared == 1


def test_what_both_begin_with_is_the_prompt_earlier_answers_included():
    talk = [*ASK, {"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]
    row = {"chosen": talk + GIVEN, "rejected": talk + OTHER}
    assert layout(row).example(row).shared == 3


def test_a_system_message_comes_from_the_row_or_from_the_run():
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "system": "S"}
    chosen, rejected = both(row, system="run's")
    assert chosen[0] == rejected[0] == {"role": "system", "content": "S"}
    del row["system"]
    assert both(row, system="run's")[1][0]["content"] == "run's"


def test_columns_are_mapped_and_a_template_fills_the_prompt():
    row = {"q": "a", "good": "b", "worse": "c", "lang": "en"}
    columns = {"prompt": "q", "chosen": "good", "rejected": "worse"}
    chosen, _ = both(row, columns=columns, template="[{lang}] {prompt}")
    assert chosen[0]["content"] == "[en] a"


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "no value in column 'rejected'"),
        ({"prompt": "a", "chosen": None, "rejected": "b"}, "no value in column 'chosen'"),
        ({"prompt": None, "chosen": "c", "rejected": "b"}, "no value in column 'prompt'"),
        ({"chosen": ASK + GIVEN, "rejected": [{"role": "user", "content": "z"}, *OTHER]}, "the same prompt"),
        ({"chosen": GIVEN, "rejected": OTHER}, "the same prompt"),
        ({"chosen": ASK + GIVEN, "rejected": ASK + GIVEN + ASK + OTHER}, "chosen has no answer"),
    ],
    ids=["same", "no rejected", "no chosen", "no prompt", "other prompts", "nothing shared", "prefix"],
)
def test_a_row_that_is_no_pair_says_why(row, kind):
    known = layout({name: value or "x" for name, value in row.items()})
    with pytest.raises(Unusable, match=kind):
        known.example(row)


@pytest.mark.parametrize(
    ("label", "good"),
    [(True, True), (False, False), (1, True), (0, False), ("good", True), ("Bad", False), ("True", True), (-1, False)],
)
def test_a_label_is_read_as_people_write_it(label, good):
    row = {"prompt": "a", "completion": "b", "label": label}
    found = layout(row, objective="kto")
    assert found.kind == "judged"
    assert found.example(row).good is good
    assert found.example(row).messages == ASK + GIVEN


@pytest.mark.parametrize("label", ["perhaps", 2, 0.5, [], "1e0"])
def test_another_label_is_named(label):
    known = layout({"prompt": "a", "completion": "b", "label": 1}, objective="kto")
    with pytest.raises(Unusable, match=r"a label is neither good nor bad: .*write true or false"):
        known.example({"prompt": "a", "completion": "b", "label": label})


@pytest.mark.parametrize(
    ("row", "objective", "said"),
    [
        (
            {"prompt": "a", "completion": "b"},
            "dpo",
            r"dpo learns from pairs.*'chosen' and 'rejected'.*prompt, completion",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "kto", "kto learns from judged.*'completion' and 'label'"),
        ({"prompt": "a", "completion": "b"}, "kto", "kto learns from judged"),
    ],
)
def test_rows_that_an_objective_cannot_compare_are_an_error(row, objective, said):
    with pytest.raises(DataError, match=said):
        layout(row, objective=objective)
    with pytest.raises(DataError, match=said):
        layout(row, objective=objective, format="prompt_completion")


def test_pairs_are_not_read_by_an_objective_that_compares_nothing():
    with pytest.raises(DataError, match="format pairs is not for sft, which learns from whole answers"):
        layout({"prompt": "a", "chosen": "b", "rejected": "c"}, objective="sft", format="pairs")


def halves(store, row):
    cut = int(store.column("cut")[row])
    return [(store.ids(row)[part], store.trained(row)[part]) for part in (slice(None, cut), slice(cut, None))]


def test_a_pair_is_two_texts_each_as_sft_would_train_it(write, prepared, tokenizer):
    data = prepared(write("a.jsonl", PAIRS), objective=Dpo())
    assert len(data.train) == 20
    for side, name in enumerate(("chosen", "rejected")):
        rows = [{"prompt": pair["prompt"], "completion": pair[name]} for pair in PAIRS]
        alone = prepared(write(f"{name}.jsonl", rows), objective=Sft()).train
        for row in range(20):
            ids, trained = halves(data.train, row)[side]
            assert ids.tolist() == alone.ids(row).tolist()
            assert trained.tolist() == alone.trained(row).tolist()
    assert data.report.preview.startswith("chosen: <|im_start|>user\nQuestion 0?")
    assert "\nrejected: " in data.report.preview
    assert "«Wrong 0!<|im_end|>»" in data.report.preview


def test_earlier_answers_of_a_conversation_are_not_trained(write, prepared, tokenizer):
    talk = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes?"}, *ASK]
    data = prepared(write("a.jsonl", [{"chosen": talk + GIVEN, "rejected": talk + OTHER}]), objective=Orpo())
    texts = [tokenizer.decode(ids[trained]) for ids, trained in halves(data.train, 0)]
    assert texts == ["b<|im_end|>", "c<|im_end|>"]


def test_held_out_prompts_are_asked_once_the_chosen_answer_is_expected(write, prepared, tokenizer):
    held = write("held.jsonl", PAIRS[:3])
    data = prepared(write("a.jsonl", PAIRS), objective=Dpo(), eval_sources=held)
    assert [question.answer for question in data.questions] == ["Right 0.", "Right 1.", "Right 2."]
    assert tokenizer.decode(data.questions[0].prompt_ids).endswith("Question 0?<|im_end|>\n<|im_start|>assistant\n")
    assert data.report.dropped == {"also held out": 3}
    judged = prepared(write("j.jsonl", JUDGED), objective=Kto(), eval_sources=write("k.jsonl", JUDGED[:3]))
    assert [question.answer for question in judged.questions] == ["Answer 0.", "Answer 2."]
    assert judged.eval.column("good").tolist() == [1, 0, 1]


def test_rows_with_one_prompt_fall_on_one_side(write, prepared):
    rows = [{**pair, "prompt": f"Question {n % 4}?"} for n, pair in enumerate(PAIRS)]
    data = prepared(write("a.jsonl", rows), objective=Dpo(), eval_fraction=0.3)
    trained_on, held_out = (
        {store.ids(row)[: int(np.argmax(store.trained(row)))].tobytes() for row in range(len(store))}
        for store in (data.train, data.eval)
    )
    assert len(trained_on) + len(held_out) == 4
    assert trained_on
    assert held_out


def test_a_pair_is_a_duplicate_only_where_both_answers_are(write, prepared):
    rows = [*PAIRS[:2], {**PAIRS[0], "rejected": "Also wrong."}, PAIRS[1]]
    data = prepared(write("a.jsonl", rows), objective=Dpo())
    assert len(data.train) == 3
    assert data.report.dropped == {"duplicate": 1}
    judged = [JUDGED[0], {**JUDGED[0], "label": False}, JUDGED[1], JUDGED[1]]
    assert len(prepared(write("j.jsonl", judged), objective=Kto()).train) == 3  # two people may disagree


def test_what_is_too_long_is_cut_on_both_sides_or_dropped_by_name(write, prepared):
    long = "word " * 60
    rows = [
        *PAIRS[:3],
        {"prompt": "p", "chosen": long + "end.", "rejected": "Short."},
        {"prompt": long, "chosen": "b", "rejected": "c"},
        {"prompt": "q", "chosen": long + "one", "rejected": long + "two"},
    ]
    data = prepared(write("a.jsonl", rows), objective=Dpo(), max_length=64)
    assert len(data.train) == 4
    assert max(len(ids) for row in range(4) for ids, _ in halves(data.train, row)) == 64
    source = data.report.sources[0]
    assert source.truncated == 1
    reasons = {dropped.line: dropped.reason for dropped in source.examples}
    assert reasons[5] == "no trained tokens: the prompt alone fills max_length, 64 tokens"
    assert reasons[6] == "chosen and rejected are the same: in the first 64 tokens"
    dropped = prepared(write("a.jsonl", rows), objective=Dpo(), max_length=64, too_long="drop")
    assert dropped.report.dropped == {"longer than max_length": 3}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        ({"prompt": "a", "chosen": "b ", "rejected": "b"}, "chosen and rejected are the same: once rendered"),
        ({"prompt": "", "chosen": "b", "rejected": "c"}, "empty prompt"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "empty answer"),
        ({"prompt": "a", "chosen": "b"}, "no value in column 'rejected'"),
    ],
)
def test_a_bad_pair_is_dropped_and_named_and_an_error_where_the_run_is_strict(
    write, prepared, make_tokenizer, row, said
):
    trims = make_tokenizer(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'].strip() + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    path = write("a.jsonl", [*PAIRS[:2], row])
    data = prepared(path, objective=Dpo(), tokenizer=trims)
    assert len(data.train) == 2
    assert data.report.sources[0].examples[0].line == 3
    assert said in data.report.sources[0].examples[0].reason
    with pytest.raises(DataError, match=rf"a\.jsonl:3: {said}"):
        prepared(path, objective=Dpo(), tokenizer=trims, strict=True)


@pytest.mark.parametrize("label", [True, False])
def test_labels_that_are_all_alike_are_an_error(write, prepared, label):
    rows = [{**row, "label": label} for row in JUDGED]
    with pytest.raises(DataError, match=f"all 20 answers to learn from are {'good' if label else 'bad'}"):
        prepared(write("a.jsonl", rows), objective=Kto())


def test_labels_of_which_one_is_rare_are_told_with_the_weight_that_balances_them(write, prepared):
    rows = [{**row, "label": n % 4 > 0} for n, row in enumerate(JUDGED)]
    told = [note for note in prepared(write("a.jsonl", rows), objective=Kto()).report.notes if "good" in note]
    assert told == ["note: 15 good and 5 bad answers; they weigh alike with objective.undesirable_weight: 3"]
    even = prepared(write("b.jsonl", JUDGED), objective=Kto())
    assert not [note for note in even.report.notes if "good" in note]


def test_an_encoder_of_pairs_pickles_with_its_options(tokenizer):
    encoder = pickle.loads(pickle.dumps(PairEncoder(tokenizer, objective="dpo", max_length=77, too_long="drop")))
    assert (type(encoder), encoder.objective, encoder.max_length, encoder.too_long) == (PairEncoder, "dpo", 77, "drop")


@needs_real
@pytest.mark.parametrize(
    ("name", "objective", "kept"),
    [
        ("gsm8k/preferences.test.jsonl", Dpo(), 243),
        ("taskmaster4/feedback.test.jsonl", Kto(), 319),
    ],
)
def test_real_rows_are_read(prepared, tokenizer, name, objective, kept):
    data = prepared(str(REAL / name), objective=objective, max_length=4096)
    assert data.report.rows_kept == kept
    assert np.all(data.train.trained_counts > 0)
