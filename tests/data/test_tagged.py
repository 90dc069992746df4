"""Tagged rows: how CoNLL files are read, which token carries a word's tag, and what is wrong with some."""

import numpy as np
import pytest

from ftray.config.load import run_from
from ftray.config.objectives import TokenClassification
from ftray.config.schema import Source
from ftray.data import sources
from ftray.data.tagged import first_tokens, mended, tag_names
from ftray.data.tokens import TokenStore, TokenWriter
from ftray.errors import ConfigError, DataError

CONLL = """-DOCSTART- -X- -X- O

# a comment, and # O is none
Empire\tB-location
State\tI-location
 Building \t I-location
#sunset\tO
\t
Ada   B-person
met NNP O
# O
Grace B-person
"""
ROWS = [
    {"tokens": ["Empire", "State", "Building", "#sunset"], "tags": ["B-location", "I-location", "I-location", "O"]},
    {"tokens": ["Ada", "met", "#", "Grace"], "tags": ["B-person", "O", "O", "B-person"]},
]


def tags(made, row, store=None):
    store = store or made.train
    return [made.labels[tag] for tag in store.stream_of("tag", row)]


def marked(store, row, tokenizer):
    """What the trained tokens of a row stand for."""
    return [tokenizer.decode(int(id)).strip() for id in store.ids(row)[store.trained(row)]]


def test_a_conll_file_says_the_same_as_its_rows_in_json(prepared, write):
    one = prepared([{"path": write("a.conll", CONLL)}], objective=TokenClassification())
    other = prepared([{"path": write("a.jsonl", ROWS)}], objective=TokenClassification())
    assert one.labels == other.labels == ("O", "B-location", "I-location", "B-person")
    for row in range(2):
        assert one.train.ids(row).tolist() == other.train.ids(row).tolist()
        assert tags(one, row) == tags(other, row) == ROWS[row]["tags"]
    assert [one.train.row_name(row).rsplit("/", 1)[1] for row in range(2)] == ["a.conll:4", "a.conll:9"]
    assert one.train.trained_tokens == one.report.trained_tokens == 8
    assert "labels: 4, with training words: O 3, B-person 2, I-location 2, B-location 1" in one.report.lines()


@pytest.mark.parametrize("name", ["a.bio", "a.iob", "a.txt", "a.ner", "a.conll"])
def test_a_file_of_another_name_is_conll_where_the_run_says_so(write, name):
    path = write(name, "a O\n\nb O\nc O")
    rows = list(sources.read(Source(path=path, format="conll")))
    assert [row.data for row in rows] == [
        {"tokens": ["a"], "tags": ["O"]},
        {"tokens": ["b", "c"], "tags": ["O", "O"]},
    ]
    assert [row.line for row in rows] == [1, 3]


def test_a_no_break_space_is_a_word_and_a_word_may_hold_one(write):
    [row] = sources.read(Source(path=write("a.conll", "\u00a0\tO\n10\u00a0km\tB-x\n")))
    assert row.data == {"tokens": ["\u00a0", "10\u00a0km"], "tags": ["O", "B-x"]}


def test_a_line_without_a_tag_costs_its_sentence_and_is_named(prepared, write):
    path = write("a.conll", CONLL + "\nthe O\nlone\nword O\n\n" + "one O\ntwo B-location\n")
    made = prepared([{"path": path}], objective=TokenClassification())
    assert made.report.dropped == {"a word without a tag": 1}
    [dropped] = made.report.sources[0].examples
    assert (dropped.line, dropped.reason.partition(";")[0]) == (14, "a word without a tag: line 15 is 'lone'")
    assert len(made.train) == 3


def test_other_columns_and_numbers_with_names_are_read(prepared, write):
    names = ["O", "B-person", "I-person"]
    rows = [{"id": "0", "words": ["Ada", "Lovelace", "wrote"], "ner_tags": [1, 2, 0]}]
    path = write("a.jsonl", rows)
    made = prepared([{"path": path}], objective=TokenClassification(labels=names))
    assert tags(made, 0) == ["B-person", "I-person", "O"]
    with pytest.raises(DataError, match=r"a\.jsonl:1: tags are numbers: say what each is called in objective\.labels"):
        prepared([{"path": path}], objective=TokenClassification())
    with pytest.raises(DataError, match=r"a\.jsonl:1: unknown label: number 2, and objective\.labels has 0 to 1"):
        prepared([{"path": path}], objective=TokenClassification(labels=names[:2]))


def test_numbers_of_a_saved_data_set_have_its_own_names(prepared, tmp_path):
    from datasets import ClassLabel, Dataset, Features, Sequence, Value

    features = Features({"tokens": Sequence(Value("string")), "ner_tags": Sequence(ClassLabel(names=["O", "B-x"]))})
    Dataset.from_dict({"tokens": [["a", "b"]], "ner_tags": [[0, 1]]}, features=features).save_to_disk(tmp_path / "set")
    made = prepared([{"path": str(tmp_path / "set")}], objective=TokenClassification())
    assert tags(made, 0) == ["O", "B-x"]


def test_the_first_token_of_each_word_carries_its_tag(prepared, write, tokenizer):
    made = prepared([{"path": write("a.jsonl", ROWS)}], objective=TokenClassification())
    store = made.train
    assert tokenizer.decode(store.ids(0)) == "Empire State Building #sunset"
    firsts = marked(store, 0, tokenizer)
    assert len(store.ids(0)) > len(firsts) == 4, "words of several tokens"
    assert all(word.startswith(first) for word, first in zip(ROWS[0]["tokens"], firsts, strict=True))
    assert "-> B-location I-location I-location O" in made.report.preview


def test_tokens_are_told_by_their_characters():
    #           w0 = "ab", w1 = "c", w2 = "", w3 = "dé"; special tokens stand for none
    words = ["ab", "c", "", "dé"]
    assert first_tokens(words, [(0, 0), (0, 1), (1, 2), (2, 4), (4, 7), (7, 8), (0, 0)]) == {0: 1, 1: 3, 3: 4}
    assert first_tokens(words, [(0, 4), (6, 8)]) == {0: 0, 3: 1}, "a token over two words is the first one's"


def test_i_tags_that_go_on_with_nothing_are_counted_and_read_as_b(prepared, write):
    assert mended(["I-x", "I-x", "O", "I-x", "I-y", "B-y", "I-y"]) == (
        ["B-x", "I-x", "O", "B-x", "B-y", "B-y", "I-y"],
        3,
    )
    path = write("a.jsonl", [{"tokens": ["Ada", "Lovelace", "!"], "tags": ["I-person", "I-person", "O"]}])
    made = prepared([{"path": path}], objective=TokenClassification())
    assert tags(made, 0) == ["B-person", "I-person", "O"]
    assert "note: 1 I- tags go on with nothing and are read as B-" in made.report.notes
    with pytest.raises(DataError, match=r"a\.jsonl:1: an I- tag goes on with nothing: token 1, 'Ada', is 'I-person'"):
        prepared([{"path": path}], objective=TokenClassification(), strict=True)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "numbers of tokens and tags differ: 2 tokens, 1 tags"),
        ({"tokens": "a b", "tags": ["O"]}, "column 'tokens' is not a list: str"),
        ({"tokens": [], "tags": []}, "column 'tokens' is empty"),
        ({"tokens": ["a", None], "tags": ["O", "O"]}, "a token is not text: None"),
        ({"tokens": ["a"], "tags": [None]}, "a tag is not text: None"),
    ],
)
def test_bad_rows_are_dropped_with_file_and_line_or_end_a_strict_run(prepared, write, row, reason):
    path = write("a.jsonl", [*ROWS, row])
    made = prepared([{"path": path}], objective=TokenClassification())
    [dropped] = made.report.sources[0].examples
    assert (dropped.line, dropped.reason) == (3, reason)
    assert len(made.train) == 2
    with pytest.raises(DataError, match=r"a\.jsonl:3: "):
        prepared([{"path": path}], objective=TokenClassification(), strict=True)


def test_a_held_out_tag_that_no_training_row_has_is_an_error(prepared, write):
    held = write("held.conll", "Ada B-persn\n")
    with pytest.raises(DataError, match=r"held\.conll:1: .*'B-persn' is in no training row; did you mean 'B-person'"):
        prepared([{"path": write("a.conll", CONLL)}], objective=TokenClassification(), eval_sources=[held])


def test_a_tag_that_the_run_does_not_name_is_an_error(prepared, write):
    section = TokenClassification(labels=["O", "B-location", "I-location"])
    with pytest.raises(DataError, match=r"a\.conll:9: unknown label: 'B-person' is not in objective\.labels"):
        prepared([{"path": write("a.conll", CONLL)}], objective=section)


def test_schemes_that_mark_ends_are_refused_and_other_tags_are_not(prepared, write):
    path = write("a.conll", "Ada S-person\nAda B-person\nLovelace E-person\n! O\n")
    with pytest.raises(DataError, match="'E-person' are of BIOES or BILOU, and BIO is read; write S- and U- as B-"):
        prepared([{"path": path}], objective=TokenClassification())
    words = write("b.conll", "Ada PROPN\nwrites VERB\n")
    assert prepared([{"path": words}], objective=TokenClassification()).labels == ("PROPN", "VERB")


def test_words_behind_max_length_are_counted(prepared, write):
    path = write("a.jsonl", [*ROWS, {"tokens": ["Ada"] * 50, "tags": ["O"] * 50}])
    made = prepared([{"path": path}], objective=TokenClassification(), max_length=40)
    assert made.report.truncated == 1
    lost = 50 - len(made.train.stream_of("tag", 2))
    assert f"note: {lost} words have no token of their own, most of them behind max_length; they are not learnt or" in (
        " ".join(made.report.notes)
    )
    dropped = prepared([{"path": path}], objective=TokenClassification(), max_length=40, too_long="drop")
    assert dropped.report.dropped == {"longer than max_length": 1}


def test_one_tag_alone_is_an_error(prepared, write):
    with pytest.raises(DataError, match=r"a\.conll: every word has the tag 'O'; there is nothing to tell apart"):
        prepared([{"path": write("a.conll", "a O\nb O\n")}], objective=TokenClassification())


def test_rows_of_another_kind_are_refused_with_what_is_needed(prepared, write):
    with pytest.raises(DataError, match="tagged rows, which need columns 'tokens' and 'tags', or a CoNLL file; its"):
        prepared([{"path": write("a.jsonl", [{"text": "a", "label": "b"}])}], objective=TokenClassification())
    with pytest.raises(DataError, match="format tagged is not for sft"):
        prepared([{"path": write("a.conll", CONLL), "format": "conll"}])


def test_a_tokenizer_that_does_not_say_where_tokens_stand_is_refused(write):
    from types import SimpleNamespace

    from ftray.config.schema import Data
    from ftray.data.encoders import encoder_for

    data = Data(sources=[write("a.conll", CONLL)])
    with pytest.raises(DataError, match=r"is not a fast tokenizer; the model needs a tokenizer\.json"):
        encoder_for(data, TokenClassification(), SimpleNamespace())


def test_sentences_that_repeat_are_kept_once_and_never_on_both_sides(prepared, write):
    rows = [{"tokens": ["word", str(n % 40)], "tags": ["O", "B-x"]} for n in range(80)]
    made = prepared([{"path": write("a.jsonl", rows)}], objective=TokenClassification(), eval_fraction=0.3)
    assert made.report.dropped == {"duplicate": 40}
    sides = [{store.ids(i).tobytes() for i in range(len(store))} for store in (made.train, made.eval)]
    assert sides[1]
    assert not sides[0] & sides[1]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.template='{text}'", r"data\.template: token_classification reads rows as they are"),
        ("data.augment.copies=2", r"data\.augment\.copies: token_classification has a tag for each word"),
        ("data.packing=on", r"data\.packing: token_classification reads each text in a row of its own"),
        ("objective.labels=[O]", r"objective\.labels: one label alone tells nothing apart"),
        ("objective.labels=[O, B-x, O]", r"objective\.labels: 'O' stands there twice"),
    ],
)
def test_what_makes_no_sense_for_tags_is_said_when_the_run_is_read(override, said):
    run = {"name": "a", "data": {"sources": "a.conll"}, "objective": {"kind": "token_classification"}}
    with pytest.raises(ConfigError, match=said):
        run_from(run, [override])


def test_names_are_in_one_order_whatever_the_rows(write):
    from ftray.config.schema import Data

    rows = [{"tokens": list("abcde"), "tags": ["B-b", "I-b", "O", "B-a", "I-a"]}]
    assert tag_names(Data(sources=[write("a.jsonl", rows)])) == ("O", "B-a", "I-a", "B-b", "I-b")


def test_a_store_keeps_values_of_trained_tokens(tmp_path):
    ids, trained = np.arange(6), np.array([1, 0, 1, 0, 0, 1], bool)
    with TokenWriter(tmp_path, 10) as writer:
        writer.extend(ids, trained, [3, 1, 2], [(0, 0, 1)] * 3, streams={"tag": np.array([7, 8, 9])})
        writer.extend(ids[:1], trained[:1], [1], [(0, 0, 2)], streams={"tag": np.array([5])})
        with pytest.raises(ValueError, match="stream tag: 2 values for 1 trained tokens"):
            writer.extend(ids[:1], trained[:1], [1], [(0, 0, 2)], streams={"tag": np.array([5, 6])})
    store = TokenStore.open(tmp_path)
    assert [store.stream_of("tag", i).tolist() for i in range(4)] == [[7, 8], [], [9], [5]]
    assert store.stream("tag").tolist() == [7, 8, 9, 5]
