"""A random walk over calls on window models: any window, block size and budget, every answer compared with stock."""

import pytest
from pair import evict
from test_reuse_walk import steps_of_a_walk, take_turn, weights
from windows import BLOCK_SIZES, MIXED, PURE, WINDOWS, Need, stock_model, window_pair

# Behind the skip: a machine that is there for its GPU may lack hypothesis.
hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

LONGEST = 60 + 22  # tokens of a row of the walk; prompts are cut at 60


def pair_of(name: str, window: int, block_size: int, rows: float | None):
    """A pair with a budget for so many rows of the walk with all of their tokens; `None`: all that is free."""
    if rows is None:
        return window_pair(name, window, block_size=block_size)
    budget = int(rows * Need.of(stock_model(name, window), block_size).everything(LONGEST))
    return window_pair(name, window, block_size=block_size, max_memory={"cpu": budget})


@settings(max_examples=6, deadline=None)
@given(
    name=st.sampled_from([MIXED, "gemma2", PURE]),
    window=st.sampled_from(WINDOWS),
    block_size=st.sampled_from(BLOCK_SIZES),
    rows=st.sampled_from([None, 6.5, 8, 12]),  # two copies of three rows fit in any case
    steps=steps_of_a_walk,
)
def test_a_random_walk_answers_as_stock(name, window, block_size, rows, steps):
    pair, told = pair_of(name, window, block_size, rows), []
    for what, arguments in steps:
        if what == "ask":
            *asked, new = arguments
            take_turn(pair, told, *asked, 2 * new)
        elif what == "weights":
            pair.both(weights(*arguments))
        elif pair.paged._pool is not None:
            evict(pair, *arguments) if what == "evict" else getattr(pair.paged, what)()
            pair.check()
