"""Which texts an encoder reads next: turns between versions, rounds between requests, little padding."""

import random

from ftray.serve.reading import ROUND, Reading, Waiting


def request(*lengths, told=None):
    return Reading([(1,) * length for length in lengths], (told if told is not None else []).append)


def waiting(max_batch=4, max_tokens=1000):
    return Waiting(max_batch=max_batch, max_tokens=max_tokens)


def lengths(batch):
    return [len(text) for text in batch.texts()]


def test_nothing_waits_at_first():
    assert waiting().next() is None
    assert len(waiting()) == 0


def test_versions_take_turns_a_batch_each():
    queue = waiting(max_batch=2)
    queue.add("a", request(*[5] * 6))
    queue.add("b", request(5))
    queue.add(None, request(5, 5, 5))
    order = []
    while batch := queue.next():
        order.append((batch.version, len(batch.items)))
    assert order == [("a", 2), ("b", 1), (None, 2), ("a", 2), (None, 1), ("a", 2)]


def test_a_late_short_request_does_not_wait_for_a_long_one():
    queue = waiting()
    long, short = request(*[5] * 400), request(5)
    queue.add("a", long)
    for _ in range(3):
        queue.next()
    queue.add("a", short)
    batches = 0
    while not any(reading is short for reading, _ in queue.next().items):
        batches += 1
    assert batches <= ROUND


def test_a_long_request_is_not_put_off_by_short_ones_that_keep_coming():
    queue = waiting()
    long = request(*[5] * 40)
    queue.add("a", long)
    read = 0
    for _ in range(200):
        for _ in range(3):
            queue.add("a", request(5))
        read += sum(reading is long for reading, _ in queue.next().items)
    assert read == 40


def test_texts_of_like_length_are_read_together_and_the_oldest_first():
    queue = waiting(max_batch=3)
    queue.add("a", request(50, 10, 52, 11, 90, 49))
    assert sorted(lengths(queue.next())) == [49, 50, 52]
    assert sorted(lengths(queue.next())) == [10, 11]  # with 90 beside them, most of the batch would be padding
    assert lengths(queue.next()) == [90]


def test_a_batch_keeps_to_its_tokens_and_a_longer_text_goes_alone():
    queue = waiting(max_batch=10, max_tokens=100)
    queue.add("a", request(30, 30, 30, 30, 500))
    assert lengths(queue.next()) == [30, 30, 30]
    assert lengths(queue.next()) == [30]
    assert lengths(queue.next()) == [500]


def test_every_text_is_read_once_whatever_comes():
    source = random.Random(1)
    queue, told, asked, seen = waiting(max_batch=5, max_tokens=200), [], 0, set()
    while asked < 60 or len(queue):
        if asked < 60:
            queue.add(source.choice("abc"), request(*[source.randint(1, 60) for _ in range(9)], told=told))
            asked += 1
        batch = queue.next()
        for item in batch.items:
            assert item not in seen
            seen.add(item)
        assert len(batch.items) <= 5
        assert max(lengths(batch)) * len(batch.items) <= 200 or len(batch.items) == 1
        batch.tell([len(text) for text in batch.texts()])
    assert len(told) == 60
    assert len(seen) == 540


def test_answers_come_back_in_the_order_of_the_texts():
    queue, told = waiting(max_batch=2), []
    queue.add("a", request(9, 1, 8, 2, 7, told=told))
    while batch := queue.next():
        batch.tell([len(text) for text in batch.texts()])
    assert told == [[9, 1, 8, 2, 7]]


def test_what_was_given_up_is_skipped_and_what_failed_is_told_once():
    queue, told = waiting(max_batch=1), []
    gone, failed = request(5, 5), request(5, 5, told=told)
    queue.add("a", gone)
    queue.add("a", failed)
    gone.give_up()
    assert len(queue) == 2
    error = ValueError("broken")
    queue.next().tell(error)
    assert told == [error]
    assert queue.next() is None


def test_what_waits_for_a_version_can_be_taken_away():
    queue, told = waiting(), []
    queue.add("a", request(5, 5, told=told))
    queue.add("b", request(5))
    error = ValueError("unloaded")
    queue.drop("a").tell(error)
    queue.drop("never there").tell(error)
    assert told == [error]
    assert queue.next().version == "b"
    assert queue.next() is None
