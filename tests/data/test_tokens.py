"""The token store gives back what was written, from disk, and says where it came from."""

import pickle

import numpy as np
import pytest

from ftray.data.order import epoch_rows, order
from ftray.data.tokens import TokenStore, TokenWriter
from ftray.errors import DataError


def _store(folder, sources, vocab_size=100, tasks=("a", "b")):
    with TokenWriter(folder, vocab_size, tasks) as writer:
        for line, source in enumerate(sources, 1):
            ids = np.arange(line)
            writer.add(ids, ids % 2 == 0, source, line, f"{source}.jsonl")
    return TokenStore.open(folder)


def test_what_is_written_is_read_back(tmp_path):
    store = _store(tmp_path, [0, 0, 1])
    assert len(store) == 3
    assert store.lengths.tolist() == [1, 2, 3]
    assert store.ids(2).tolist() == [0, 1, 2]
    assert store.trained(2).tolist() == [True, False, True]
    assert store.trained_counts.tolist() == [1, 1, 2]
    assert (store.tokens, store.trained_tokens) == (6, 4)
    assert (store.row_name(2), store.task(2), store.task(0)) == ("1.jsonl:3", "b", "a")
    assert store.ids(-1).tolist() == [0, 1, 2]


@pytest.mark.parametrize(("vocab_size", "bytes_per_id"), [(1 << 16, 2), ((1 << 16) + 1, 4)])
def test_ids_take_two_bytes_where_the_vocabulary_fits(tmp_path, vocab_size, bytes_per_id):
    with TokenWriter(tmp_path, vocab_size) as writer:
        writer.add([vocab_size - 1, 0], [True, False], 0, 1)
    assert (tmp_path / "ids.bin").stat().st_size == 2 * bytes_per_id
    assert TokenStore.open(tmp_path).ids(0).tolist() == [vocab_size - 1, 0]


def test_examples_added_together_are_as_if_added_one_by_one(tmp_path):
    with TokenWriter(tmp_path / "many", 100) as writer:
        file = writer.file_number("x")
        writer.extend(np.array([1, 2, 3]), np.array([0, 1, 1]), [1, 2], [(0, file, 1), (1, file, 9)])
    store = TokenStore.open(tmp_path / "many")
    assert store.trained_counts.tolist() == [0, 2]
    assert store.row_name(1) == "x:9"
    assert store.sources.tolist() == [0, 1]


def test_an_empty_store_can_be_opened(tmp_path):
    store = _store(tmp_path, [])
    assert (len(store), store.tokens, store.trained_tokens) == (0, 0, 0)
    assert order(store, [1.0], 0, 0).tolist() == []


def test_a_store_crosses_processes_as_its_path(tmp_path):
    store = _store(tmp_path, [0, 1])
    packed = pickle.dumps(store)
    assert len(packed) < 400
    assert pickle.loads(packed).ids(1).tolist() == [0, 1]


def test_an_unfinished_store_is_an_error_with_the_way_out(tmp_path):
    writer = TokenWriter(tmp_path, 100)
    writer.add([1], [True], 0, 1)
    with pytest.raises(DataError, match="prepare the data again"):
        TokenStore.open(tmp_path)


def test_a_cut_off_store_is_an_error_with_the_way_out(tmp_path):
    _store(tmp_path, [0, 0, 0])
    (tmp_path / "ids.bin").write_bytes(b"\0\0")
    with pytest.raises(DataError, match="cut off"):
        TokenStore.open(tmp_path)


def test_lengths_that_do_not_add_up_are_refused(tmp_path):
    with pytest.raises(ValueError, match="add up"):
        TokenWriter(tmp_path, 100).extend(np.arange(3), np.ones(3), [2], [(0, 0, 1)])


def test_an_index_beyond_the_end_is_an_index_error(tmp_path):
    with pytest.raises(IndexError):
        _store(tmp_path, [0]).ids(1)


def test_an_epoch_visits_every_row_once_in_a_seeded_order(tmp_path):
    store = _store(tmp_path, [0] * 50)
    first = order(store, [1.0], 7, 0)
    assert sorted(first) == list(range(50))
    assert first.tolist() == order(store, [1.0], 7, 0).tolist()
    assert first.tolist() != order(store, [1.0], 7, 1).tolist()
    assert first.tolist() != order(store, [1.0], 8, 0).tolist()
    assert first.tolist() != list(range(50))


def test_weight_two_visits_rows_twice_and_a_half_visits_each_in_every_other_epoch(tmp_path):
    store = _store(tmp_path, [0] * 10 + [1] * 20)
    seen = [order(store, [2.0, 0.5], 3, epoch) for epoch in range(4)]
    for rows in seen:
        assert len(rows) == epoch_rows(store, [2.0, 0.5]) == 30
        assert np.bincount(rows, minlength=30)[:10].tolist() == [2] * 10
    halves = [{row for row in rows.tolist() if row >= 10} for rows in seen]
    assert halves[0] | halves[1] == halves[2] | halves[3] == set(range(10, 30))
    assert not halves[0] & halves[1]


def test_a_weight_that_does_not_divide_evens_out_over_epochs(tmp_path):
    store = _store(tmp_path, [0] * 7)
    seen = np.concatenate([order(store, [1.5], 0, epoch) for epoch in range(7)])
    counts = np.bincount(seen, minlength=7)
    assert len(seen) == 7 * round(1.5 * 7)
    assert counts.max() - counts.min() <= 1


def test_a_source_with_a_tiny_weight_is_still_seen(tmp_path):
    assert (order(_store(tmp_path, [0] * 5 + [1] * 5), [1.0, 0.01], 0, 0) >= 5).sum() == 1


def test_columns_stand_beside_the_examples_and_are_whole(tmp_path):
    with TokenWriter(tmp_path, 100) as writer:
        for values in ([3, 1], [2]):
            ids = np.arange(2 * len(values))
            rows = [(0, writer.file_number("f"), line) for line in range(len(values))]
            writer.extend(ids, ids > 0, [2] * len(values), rows, {"label": np.array(values)})
        with pytest.raises(ValueError, match="column label: 1 values for 2 examples"):
            writer.extend(np.arange(2), np.ones(2), [1, 1], [(0, 0, 1)] * 2, {"label": np.array([1])})
    assert TokenStore.open(tmp_path).column("label").tolist() == [3, 1, 2]
