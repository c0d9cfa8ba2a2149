"""What the benchmarks share: calls that take turns, and clocks at each token."""

from itertools import pairwise

import pytest
import torch

from benchmarks.measure import StepClock, compare_first_tokens, median_seconds, taking_turns


def test_calls_take_turns_and_the_first_round_does_not_count():
    order = []
    calls = {name: lambda name=name: order.append(name) or len(order) for name in ("stock", "patched")}
    assert taking_turns(calls, 2) == {"stock": [3, 5], "patched": [4, 6]}
    assert order == ["stock", "patched"] * 3


def test_of_the_seconds_of_each_call_the_median_counts(monkeypatch):
    """Five rounds after the first: of 1 to 5 seconds, and of twice that."""
    now, lengths = [0.0], {"one": iter([100, 5, 1, 2, 4, 3]), "other": iter([100, 10, 2, 4, 8, 6])}

    def pass_time(name):
        now[0] += next(lengths[name])

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    calls = {name: lambda name=name: pass_time(name) for name in lengths}
    assert median_seconds(calls, 5) == {"one": 3, "other": 6}


@pytest.mark.parametrize(("other", "equal"), [(7, True), (8, False)])
def test_first_tokens_are_compared(other, equal):
    ways = {"stock": lambda: (2.0, 7), "patched": lambda: (1.0, other)}
    assert compare_first_tokens(ways, 3) == ({"stock": 2.0, "patched": 1.0}, equal)


def test_a_clock_stamps_each_token_and_stops_nothing():
    told = []
    clock = StepClock(lambda: told.append(len(clock.stamps)))
    for _ in range(3):
        assert not clock(torch.zeros(2, 5, dtype=torch.long), None).any()
    assert told == [1, 2, 3], "it is called after the stamp"
    assert all(begin <= end for begin, end in pairwise(clock.stamps))
