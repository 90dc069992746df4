"""Labelled rows: how they are recognised, which labels there are, and what is wrong with some."""

import pytest

from ftray.config.objectives import Classification, Regression
from ftray.config.schema import Source
from ftray.data.format import recognise
from ftray.data.labelled import near_names
from ftray.data.prepare import open_prepared
from ftray.errors import DataError

ROWS = [
    {"text": "where is my card", "label": "card_arrival"},
    {"text": "it has not come", "label": "card_arrival"},
    {"text": "lost it in town", "label": "lost_card"},
    {"text": "someone took my wallet", "label": "lost_card"},
]


def targets(store):
    return store.column("label").tolist()


def test_labels_of_the_training_rows_are_numbered_in_sorted_order(prepared, write, storage):
    made = prepared([{"path": write("a.jsonl", ROWS[::-1])}], objective=Classification())
    assert made.labels == ("card_arrival", "lost_card")
    assert targets(made.train) == [1, 1, 0, 0]
    assert made.train.trained_tokens == 0
    assert open_prepared(storage, made.key).labels == made.labels, "every worker sees the same list"
    assert "labels: 2, with training rows: card_arrival 2, lost_card 2" in made.report.lines()


def test_a_run_may_name_its_labels_in_an_order_of_its_own(prepared, write):
    section = Classification(labels=["other", "lost_card", "card_arrival"])
    made = prepared([{"path": write("a.jsonl", ROWS)}], objective=section)
    assert made.labels == ("other", "lost_card", "card_arrival")
    assert targets(made.train) == [2, 2, 1, 1]
    assert any("1 label has fewer than 2 training rows" in note and "'other' (0)" in note for note in made.report.notes)


@pytest.mark.parametrize(
    ("columns", "text", "label"),
    [
        (["text", "category"], "text", "category"),
        (["id", "sentence", "intent"], "sentence", "intent"),
        (["utterance", "class"], "utterance", "class"),
        (["question", "answer"], "question", "answer"),
        (["premise", "hypothesis", "label"], "premise", "label"),
        (["sentence1", "sentence2", "score"], "sentence1", "score"),
    ],
)
def test_the_usual_columns_are_recognised(columns, text, label):
    layout = recognise([dict.fromkeys(columns, "x")], Source(path="a"), objective="classification")
    assert layout.kind == "labelled"
    assert (layout.columns["text"], layout.columns["label"]) == (text, label)
    assert ("pair" in layout.columns) == (len(columns) == 3 and "id" not in columns)


def test_columns_can_be_named_and_what_lacks_is_said(prepared, write):
    rows = [{"body": row["text"], "queue": row["label"]} for row in ROWS]
    path = write("a.jsonl", rows)
    made = prepared([{"path": path, "columns": {"text": "body", "label": "queue"}}], objective=Classification())
    assert made.labels == ("card_arrival", "lost_card")
    with pytest.raises(
        DataError, match="labelled rows, which need columns 'text' and 'label'; its columns are body, queue"
    ):
        prepared([{"path": path, "columns": {"text": "body"}}], objective=Classification())


def test_csv_and_jsonl_say_the_same(prepared, write):
    lines = "".join(f"{row['text']},{row['label']}\n" for row in ROWS)
    one = prepared([{"path": write("a.csv", "text,label\n" + lines)}], objective=Classification())
    other = prepared([{"path": write("a.jsonl", ROWS)}], objective=Classification())
    assert one.labels == other.labels
    assert targets(one.train) == targets(other.train)
    assert one.train.ids(2).tolist() == other.train.ids(2).tolist()


def test_several_labels_are_a_list_or_joined_by_a_bar(prepared, write):
    rows = [
        {"text": "a", "label": ["x", "y"]},
        {"text": "b", "label": "y|z"},
        {"text": "c", "label": '["z"]'},
        {"text": "d", "label": []},
    ]
    made = prepared([{"path": write("a.jsonl", rows)}], objective=Classification(multi_label=True))
    assert made.labels == ("x", "y", "z")
    assert targets(made.train) == [[1, 1, 0], [0, 1, 1], [0, 0, 1], [0, 0, 0]]
    assert [label.train for label in made.report.labels] == [1, 2, 2]


def test_several_labels_where_one_is_learnt_are_dropped_with_the_way_out(prepared, write):
    rows = [*ROWS, {"text": "both", "label": ["lost_card", "card_arrival"]}]
    made = prepared([{"path": write("a.jsonl", rows)}], objective=Classification())
    assert made.report.dropped == {"not one label": 1}
    assert "objective.multi_label: true" in made.report.sources[0].examples[0].reason


def test_numbers_are_labels_in_the_order_of_their_size(prepared, write):
    rows = [{"text": f"row {n}", "stars": n} for n in (10, 2, 1, 10.0)]
    made = prepared([{"path": write("a.jsonl", rows)}], objective=Classification())
    assert made.labels == ("1", "2", "10")
    assert targets(made.train) == [2, 1, 0, 2]


def test_regression_keeps_numbers_and_says_what_they_are_like(prepared, write):
    rows = [{"text": f"row {n}", "score": n} for n in (0.5, "2.5", 40)] + [{"text": "x", "score": "many"}]
    made = prepared([{"path": write("a.jsonl", rows)}], objective=Regression())
    assert targets(made.train) == [0.5, 2.5, 40.0]
    assert made.report.dropped == {"label is not a number": 1}
    assert made.labels == ()
    assert any(note.startswith("values of the training rows: 0.5 to 40") for note in made.report.notes)
    assert any("divide them" in note for note in made.report.notes)


def test_a_second_text_and_where_it_begins_are_kept(prepared, write, make_tokenizer):
    from tokenizers import processors

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", pair="$A <|im_end|> $B:1", special_tokens=[("<|im_end|>", tokenizer.eos_token_id)]
    )
    rows = [{"sentence1": "ab", "sentence2": "cd", "label": "x"}, {"sentence1": "ab", "sentence2": "ef", "label": "y"}]
    made = prepared([{"path": write("a.jsonl", rows)}], objective=Classification(), tokenizer=tokenizer)
    ids, start = made.train.ids(0).tolist(), int(made.train.column("second")[0])
    assert ids[start - 1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[start:]) == "cd"


def test_long_texts_are_cut_and_counted_or_dropped(prepared, write):
    path = write("a.jsonl", [*ROWS, {"text": "card " * 50, "label": "lost_card"}])
    cut = prepared([{"path": path}], objective=Classification(), max_length=20)
    assert cut.report.truncated == 1
    assert int(cut.train.lengths.max()) == 20
    dropped = prepared([{"path": path}], objective=Classification(), max_length=20, too_long="drop")
    assert dropped.report.dropped == {"longer than max_length": 1}


def test_rows_without_a_label_or_a_text_are_dropped_and_counted(prepared, write):
    rows = [*ROWS, {"text": "no label", "label": None}, {"text": " ", "label": "x"}, {"text": "", "label": "lost_card"}]
    made = prepared([{"path": write("a.jsonl", [*rows, {"text": "blank", "label": " "}])}], objective=Classification())
    assert made.report.dropped == {"no label": 2, "empty text": 2}


def test_a_label_that_the_run_does_not_name_is_an_error_with_file_line_and_the_near_one(prepared, write):
    path = write("a.jsonl", [*ROWS, {"text": "hm", "label": "lost_crd"}])
    section = Classification(labels=["card_arrival", "lost_card"])
    with pytest.raises(
        DataError, match=r"a\.jsonl:5: unknown label: 'lost_crd' is not in objective\.labels; did you mea"
    ):
        prepared([{"path": path}], objective=section)


def test_a_held_out_label_that_no_training_row_has_is_an_error(prepared, write):
    held = write("held.jsonl", [{"text": "hm", "label": "lost_crd"}])
    with pytest.raises(DataError, match=r"held\.jsonl:1: .*is in no training row; did you mean 'lost_card'"):
        prepared([{"path": write("a.jsonl", ROWS)}], objective=Classification(), eval_sources=[held])


def test_labels_that_are_one_or_that_are_texts_are_errors(prepared, write):
    same = write("a.jsonl", [{"text": str(n), "label": "x"} for n in range(4)])
    with pytest.raises(DataError, match="every row has the label 'x'; there is nothing to tell apart"):
        prepared([{"path": same}], objective=Classification())
    texts = write("b.jsonl", [{"text": str(n), "label": f"answer {n}"} for n in range(80)])
    with pytest.raises(DataError, match=r"80 different labels in 80 rows of column 'label'; name the labels' column"):
        prepared([{"path": texts}], objective=Classification())


def test_names_that_differ_in_little_are_pointed_out(prepared, write):
    rows = [*ROWS, {"text": "where", "label": "card_arival"}, {"text": "oh where", "label": "card_arival"}]
    made = prepared([{"path": write("a.jsonl", rows)}], objective=Classification())
    assert [note for note in made.report.notes if "'card_arival' and 'card_arrival' differ in little" in note]
    assert list(near_names(["Refund", "refund", "top up", "top_up", "grade 1", "grade 2", "yes", "no"])) == [
        ("Refund", "refund"),
        ("top up", "top_up"),
    ]


def test_a_text_that_is_also_held_out_is_not_trained_on_whatever_its_label(prepared, write):
    held = write("held.jsonl", [{"text": "Where is  my card", "label": "lost_card"}])
    made = prepared([{"path": write("a.jsonl", ROWS)}], objective=Classification(), eval_sources=[held])
    assert made.report.dropped == {"also held out": 1}
    assert len(made.train) == 3


def test_equal_texts_fall_on_one_side_and_equal_rows_are_kept_once(prepared, write):
    rows = [{"text": f"text {n % 40}", "label": str(n % 3)} for n in range(240)]
    made = prepared([{"path": write("a.jsonl", rows)}], objective=Classification(), eval_fraction=0.3)
    sides = [{made.train.ids(i).tobytes() for i in range(len(made.train))}]
    sides.append({made.eval.ids(i).tobytes() for i in range(len(made.eval))})
    assert not sides[0] & sides[1]
    assert made.report.dropped == {"duplicate": 120}


def test_altered_copies_keep_their_label(prepared, write):
    augment = {"copies": 2, "noise": ["swap"]}
    made = prepared([{"path": write("a.jsonl", ROWS)}], objective=Classification(), augment=augment)
    assert [label.train for label in made.report.labels] == [6, 6]


def test_a_tokenizer_is_left_as_it_was(prepared, write, tokenizer):
    before = tokenizer.backend_tokenizer.to_str()
    prepared([{"path": write("a.jsonl", ROWS)}], objective=Classification(), max_length=8)
    assert tokenizer.backend_tokenizer.to_str() == before


def test_rows_of_other_objectives_are_not_labelled_ones(prepared, write):
    with pytest.raises(DataError, match="format labelled is not for sft, which learns from whole answers"):
        prepared([{"path": write("a.jsonl", ROWS), "format": "labelled"}])
