"""Every kind of source gives rows with file and line; what cannot be read is named, not fatal."""

import gzip
import json
import lzma
from pathlib import Path

import pytest

from ftray.config.schema import Source
from ftray.data import sources
from ftray.data.readers import BadRow, Row
from ftray.errors import DataError

REAL = Path(__file__).resolve().parents[2] / "../shared/data"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the shared data sets are not on this machine")
ROWS = [{"prompt": "a", "completion": "1"}, {"prompt": "b", "completion": "2"}]


def _read(path, **source):
    return list(sources.read(Source(path=str(path), **source)))


def _data(path, **source):
    return [row.data for row in _read(path, **source)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"prompt": "a", "completion": "1"}\n\n{"prompt": "b", "completion": "2"}'),
        ("a.jsonl", '\ufeff{"prompt": "a", "completion": "1"}\r\n{"prompt": "b", "completion": "2"}\r\n'),
        ("a.ndjson", '{"prompt": "a", "completion": "1"}\n{"prompt": "b", "completion": "2"}\n'),
        ("a.json", json.dumps(ROWS)),
        ("a.json", json.dumps(ROWS, indent=2)),
        ("a.json", "\ufeff" + json.dumps(ROWS, indent=2)),
        ("a.json", '{"prompt": "a", "completion": "1"}\n{"prompt": "b", "completion": "2"}\n'),
        ("a.csv", "prompt,completion\na,1\nb,2\n"),
        ("a.csv", "\ufeffprompt;completion\r\na;1\r\n\r\nb;2"),
        ("a.tsv", "prompt\tcompletion\na\t1\nb\t2\n"),
    ],
)
def test_the_same_rows_come_from_every_text_format(write, name, content):
    assert _data(write(name, content)) == ROWS


@pytest.mark.parametrize(("extension", "compress"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_compressed_files_are_read_as_they_are(tmp_path, extension, compress):
    for name, text in (
        ("a.jsonl", "\n".join(map(json.dumps, ROWS))),
        ("a.json", json.dumps(ROWS)),
        ("a.csv", "prompt,completion\na,1\nb,2\n"),
    ):
        path = tmp_path / (name + extension)
        path.write_bytes(compress(text.encode()))
        assert _data(path) == ROWS


def test_parquet_keeps_lists_and_objects(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    rows = [{"messages": [{"role": "user", "content": f"é{n}"}]} for n in range(1200)]
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    read = _read(tmp_path / "a.parquet")
    assert [row.data for row in read] == rows
    assert (read[-1].file, read[-1].line) == (str(tmp_path / "a.parquet"), 1200)


def test_a_broken_parquet_file_is_one_clear_error(write):
    with pytest.raises(DataError, match=r"a\.parquet: not a readable Parquet file"):
        _read(write("a.parquet", b"PAR1 nothing"))


def test_bad_lines_are_named_and_the_others_read(write):
    content = b'{"a": 1}\n{"a": \n[1]\n{"a": "\xff"}\nnull\n{"a": 2}\n' + b"[" * 100_000 + b"\n"
    read = _read(write("a.jsonl", content))
    assert [(row.line, row.reason) for row in read if isinstance(row, BadRow)] == [
        (2, "not JSON"),
        (3, "not a JSON object"),
        (4, "not UTF-8"),
        (5, "not a JSON object"),
        (7, "not JSON"),
    ]
    assert [row.line for row in read if isinstance(row, Row)] == [1, 6]


def test_an_array_gives_the_lines_of_its_objects(write):
    read = _read(write("a.json", '[\n {"a": 1},\n {"a":\n 2},\n 7,\n {"a": 3}\n]\n'))
    assert [(row.line, type(row).__name__) for row in read] == [(2, "Row"), (3, "Row"), (5, "BadRow"), (6, "Row")]


def test_a_cut_off_array_names_the_line_and_keeps_what_came_before(write):
    read = _read(write("a.json", '[{"a": 1},\n{"a": 2}, {"a"'))
    assert [type(row) for row in read] == [Row, Row, BadRow]
    assert (read[2].line, read[2].reason) == (2, "not JSON")


def test_an_array_larger_than_the_buffer_is_read(write):
    rows = [{"a": "x" * 70_000 + str(n)} for n in range(5)] + [{"a": "y" * 300_000}]
    assert _data(write("a.json", json.dumps(rows))) == rows


def test_quoted_line_breaks_stay_in_their_field_and_lines_stay_right(write):
    read = _read(write("a.csv", 'text,label\n"one\ntwo, ""three""",x\nplain,y\n'))
    assert [(row.line, row.data) for row in read] == [
        (2, {"text": 'one\ntwo, "three"', "label": "x"}),
        (4, {"text": "plain", "label": "y"}),
    ]


def test_broken_csv_rows_are_named(write):
    read = _read(write("a.csv", b'text,label\na,x,extra\nonly\n\xff,x\n"a"b,x\nfine,y\n"never closed,z\n'))
    assert [(row.line, row.reason) for row in read if isinstance(row, BadRow)] == [
        (2, "wrong number of fields"),
        (3, "wrong number of fields"),
        (4, "not UTF-8"),
        (5, "broken CSV"),
        (7, "broken CSV"),
    ]
    assert [row.data["text"] for row in read if isinstance(row, Row)] == ["fine"]


def test_a_long_csv_field_is_read(write):
    assert len(_data(write("a.csv", "text\n" + "x" * 400_000 + "\n"))[0]["text"]) == 400_000


def test_a_header_that_names_a_column_twice_is_refused(write):
    with pytest.raises(DataError, match=r"a\.csv:1: the header names column 'x' twice"):
        _read(write("a.csv", "x,y,x\n1,2,3\n"))


def test_text_rows_are_whole_paragraphs(write):
    paragraphs = [f"Paragraph {n}. " + "word " * 60 for n in range(30)]
    read = _read(write("a.txt", "\n\n".join(paragraphs) + "\n"))
    assert 1 < len(read) < len(paragraphs)
    assert "\n\n".join(row.data["text"] for row in read) == "\n\n".join(paragraphs)
    assert all(row.data["text"].startswith("Paragraph") for row in read)
    assert [row.line for row in read][:2] == [1, 1 + 2 * read[0].data["text"].count("Paragraph")]


def test_text_without_blank_lines_is_cut_at_line_ends(write):
    read = _read(write("a.txt", "".join(f"line {n} with some words\n" for n in range(2000))))
    assert len(read) > 3
    assert all(row.data["text"].startswith("line ") for row in read)


def test_a_bad_byte_in_text_costs_its_line_only(write):
    read = _read(write("a.txt", b"good\nbad \xff byte\nalso good\n"))
    assert [(row.line, row.reason) for row in read if isinstance(row, BadRow)] == [(2, "not UTF-8")]
    assert [row.data["text"] for row in read if isinstance(row, Row)] == ["good\nalso good"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt", "a.json"])
def test_utf_16_is_an_error_that_says_how_to_convert(write, name):
    with pytest.raises(DataError, match="iconv"):
        _read(write(name, '{"a": 1}\n'.encode("utf-16")))


def test_a_cut_off_gzip_names_the_last_good_line(tmp_path):
    whole = gzip.compress("".join(json.dumps({"n": n, "x": "y" * (n % 97)}) + "\n" for n in range(20_000)).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: broken after line \d+.*fetch it again"):
        _read(tmp_path / "a.jsonl.gz")


def test_a_file_that_is_not_gzip_says_so(write):
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: cannot be read: Not a gzipped file"):
        _read(write("a.jsonl.gz", b"plain"))


def test_an_empty_file_has_no_rows(write):
    for name in ("a.jsonl", "a.json", "a.csv", "a.txt"):
        assert _read(write(name, b"")) == []


def test_a_missing_file_suggests_its_neighbour(write):
    path = write("train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"no such file or folder; did you mean .*train\.jsonl\?"):
        _read(Path(path).with_name("trian.jsonl"))


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"the folder .*/nowhere does not exist"):
        _read(tmp_path / "nowhere" / "deep" / "a.jsonl")


def test_an_unknown_extension_lists_the_known_ones(write):
    with pytest.raises(DataError, match=r"a\.xlsx: unknown file format; known are \.jsonl"):
        _read(write("a.xlsx", b"x"))


def test_a_folder_gives_its_files_in_order_without_papers_and_hidden_ones(write, tmp_path):
    write("d/b.jsonl", [{"n": 2}])
    write("d/a/x.csv", "n\n1\n")
    write("d/README.md", "about")
    write("d/.cache/c.jsonl", [{"n": 3}])
    assert _data(tmp_path / "d") == [{"n": "1"}, {"n": 2}]


def test_a_folder_with_splits_gives_the_training_part_unless_another_is_named(write, tmp_path):
    write("d/train.jsonl", [{"n": 1}])
    write("d/test.jsonl", [{"n": 2}])
    write("d/dev-00001.jsonl", [{"n": 3}])
    assert _data(tmp_path / "d") == [{"n": 1}]
    assert _data(tmp_path / "d", split="test") == [{"n": 2}]
    assert _data(tmp_path / "d", split="validation") == [{"n": 3}]
    with pytest.raises(DataError, match="no file of split 'gold'; splits by file name: test, train, validation"):
        _read(tmp_path / "d", split="gold")


def test_a_folder_without_data_files_is_an_error(write, tmp_path):
    write("d/notes.docx", b"x")
    with pytest.raises(DataError, match="no data files in it"):
        _read(tmp_path / "d")


def test_a_glob_takes_what_matches(write, tmp_path):
    for name in ("a-1", "a-2", "b-1"):
        write(f"{name}.jsonl", [{"n": name}])
    assert _data(tmp_path / "a-*.jsonl") == [{"n": "a-1"}, {"n": "a-2"}]
    with pytest.raises(DataError, match="no file matches"):
        _read(tmp_path / "c-*.jsonl")


def test_uris_are_read_through_fsspec(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/a.jsonl", b'{"n": 1}\n')
    memory.pipe("/bucket/b.jsonl.gz", gzip.compress(b'{"n": 2}\n'))
    assert _data("memory://bucket/a.jsonl") == [{"n": 1}]
    assert _data("memory://bucket") == _data("memory://bucket/*") == [{"n": 1}, {"n": 2}]
    before = sources.digest(Source(path="memory://bucket"))
    memory.pipe("/bucket/a.jsonl", b'{"n": 10}\n')
    assert sources.digest(Source(path="memory://bucket")) != before
    with pytest.raises(DataError, match="no such file or folder"):
        _read("memory://bucket/none.jsonl")
    with pytest.raises(DataError, match="nosuch"):
        _read("nosuch://bucket/a.jsonl")
    memory.rm("/bucket", recursive=True)


def test_a_digest_follows_the_bytes(write):
    path = write("a.jsonl", ROWS)
    before = sources.digest(Source(path=path))
    assert sources.digest(Source(path=path)) == before
    write("a.jsonl", ROWS[:1])
    assert sources.digest(Source(path=path)) != before


@pytest.fixture
def offline(monkeypatch, tmp_path):
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_a_hub_data_set_folder_is_read_through_datasets(offline, write, tmp_path):
    write("hub/data/first.jsonl", ROWS)
    write("hub/data/second.jsonl", ROWS[:1])
    card = "---\nconfigs:\n- config_name: main\n  data_files:\n  - {split: train, path: data/first.jsonl}\n"
    write("hub/README.md", card + "  - {split: test, path: data/second.jsonl}\n---\n# A data set\n")
    read = _read(tmp_path / "hub", subset="main")
    assert [row.data for row in read] == ROWS
    assert (read[1].file, read[1].line) == (str(tmp_path / "hub"), 2)
    assert _data(tmp_path / "hub", split="test") == ROWS[:1]
    with pytest.raises(DataError, match=r"hub: cannot be loaded: .*nope"):
        _read(tmp_path / "hub", split="nope")
    with pytest.raises(DataError, match=r"hub: cannot be loaded: .*other"):
        _read(tmp_path / "hub", subset="other")


def test_a_data_set_saved_to_disk_is_read(offline, tmp_path):
    import datasets

    saved = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    )
    saved.save_to_disk(str(tmp_path / "saved"))
    assert _data(tmp_path / "saved") == ROWS
    assert _data(tmp_path / "saved", split="test") == ROWS[:1]
    assert len(sources.digest(Source(path=str(tmp_path / "saved")))) == 64
    with pytest.raises(DataError, match="no split 'dev'; it has train, test"):
        _read(tmp_path / "saved", split="dev")


def test_class_numbers_of_a_data_set_are_read_as_their_names(offline, tmp_path):
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 0}, {"text": "c", "label": None}]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    assert [row["label"] for row in _data(tmp_path / "saved")] == ["yes", "no", None]


def test_a_hub_name_that_cannot_be_reached_says_what_to_check(offline):
    with pytest.raises(DataError, match="neither a file here nor a data set that the Hub gives us"):
        _read("nobody/nothing-here")
    with pytest.raises(DataError, match="neither a file here"):
        sources.digest(Source(path="nobody/nothing-here"))


def test_the_packaged_rows_are_a_source():
    read = _read("builtin:orders-eval")
    assert "messages" in read[0].data
    assert read[0].line == 1
    assert sources.digest(Source(path="builtin:orders-eval")) != sources.digest(Source(path="builtin:orders"))
    with pytest.raises(DataError, match="no such built-in"):
        _read("builtin:nope")


@needs_real
@pytest.mark.parametrize(
    ("path", "rows"),
    [
        ("taskmaster4/dialogs.test.jsonl", 297),
        ("corpus/sgd.test.jsonl.gz", 286),
        ("gsm8k/test.jsonl", 1319),
        ("banking77/test.csv", 3080),
    ],
)
def test_stock_files_are_read_whole(path, rows):
    read = _read(REAL / path)
    assert len(read) == rows
    assert not [row for row in read if isinstance(row, BadRow)]
