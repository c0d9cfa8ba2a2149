"""Layers with a sliding window keep a window: what a call holds, what a small budget carries, what is found again."""

import subprocess
import sys

import pytest
import torch
from compare import assert_blocks_given_back
from pair import Pair, distinct_pieces, evict, piece
from prompts import batch, tokens
from test_sharing import watched
from windows import MIXED, PURE, WINDOWS, EndsAt, Need, spread, stock_model, window_pair

NAMES = [PURE, "gemma2", MIXED]
LONG = 140  # new tokens of a call that leaves its window far behind


def need(pair: Pair) -> Need:
    return Need.of(pair.stock, pair.paged.config.block_size)


def assert_within(held: list, limits: list[int]) -> None:
    """Bytes in use after each step, from the first decoding step on (before that the prompt's pass is seen)."""
    assert len(held) > 1
    for step, (stats, limit) in enumerate(zip(held, limits, strict=True)):
        assert step == 0 or 0 < stats.bytes_in_use <= limit, f"step {step}: {stats.bytes_in_use} bytes, allowed {limit}"


# What a call holds


@pytest.mark.parametrize(
    ("name", "window", "block_size", "prefix_caching"), spread(NAMES, WINDOWS, (8, 16), (True, False, True))
)
def test_decoding_holds_a_window_a_row(name, window, block_size, prefix_caching):
    """A short prompt and one that is longer than the window, which they leave behind."""
    pair = window_pair(name, window, block_size=block_size, prefix_caching=prefix_caching)
    lengths = (10, window + 31)
    _, held = watched(pair.model, batch([piece(length, at) for at, length in enumerate(lengths)]), max_new_tokens=50)
    assert_within(held, [sum(need(pair).row(length + step) for length in lengths) for step in range(50)])
    assert_blocks_given_back(pair.model)
    pair.check()


@pytest.mark.parametrize(
    "how", [{"do_sample": True, "num_return_sequences": 3}, {"num_beams": 3}], ids=["samples", "beams"]
)
@pytest.mark.parametrize("name", NAMES)
def test_samples_and_beams_hold_a_window_a_row(name, how):
    """In full layers the prompt is there once, and what each row has of its own."""
    pair = window_pair(name, 8)
    _, held = watched(pair.model, batch([piece(150, 1)]), max_new_tokens=24, **how)
    block_size = need(pair).block_size
    rows = [3 * need(pair).row(step + block_size) for step in range(24)]
    assert_within(held, [need(pair).full(150) + own for own in rows])
    assert_blocks_given_back(pair.model)


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_end_give_their_windows_back(name):
    pair, lengths = window_pair(name, 8), (60, 40, 50)
    _, held = watched(pair.model, batch(distinct_pieces(3, 60)), EndsAt(), max_new_tokens=14)
    rows = [max(1, sum(end > step for end in EndsAt.STEPS)) for step in range(max(EndsAt.STEPS))]
    assert_within(held, [count * need(pair).row(max(lengths) + step) for step, count in enumerate(rows)])
    assert_blocks_given_back(pair.model)


@pytest.mark.parametrize("name", NAMES)
def test_a_returned_cache_holds_a_window_a_row(name):
    pair = window_pair(name, 8)
    output = pair.model.generate(
        **batch([piece(90, 1)]), do_sample=False, max_new_tokens=20, return_dict_in_generate=True
    )
    assert 0 < pair.paged.stats().bytes_in_use <= need(pair).row(109)
    del output
    assert_blocks_given_back(pair.model)


# What a small budget carries


def squeezed(name: str, window: int = 8, block_size: int = 8, num_tokens: int = 10 + LONG) -> Pair:
    """A pair with a budget for all tokens in full layers, and twice what one row may take in window layers."""
    probe = Need.of(stock_model(name, window), block_size)
    budget = probe.full(num_tokens) + 2 * probe.window + probe.everything(block_size)  # and the null block
    assert budget < 0.8 * probe.everything(num_tokens)
    return window_pair(name, window, block_size=block_size, max_memory={"cpu": budget})


@pytest.mark.parametrize(("window", "block_size"), [(5, 8), (8, 16), (20, 8)])
@pytest.mark.parametrize("name", [PURE, MIXED])
def test_a_long_answer_fits_although_all_of_its_tokens_would_not(name, window, block_size):
    """And is found again: a hit needs all tokens in full layers, but only the last window in the others."""
    pair = squeezed(name, window, block_size)
    told = pair.ask([piece(10, 1)], max_new_tokens=LONG - 15)[0].tolist()
    pair.ask([told + tokens(5, seed=1)])
    assert pair.reused == len(told) - 1, "the last token of an answer is not stored"
    pair.ask([told[:12]], max_new_tokens=3)


@pytest.mark.parametrize("stored", range(40, 48))
@pytest.mark.parametrize("window", [5, 8])
def test_the_last_window_is_enough_wherever_in_a_block_it_ends(window, stored):
    """Also where it lies in one block that is not full."""
    pair = window_pair(PURE, window)
    told = pair.ask([piece(10, 1)], max_new_tokens=stored - 9)[0].tolist()
    evict(pair, pair.paged.stats().blocks_cached - 3)  # what fell out of the window is the least recently used
    pair.ask([told + tokens(2, seed=1)], max_new_tokens=2)
    assert pair.reused == stored


@pytest.mark.parametrize("name", [PURE, MIXED])
def test_all_memory_taken_stays_within_the_budget(name):
    """What one kind of layers has given up must not be held beside what the other kind takes."""
    pair = squeezed(name)
    pair.ask([piece(10, 1)], max_new_tokens=LONG)
    assert 0 < pair.paged.stats().bytes_reserved <= pair.paged.config.budget_bytes("cpu")


def pressed(name: str, window: int = 8, num_tokens: int = 136) -> Pair:
    """A pair with a budget for so many tokens in all layers."""
    budget = Need.of(stock_model(name, window), 8).everything(num_tokens + 8)
    return window_pair(name, window, max_memory={"cpu": budget})


@pytest.mark.parametrize("name", [PURE, MIXED])
def test_prompts_that_push_each_other_out(name):
    pair = pressed(name)
    rows = distinct_pieces(3, 70)
    for row in (*rows, rows[2], rows[0], rows[1][:30], rows[1], rows[0] + tokens(4, seed=1)):
        pair.ask([row])
    for how in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}):
        for row in (rows[0], rows[2], rows[0][:50]):
            pair.ask([row], max_new_tokens=6, **how)


@pytest.mark.parametrize("num_tokens", [96, 150])
@pytest.mark.parametrize("name", [PURE, MIXED])
def test_conversations_that_push_each_other_out(name, num_tokens):
    pair, said = pressed(name, num_tokens=num_tokens), distinct_pieces(3, 20)
    for turn in range(3):
        for at, row in enumerate(said):
            said[at] = pair.ask([row + tokens(3 + at, seed=turn)], max_new_tokens=12)[0].tolist()


# Saved prefixes


@pytest.mark.parametrize("block_size", [8, 32])
@pytest.mark.parametrize("name", NAMES)
def test_another_model_object_goes_on_where_the_first_ended(name, block_size, tmp_path):
    first = window_pair(name, 20)
    told = first.ask([piece(60, 1)], max_new_tokens=25)[0].tolist()
    written = first.paged.save(tmp_path)
    other = window_pair(name, 20, block_size=block_size)
    assert other.paged.load(tmp_path) == written
    for row, reused in ((piece(60, 1), 59), (told + tokens(3, seed=1), len(told) - 1), (told[:40], None)):
        other.ask([row])
        assert reused is None or other.reused == reused


@pytest.mark.parametrize("name", [PURE, MIXED])
def test_what_was_squeezed_into_a_budget_is_saved_and_found(name, tmp_path):
    """Of the window layers only the last window can be there; it is all that is needed.

    Blocks of another size may begin before it, in what is gone; then nothing of the answer can be used.
    """
    first = squeezed(name)
    told = first.ask([piece(10, 1)], max_new_tokens=LONG - 15)[0].tolist()
    first.paged.save(tmp_path)
    for other in (window_pair(name, 8), window_pair(name, 8, block_size=16), squeezed(name)):
        other.paged.load(tmp_path)
        other.ask([told + tokens(3, seed=1)])
        if other.paged.config.block_size == first.paged.config.block_size:
            assert other.reused == len(told) - 1
        other.ask([told[:70] + tokens(3, seed=2)])


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_fit_a_budget_is_left_out_when_loaded(name, tmp_path):
    first, rows = window_pair(name, 8), distinct_pieces(3, 60)
    for row in rows:
        first.ask([row])
    first.paged.save(tmp_path)
    other = pressed(name, num_tokens=88)
    other.paged.load(tmp_path)
    for row in rows:
        other.ask([row])


SCRIPT = """
import sys, torch
from transformers import AutoModelForCausalLM
from hf_paged import patch_model
for base in sys.argv[1:]:
    model = patch_model(AutoModelForCausalLM.from_pretrained(base + "/model").eval(), block_size=8)
    ids, expected = torch.load(base + "/expected.pt")
    model.paged.load(base + "/prefixes")
    assert torch.equal(model.generate(ids, do_sample=False, max_new_tokens=8), expected), base
    stats = model.paged.stats()
    assert (stats.computed_tokens, stats.blocks_in_use) == (4, 0), (base, stats)
"""


def test_another_process_goes_on_where_this_one_ended(tmp_path):
    for name in (PURE, MIXED):
        pair, base = window_pair(name, 8), tmp_path / name
        told = pair.ask([piece(50, 1)], max_new_tokens=20)
        ids = torch.cat([told, torch.tensor([tokens(3, seed=1)])], dim=1)
        pair.paged.save(base / "prefixes")
        torch.save((ids, pair.stock.generate(ids, do_sample=False, max_new_tokens=8)), base / "expected.pt")
        pair.stock.save_pretrained(base / "model")
    command = [sys.executable, "-c", SCRIPT, *(str(tmp_path / name) for name in (PURE, MIXED))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
