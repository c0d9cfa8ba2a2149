"""Sliding windows are exact: prompts and answers of many windows' length, cold, warm and half warm, in every mode."""

import copy

import pytest
import torch
from compare import assert_blocks_given_back
from families import PAD, VOCAB
from pair import evict, piece
from prompts import batch, tokens
from transformers import StoppingCriteriaList
from windows import BLOCK_SIZES, MIXED, PURE, WINDOWED, WINDOWS, EndsAt, followers, near, parted, spread, window_pair

from hf_paged import unpatch_model

LENGTHS = (30, 61, 100, 150)

# Arguments of `generate`; those that are functions are called with each of the two models.
HOW = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3},
    "samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "beams that sample": {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
    "chunks": {"prefill_chunk_size": 7},
    "rows that end": {"stopping_criteria": lambda model: StoppingCriteriaList([EndsAt()])},
    "rows that end and go on": {"stopping_criteria": lambda model: StoppingCriteriaList([EndsAt(pads=False)])},
    "scores": {"return_dict_in_generate": True, "output_scores": True},
}
GUESSING = {
    "draft model": {"assistant_model": near},
    "draft model that is not patched": {"assistant_model": lambda model: near(unpatched(model))},
    "draft model of another mind": {"assistant_model": lambda model: copy.deepcopy(model).apply(_shake)},
    "sampling draft": {"assistant_model": near, "do_sample": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 4, "eos_token_id": VOCAB - 1},  # 5.8 asks for an end token
}


def unpatched(model: torch.nn.Module) -> torch.nn.Module:
    return unpatch_model(copy.deepcopy(model))


def _shake(module: torch.nn.Module) -> None:
    """Other weights for the linear layers."""
    if isinstance(module, torch.nn.Linear):
        with torch.no_grad():
            module.weight.copy_(module.weight.flip(0))


# One prompt after another


@pytest.mark.parametrize(("name", "window", "block_size"), spread(WINDOWED, WINDOWS, BLOCK_SIZES))
def test_prompts_that_follow_one_another(name, window, block_size):
    pair, row = window_pair(name, window, block_size=block_size), piece(75, window)
    pair.ask([row], max_new_tokens=6)
    for prompt in followers(row, window, block_size).values():
        pair.ask([prompt], max_new_tokens=3)


@pytest.mark.parametrize(("name", "how", "window", "block_size"), spread(WINDOWED, HOW, WINDOWS, BLOCK_SIZES))
def test_ragged_batches_that_follow_one_another(name, how, window, block_size):
    pair, row = window_pair(name, window, block_size=block_size), piece(90, 1)
    beside = [piece(2 * window + 1, 2), piece(10, 3)]
    pair.ask([row, *beside], max_new_tokens=12, **HOW[how])
    for prompt in some(followers(row, window, block_size), list(HOW).index(how), 2):
        pair.ask([beside[0], prompt], max_new_tokens=5, **HOW[how])


def some(asked: dict[str, list[int]], first: int, count: int) -> list[list[int]]:
    """`count` of the prompts, in an order of their own for each `first`."""
    prompts = list(asked.values())
    return [prompts[(first + 3 * at) % len(prompts)] for at in range(count)]


@pytest.mark.parametrize(("name", "how", "window", "block_size"), spread(WINDOWED, GUESSING, WINDOWS, BLOCK_SIZES))
def test_helpers_that_guess(name, how, window, block_size):
    pair, row = window_pair(name, window, block_size=block_size), piece(13, 1) * 4
    skip_what_stock_refuses(pair.stock, row, 14, GUESSING[how])
    pair.ask([row], max_new_tokens=14, **GUESSING[how])
    for prompt in some(followers(row, window, block_size), list(GUESSING).index(how), 2):
        skip_what_stock_refuses(pair.stock, prompt, 7, GUESSING[how])
        pair.ask([prompt], max_new_tokens=7, **GUESSING[how])


def skip_what_stock_refuses(model, row, new_tokens, arguments) -> None:
    """Some versions of transformers cannot crop a sliding window, or not after several passes of a draft (5.17)."""
    given = {key: value(model) if callable(value) else value for key, value in arguments.items()}
    torch.manual_seed(7)  # that of `Pair.ask`
    try:
        model.generate(**batch([row]), max_new_tokens=new_tokens, **given)
    except Exception as error:
        pytest.skip(f"stock refuses: {type(error).__name__}: {error}")


@pytest.mark.parametrize(("name", "window", "block_size"), spread(WINDOWED, WINDOWS, BLOCK_SIZES))
def test_long_answers(name, window, block_size):
    """Short and long prompts, and an answer of several windows; then a question about the whole of it."""
    pair, rows = window_pair(name, window, block_size=block_size), [piece(10, 1), piece(window + 3, 2)]
    answer = pair.ask(rows, max_new_tokens=2 * window + 5)
    told = [token for token in answer[0].tolist() if token != PAD]
    pair.ask([told + tokens(5, seed=1)], max_new_tokens=3)
    pair.ask([told[: len(told) // 2] + tokens(5, seed=2)], max_new_tokens=3)


@pytest.mark.parametrize(("name", "length", "window"), spread([PURE, MIXED], LENGTHS, WINDOWS))
def test_the_reference_backend(name, length, window):
    pair, row = window_pair(name, window, attention_backend="reference"), piece(length, 1)
    for prompt in (row, row[: length // 2], row + tokens(9, seed=1)):
        pair.ask([prompt, piece(12, 2)], max_new_tokens=7)
    pair.ask([row], num_beams=2, max_new_tokens=7)


# Padding and holes


def right_padded() -> dict:
    return batch([piece(length, name) for name, length in enumerate((70, 9, 34))], side="right")


def holes() -> dict:
    """Holes that lie wholly, partly and not at all in the windows of the last tokens."""
    inputs = batch([piece(70, 1), piece(64, 2), piece(70, 3)])
    inputs["attention_mask"][0, 20:45] = 0
    inputs["attention_mask"][1, 60:68] = 0
    inputs["attention_mask"][2, 5::9] = 0
    return inputs


MASKS = (right_padded, holes)


@pytest.mark.parametrize(("name", "window", "block_size", "make"), spread(WINDOWED, WINDOWS, BLOCK_SIZES, MASKS[::-1]))
def test_unusual_masks(name, window, block_size, make):
    """A window is counted in columns of the mask, those that it leaves out included."""
    pair = window_pair(name, window, block_size=block_size)
    for _ in range(2):
        pair.ask(make(), max_new_tokens=window // 2 + 5)
    pair.ask(make(), num_beams=2, max_new_tokens=6)
    pair.ask([piece(70, 1)], max_new_tokens=5)


# Going on from a returned cache


def conversation(model, rows, *, turns=3, branches=False, **how) -> list[torch.Tensor]:
    """Every turn feeds back all that was said and three tokens more, with the cache that the last turn returned.

    With `branches` another three tokens are asked first, with a copy of that cache.
    """
    inputs, cache, said = batch(rows), None, []
    for turn in range(turns):
        if branches and turn:
            other = {**inputs, "input_ids": torch.cat([inputs["input_ids"][:, :-1], torch.full((len(rows), 1), 9)], 1)}
            said.append(returned(model, other, copy.deepcopy(cache), max_new_tokens=7).sequences)
        output = returned(model, inputs, cache, max_new_tokens=9, **how)
        cache = output.past_key_values
        said.append(output.sequences)
        more = torch.tensor([tokens(3, seed=70 + turn)] * len(rows))
        ids = torch.cat([output.sequences, more], dim=1)
        seen = torch.ones(len(rows), ids.shape[1] - inputs["input_ids"].shape[1], dtype=torch.long)
        inputs = {"input_ids": ids, "attention_mask": torch.cat([inputs["attention_mask"], seen], dim=1)}
    return said


def returned(model, inputs, cache, **how):
    torch.manual_seed(7)
    how = {"do_sample": False, **how}
    return model.generate(**inputs, past_key_values=cache, return_dict_in_generate=True, **how)


GOING_ON = ({}, {"do_sample": True}, {"branches": True}, {"prefill_chunk_size": 6})
ROWS = ((50,), (9, 50))


@pytest.mark.parametrize(
    ("name", "how", "window", "lengths", "block_size"), spread(WINDOWED, GOING_ON, WINDOWS, ROWS, BLOCK_SIZES)
)
def test_going_on_from_a_returned_cache(name, how, window, lengths, block_size):
    pair, rows = window_pair(name, window, block_size=block_size), [piece(length, length) for length in lengths]
    actual = conversation(pair.model, rows, **how)
    if not pair.paged.stats().fallbacks:
        # Chunks change nothing; but stock 5.8 answers otherwise where it goes on in chunks, without windows too.
        how = {name: value for name, value in how.items() if name != "prefill_chunk_size"}
    expected = conversation(pair.stock, rows, **how)
    for turn, (wanted, got) in enumerate(zip(expected, actual, strict=True)):
        assert torch.equal(got, wanted), f"answer {turn}\n  stock   {wanted.tolist()}\n  patched {got.tolist()}"
    assert_blocks_given_back(pair.model)
    pair.check()


# Reuse


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", [PURE, MIXED])
def test_a_prompt_is_reused_as_with_full_attention(name, window, block_size):
    pair, row = window_pair(name, window, block_size=block_size), piece(100, 1)
    pair.ask([row], max_new_tokens=2)
    stats = pair.check()
    assert (stats.computed_tokens, stats.reused_tokens, stats.fallbacks) == (100, 0, {})
    for how in ({}, {"do_sample": True, "num_return_sequences": 3}, {"num_beams": 3}):
        copies = 3 if how else 1
        pair.ask([row], max_new_tokens=3, **how)
        stats = pair.check()
        assert (stats.computed_tokens, stats.shared_tokens, stats.reused_tokens) == (1, copies - 1, copies * 99), how


@pytest.mark.parametrize(("name", "window", "block_size"), spread([PURE, MIXED], WINDOWS, BLOCK_SIZES))
def test_two_conversations_take_turns(name, window, block_size):
    """All but the last token of what was said, which was never stored, is there for the next turn."""
    pair, said = window_pair(name, window, block_size=block_size), [piece(30, 1), piece(44, 2)]
    for turn in range(3):
        for at in (0, 1):
            before = len(said[at])
            answer = pair.ask([said[at] + tokens(5, seed=turn)] if turn else [said[at]], max_new_tokens=window // 2 + 6)
            assert pair.reused == (before - 1 if turn else 0), f"conversation {at}, turn {turn}"
            said[at] = answer[0].tolist()


@pytest.mark.parametrize(
    ("name", "window", "block_size", "share"), spread([PURE, "gemma2", MIXED], WINDOWS, BLOCK_SIZES, (0.2, 0.5, 0.8))
)
def test_what_was_partly_evicted(name, window, block_size, share):
    """Whatever is left of a conversation, of either kind of layers: the answers are stock's."""
    pair, row = window_pair(name, window, block_size=block_size), piece(60, 1)
    told = pair.ask([row], max_new_tokens=window + 12)[0].tolist()
    for prompt in (told + tokens(3, seed=1), row, told[:-9], parted(told, len(told) - window // 2 - 1)):
        evict(pair, int(share * pair.paged.stats().blocks_cached))
        pair.ask([prompt, piece(20, 2)], max_new_tokens=4)
