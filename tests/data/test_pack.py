"""Dealing a window's examples to workers and micro-batches."""

import numpy as np
import pytest

from ftray.data.pack import deal

MAX_LENGTH = 64
CUTS = [(workers, size, packed) for workers in (1, 2, 3, 5) for size in (1, 2, 8) for packed in (False, True)]


def windows():
    rng = np.random.default_rng(0)
    yield from (rng.integers(2, MAX_LENGTH + 1, size) for size in (1, 2, 7, 8, 30))
    yield np.full(16, MAX_LENGTH)
    yield np.full(16, 33)  # two do not fit in one row
    yield np.full(16, 2)


@pytest.mark.parametrize(("workers", "size", "packed"), CUTS)
def test_every_example_is_dealt_once_and_all_workers_take_equally_many_turns(workers, size, packed):
    for lengths in windows():
        hands = deal(lengths, workers=workers, micro_batch_size=size, max_length=MAX_LENGTH, packed=packed)
        assert len(hands) == workers
        assert len({len(hand) for hand in hands}) == 1
        dealt = np.concatenate([micro for hand in hands for micro in hand])
        assert sorted(dealt.tolist()) == list(range(len(lengths)))


@pytest.mark.parametrize(("workers", "size", "packed"), CUTS)
def test_no_micro_batch_is_larger_than_asked(workers, size, packed):
    for lengths in windows():
        for hand in deal(lengths, workers=workers, micro_batch_size=size, max_length=MAX_LENGTH, packed=packed):
            for micro in hand:
                assert lengths[micro].sum() <= size * MAX_LENGTH
                assert packed or len(micro) <= size


def test_packing_takes_as_few_turns_as_the_tokens_need():
    lengths = np.array([40, 30, 24, 20, 10, 4])  # 128 tokens
    assert loads(deal(lengths, workers=1, micro_batch_size=1, max_length=64, packed=True), lengths) == [[64, 64]]
    assert loads(deal(lengths, workers=2, micro_batch_size=1, max_length=64, packed=True), lengths) == [[64], [64]]
    assert loads(deal(lengths, workers=1, micro_batch_size=2, max_length=64, packed=True), lengths) == [[128]]


def test_packed_workers_carry_nearly_equal_loads():
    lengths = np.random.default_rng(1).integers(30, 300, 64)
    hands = deal(lengths, workers=4, micro_batch_size=4, max_length=1024, packed=True)
    totals = [sum(hand) for hand in loads(hands, lengths)]
    assert max(totals) < 1.01 * min(totals)


def test_padded_micro_batches_hold_neighbours_in_length():
    lengths = np.array([10, 60, 11, 61, 12, 62])
    hands = deal(lengths, workers=1, micro_batch_size=3, max_length=64, packed=False)
    assert [sorted(lengths[micro].tolist()) for micro in hands[0]] == [[60, 61, 62], [10, 11, 12]]


def test_a_worker_without_an_example_gets_an_empty_turn():
    for packed in (False, True):
        hands = deal(np.array([5]), workers=3, micro_batch_size=2, max_length=MAX_LENGTH, packed=packed)
        assert sorted(len(hand[0]) for hand in hands) == [0, 0, 1]


def test_all_workers_deal_alike():
    lengths = np.full(12, 9)  # ties
    one, other = (deal(lengths, workers=2, micro_batch_size=2, max_length=16, packed=True) for _ in range(2))
    assert [[m.tolist() for m in hand] for hand in one] == [[m.tolist() for m in hand] for hand in other]


def loads(hands, lengths):
    return [[int(lengths[micro].sum()) for micro in hand] for hand in hands]
