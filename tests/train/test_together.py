"""How many trials go into one pass: tried, and then the fastest."""

from ftray.train.together import Pace


def walked(pace, trials, seconds_of, steps):
    """The widths of so many steps, each of 100 tokens and as long as its width says."""
    found = []
    for _ in range(steps):
        width = pace.width(trials)
        found.append(width)
        pace.told(width, tokens=100, seconds=seconds_of[width])
    return found


def test_every_width_is_tried_twice_and_the_fastest_stays():
    pace = Pace()
    assert walked(pace, 6, {6: 2.0, 4: 1.0, 2: 1.5, 1: 3.0}, 10) == [6, 6, 4, 4, 2, 2, 1, 1, 4, 4]
    assert pace.settled(6)
    assert not pace.settled(5), "other widths are tried when there are other numbers of trials"


def test_of_widths_that_are_about_as_fast_the_narrowest_is_taken():
    assert walked(Pace(), 4, {4: 1.0, 2: 1.02, 1: 1.5}, 7)[-1] == 2


def test_a_width_that_memory_does_not_hold_is_not_tried_again():
    pace = Pace()
    assert pace.width(8) == 8
    pace.narrow(8)
    assert pace.width(8) == 4
    pace.narrow(4)
    assert walked(pace, 8, {2: 1.0, 1: 1.5}, 5) == [2, 2, 1, 1, 2]
