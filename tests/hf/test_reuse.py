"""Prompts are computed once, ever: later calls start where earlier ones have ended, and answer as stock does."""

import pytest
import torch
from compare import BLOCK_SIZE, copy_of
from families import FAMILIES, VOCAB, stock_model
from pair import NEW, Pair, evict, piece, text
from prompts import batch, tokens

from hf_paged import patch_model

WIDE = ["llama", "mistral_sliding", "gemma2", "gemma3", "gpt2", "qwen2", "phi3"]
PADDED = ["opt", "bloom", "falcon_alibi", "mpt"]


# How much is computed


@pytest.mark.parametrize("name", WIDE)
def test_a_prompt_that_was_asked_before_costs_one_token_for_each_distinct_row(name):
    pair, rows = Pair(name), [piece(21, 1), piece(8, 2), piece(21, 1), piece(16, 3)]
    real = sum(map(len, rows))
    pair.ask(rows)
    stats = pair.check()
    assert (stats.prompt_tokens, stats.computed_tokens, stats.shared_tokens) == (real, real - 21, 21)
    pair.ask(rows)
    stats = pair.check()
    assert (stats.prompt_tokens, stats.computed_tokens, stats.shared_tokens) == (real, 3, 1)
    assert stats.reused_tokens == real - 4
    assert stats.fallbacks == {}


@pytest.mark.parametrize("name", WIDE)
def test_a_chat_computes_only_what_is_new(name):
    """The last token of an answer is not stored: it never went through the model."""
    pair, history = Pair(name), piece(19, 1)
    for turn in range(4):
        before = len(history) if turn else 0
        history = history + (tokens(5, seed=turn) if turn else [])
        answer = pair.ask([history])
        assert pair.computed == (1 + 5 if turn else 19), f"turn {turn}"
        assert pair.reused == (before - 1 if turn else 0), f"turn {turn}"
        history = text(answer[0])


def test_an_edited_answer_is_computed_from_the_edit_on():
    pair = Pair()
    answer = text(pair.ask([piece(19, 1)], max_new_tokens=12)[0])
    edited = [*answer[:26], answer[26] % (VOCAB - 4) + 3 + 1, *answer[27:]]
    pair.ask([edited])
    assert pair.reused == 26


def test_the_table_shows_what_was_reused():
    pair = Pair()
    assert "reused" in repr(pair.paged)
    pair.ask([piece(21, 1)])
    pair.ask([piece(21, 1)])
    (line,) = [line for line in repr(pair.paged).splitlines() if "reused from earlier calls" in line]
    assert line.split()[-1] == "20"
    assert f"/ {pair.pool.cached}" in repr(pair.paged)


def test_many_samples_of_a_known_prompt():
    pair = Pair()
    pair.ask([piece(21, 1)])
    pair.ask([piece(21, 1)], do_sample=True, temperature=1.3, num_return_sequences=4)
    stats = pair.check()
    assert (stats.prompt_tokens, stats.computed_tokens, stats.reused_tokens, stats.shared_tokens) == (84, 1, 80, 3)


# Where a hit ends


@pytest.mark.parametrize("common", [1, 2, 7, 8, 9, 15, 16, 17, 23, 24])
def test_a_common_beginning_of_any_length_is_reused(common):
    """Also inside a block: its head is copied."""
    pair, known = Pair(), piece(24, 1)
    pair.ask([known])
    parted = [*known[:common], known[common] % (VOCAB - 4) + 4 if common < 24 else 5, *tokens(6, seed=2)]
    pair.ask([parted])
    assert pair.reused == common
    assert pair.computed == 7
    pair.ask([known])
    assert pair.reused == 23, "the copied block is what it was"


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 16, 17])
def test_a_prompt_shorter_than_what_is_known(length):
    pair, known = Pair(), piece(40, 1)
    pair.ask([known])
    pair.ask([known[:length]])
    assert (pair.reused, pair.computed) == (length - 1, 1)
    pair.ask([known])
    assert (pair.reused, pair.computed) == (39, 1)


def test_a_whole_prompt_that_ends_with_a_block():
    """The last token is computed again, for its logits, into a copy of the block."""
    pair = Pair()
    for _ in range(3):
        pair.ask([piece(16, 1), piece(8, 2)])
    assert (pair.reused, pair.computed) == (15 + 7, 2)


def test_rows_that_hit_different_lengths():
    pair, known = Pair(), [piece(30, 1), piece(17, 2), piece(8, 3)]
    pair.ask(known)
    rows = [[*known[0][:29], 4, 5], known[1] + piece(11, 4), piece(5, 5), known[2][:3] + piece(2, 6), known[0][:1]]
    pair.ask(rows)
    first_new = text(pair.stock.generate(**batch([known[1]]), do_sample=False, max_new_tokens=1)[0])[-1]
    assert rows[1][17] != first_new, "the prompt parts from the generated text"
    assert pair.reused == 29 + 17 + 0 + 3 + 0
    assert pair.computed == 2 + 11 + 5 + 2 + 1


def test_rows_that_share_what_is_known_and_what_is_new():
    pair, known = Pair(), piece(20, 1)
    pair.ask([[*known[:19], 4]])
    rows = [[*known[:19], 6, *piece(4, name)] for name in (2, 3, 2)]
    pair.ask(rows)
    stats = pair.check()
    assert (stats.reused_tokens, stats.computed_tokens, stats.shared_tokens) == (3 * 19, 1 + 4 + 4, 1 + 1 + 4)


def test_one_token_prompts():
    pair = Pair()
    for rows in ([[7]], [[7]], [[7], [9], [7]], [[7, 8], [7]]):
        pair.ask(rows)
    assert pair.reused == 1
    assert pair.computed == 2


@pytest.mark.parametrize("block_size", [8, 16, 256])
def test_every_block_size(block_size):
    pair = Pair(block_size=block_size)
    for rows in ([piece(21, 1)], [[*piece(21, 1)[:18], 4, 5]], [piece(21, 1), piece(21, 1)[:9]]):
        pair.ask(rows)
    assert pair.reused == 20 + 8


def test_the_reference_backend():
    pair = Pair(attention_backend="reference")
    for rows in ([piece(21, 1)], [[*piece(21, 1)[:18], 4, 5]], [piece(21, 1), piece(21, 1)[:9]]):
        pair.ask(rows)
    assert pair.reused == 20 + 8


# Other families


@pytest.mark.parametrize("name", [*WIDE, "llama_mqa", "llama_tied", "gpt_neox", "mixtral", "smollm3"])
def test_families_answer_as_stock_warm_cold_and_half_warm(name):
    pair, known = Pair(name), [piece(27, 1), piece(13, 2)]
    pair.ask(known, max_new_tokens=12)
    pair.ask(known, max_new_tokens=12)
    assert pair.reused == 26 + 12
    pair.ask([known[0][:21] + piece(5, 3), known[1]], num_beams=2)
    assert pair.reused == 2 * (21 + 12)
    evict(pair, pair.pool.cached // 2)
    pair.ask([*known, known[0][:21] + piece(5, 3)], do_sample=True)
    pair.ask([known[0][:9], known[0] + piece(30, 4)], prefill_chunk_size=7)
    assert pair.reused > 0


@pytest.mark.parametrize("name", PADDED)
def test_families_on_the_padded_path_are_never_wrong(name):
    pair, known = Pair(name), [piece(21, 1), piece(13, 2)]
    for rows in (known, known, [known[0][:12] + piece(4, 3)], [known[0]]):
        pair.ask(rows)


@pytest.mark.parametrize(
    "name", ["mamba", "lfm2", "qwen3_next", "deepseek_v3", "gpt_oss", "t5", "bart", "falcon_rotary"]
)
def test_other_families_are_never_wrong(name):
    family = FAMILIES[name]
    if family.missing():
        pytest.skip(family.missing())
    stock, model = stock_model(name), patch_model(copy_of(family), block_size=BLOCK_SIZE)
    for rows in ([piece(21, 1)], [piece(21, 1)], [piece(21, 1)[:11] + piece(5, 2), piece(4, 3)]):
        asked = {**batch(rows), "do_sample": False, "max_new_tokens": NEW}
        assert torch.equal(model.generate(**asked), stock.generate(**asked))
    assert model.paged.stats().blocks_in_use == 0
