"""What goes through the model and what stays in memory: each distinct token once, padding never, finished rows not."""

import contextlib

import prompts
import pytest
import torch
from compare import BLOCK_SIZE, copy_of, every_family
from families import FAMILIES, stock_model
from prompts import batch, tokens
from transformers import StoppingCriteria, StoppingCriteriaList

from hf_paged import patch_model

LLAMA = FAMILIES["llama"]
PACKED = every_family(lambda family: family.packed is True)
TOKEN_BYTES = 2 * 2 * 2 * 16 * 4  # layers × K and V × KV heads × head dim × float32, of the family llama
BLOCK_BYTES = BLOCK_SIZE * TOKEN_BYTES


def patched(family=LLAMA, **overrides):
    """A patched model after its first call, in which it may look at what the model can do."""
    model = patch_model(copy_of(family), **{"block_size": BLOCK_SIZE, **overrides})
    first_call(model)
    return model


def first_call(model) -> None:
    model.generate(**batch([tokens(3, seed=90)]), do_sample=False, max_new_tokens=1)
    model.paged.clear()
    model.paged.reset_stats()


@contextlib.contextmanager
def forwards(model):
    """Records `(rows, tokens)` of everything that enters the model, where nothing can be made up: at its embedding."""
    shapes = []
    embedding = model.get_input_embeddings()
    forward = embedding.forward

    def counting(ids, *args, **kwargs):
        shapes.append(tuple(ids.shape))
        return forward(ids, *args, **kwargs)

    embedding.forward = counting  # not a hook: with one, nothing is shared
    if hasattr(model, "paged"):  # which tries anew a model with another forward
        first_call(model)
        shapes.clear()
    yield shapes
    del embedding.forward


def prefill_tokens(model, inputs, **kwargs) -> int:
    """How many tokens enter the model for a call that is only a prefill."""
    with forwards(model) as shapes:
        model.generate(**inputs, **{"do_sample": False, "max_new_tokens": 1, **kwargs})
    return sum(rows * count for rows, count in shapes)


class Watch(StoppingCriteria):
    """Looks at the statistics after every step, as a user could."""

    def __init__(self, model, inner=None):
        self.model, self.inner, self.seen = model, inner, []
        if hasattr(inner, "eos_token_id"):
            self.eos_token_id = inner.eos_token_id

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(self.model.paged.stats())
        done = torch.zeros(len(input_ids), dtype=torch.bool)
        return done if self.inner is None else self.inner(input_ids, scores, **kwargs)


def watched(model, inputs, inner=None, **kwargs):
    watch = Watch(model, inner)
    output = model.generate(
        **inputs,
        stopping_criteria=StoppingCriteriaList([watch]),
        **{"do_sample": False, "max_new_tokens": 16, **kwargs},
    )
    return output, watch.seen


# Computed once


@pytest.mark.parametrize(
    "make", [prompts.ragged, prompts.shared_prefix, prompts.identical, prompts.diverse, prompts.single]
)
@pytest.mark.parametrize("family", PACKED)
def test_each_distinct_prompt_token_enters_the_model_once(family, make):
    model = patched(family)
    entered = prefill_tokens(model, make())
    assert entered == prompts.num_distinct_tokens(make()), f"{family.name}, {make.__name__}"
    stats = model.paged.stats()
    assert stats.computed_tokens == entered, "the statistics say what happened"
    assert stats.prompt_tokens == prompts.num_real_tokens(make())


def test_stock_computes_padding_and_repeats():
    """The yardstick of these tests: the hook counts everything that stock computes."""
    inputs = prompts.shared_prefix()
    assert prefill_tokens(copy_of(LLAMA), inputs) == inputs["input_ids"].numel()


@pytest.mark.parametrize(
    "how", [{"num_return_sequences": 4, "do_sample": True}, {"num_beams": 4}], ids=["samples", "beams"]
)
@pytest.mark.parametrize("family", PACKED)
def test_copies_of_a_prompt_are_computed_once(family, how):
    model = patched(family)
    assert prefill_tokens(model, prompts.single(), **how) == 21
    stats = model.paged.stats()
    assert (stats.prompt_tokens, stats.computed_tokens, stats.shared_tokens) == (84, 21, 63)
    assert stats.fallbacks == {}


def test_samples_differ_although_they_share():
    model, inputs = patched(), prompts.single()
    torch.manual_seed(0)
    output = model.generate(**inputs, do_sample=True, temperature=1.5, num_return_sequences=4, max_new_tokens=12)
    assert len({tuple(row.tolist()) for row in output}) == 4


def test_beams_of_a_ragged_batch():
    model = patched()
    assert prefill_tokens(model, prompts.ragged(), num_beams=3) == sum(prompts.LENGTHS)
    stats = model.paged.stats()
    assert (stats.computed_tokens, stats.shared_tokens) == (sum(prompts.LENGTHS), 2 * sum(prompts.LENGTHS))


@pytest.mark.parametrize("prefix", [1, 7, 8, 9, 24, 40])
def test_a_shared_prefix_of_any_length(prefix):
    """Also where the rows part inside a block."""
    system = tokens(prefix)
    inputs = batch([system + tokens(5, seed) for seed in (11, 12, 13, 14)])
    model = patched()
    assert prefill_tokens(model, inputs) == prefix + 4 * 5
    stats = model.paged.stats()
    assert (stats.computed_tokens, stats.shared_tokens) == (prefix + 20, 3 * prefix)
    expected = stock_model("llama").generate(**inputs, do_sample=False, max_new_tokens=12)
    assert torch.equal(model.generate(**inputs, do_sample=False, max_new_tokens=12), expected)


def test_rows_that_part_at_several_places():
    a, b, c = tokens(10), tokens(9, seed=1), tokens(8, seed=2)
    rows = [a + b + c, a + b + tokens(3, seed=3), a + tokens(6, seed=4), a, a + b, a + b + c, tokens(4, seed=5)]
    model, inputs = patched(), batch(rows)
    assert prefill_tokens(model, inputs) == prompts.num_distinct_tokens(inputs) < 50
    expected = stock_model("llama").generate(**inputs, do_sample=False, max_new_tokens=12)
    assert torch.equal(model.generate(**inputs, do_sample=False, max_new_tokens=12), expected)


@pytest.mark.parametrize("family", PACKED)
def test_chunks_bound_what_enters_at_once(family):
    model = patched(family)
    with forwards(model) as shapes:
        model.generate(**prompts.single(), do_sample=False, max_new_tokens=1, prefill_chunk_size=5)
    assert max(rows * count for rows, count in shapes) <= 5
    assert sum(rows * count for rows, count in shapes) == 21


def test_decode_steps_compute_one_token_a_row():
    model, inputs = patched(), prompts.ragged()
    with forwards(model) as shapes:
        model.generate(**inputs, do_sample=False, max_new_tokens=9)
    rows = len(inputs["input_ids"])
    assert sum(count * many for many, count in shapes) <= sum(prompts.LENGTHS) + rows * 8


@pytest.mark.parametrize("name", ["bloom", "falcon_alibi"])
def test_a_family_that_cannot_be_packed_says_why(name):
    model = patched(FAMILIES[name])
    model.generate(**prompts.ragged(), do_sample=False, max_new_tokens=3)
    model.generate(**prompts.ragged(), do_sample=False, max_new_tokens=3)
    reasons = model.paged.stats().fallbacks
    assert reasons
    assert all(reason.strip() and count >= 1 for reason, count in reasons.items())
    assert max(reasons.values()) == 2, f"counts calls: {reasons}"


# Kept once


@pytest.mark.parametrize("num_beams", [2, 4])
@pytest.mark.parametrize("family", PACKED)
def test_a_reorder_copies_at_most_one_block_a_row(family, num_beams):
    model, inputs, new = patched(family), prompts.ragged(), 12
    model.generate(**inputs, num_beams=num_beams, do_sample=False, max_new_tokens=new)
    rows = len(inputs["input_ids"]) * num_beams
    copied = model.paged.stats().copied_blocks
    groups = 2 if family.name in ("gemma2", "gemma3") else 1  # tables of full and of window layers
    assert copied <= groups * rows * new
    assert copied > 0 or family.name == "never", "rows that part inside a block must copy it"


def test_beams_share_the_blocks_of_their_prompt():
    model, inputs = patched(), batch([tokens(80)])
    _, seen = watched(model, inputs, num_beams=4, max_new_tokens=14)
    peak = max(stats.blocks_in_use for stats in seen)
    assert peak <= 80 // BLOCK_SIZE + 4 * 3, f"{peak} blocks; four rows of their own would take {4 * 12}"


def test_samples_share_the_blocks_of_their_prompt():
    model, inputs = patched(), batch([tokens(80)])
    _, seen = watched(model, inputs, do_sample=True, num_return_sequences=6, max_new_tokens=14)
    peak = max(stats.blocks_in_use for stats in seen)
    assert peak <= 80 // BLOCK_SIZE + 6 * 2


def test_padding_is_not_stored():
    model, inputs = patched(), batch([tokens(100), tokens(3, seed=1), tokens(9, seed=2)])
    _, seen = watched(model, inputs, max_new_tokens=6)
    blocks = sum(-(-(length + 5) // BLOCK_SIZE) for length in (100, 3, 9))
    assert max(stats.blocks_in_use for stats in seen) <= blocks + 3  # one in hand for the next token of each row


def distinct_and_rows(inputs, new: int) -> tuple[int, int]:
    rows = len(inputs["input_ids"])
    return prompts.num_distinct_tokens(inputs) + rows * new, rows


@pytest.mark.parametrize(
    "rows",
    [
        [tokens(150)],
        [tokens(150, seed) for seed in range(4)],
        [tokens(100) + tokens(10 * extra, seed=extra) for extra in range(1, 9)],
        [tokens(100)] * 8,
    ],
    ids=["one row", "four rows", "eight rows under one prefix", "eight copies"],
)
def test_memory_bound(rows):
    """At most 1.04 × the bytes of the distinct real tokens, plus one block a row, at every step.

    Copies of a prompt that ends inside a block part there: each holds its own copy of that block's beginning, which
    can take one block more per row than the rule says.
    """
    model, inputs = patched(), batch(rows)
    _, seen = watched(model, inputs, max_new_tokens=30)
    for step, stats in enumerate(seen):
        distinct, count = distinct_and_rows(inputs, step)
        forked = count if rows[0] == rows[-1] and count > 1 and len(rows[0]) % BLOCK_SIZE else 0
        allowed = 1.04 * distinct * TOKEN_BYTES + (count + forked) * BLOCK_BYTES
        assert stats.bytes_in_use <= allowed, f"step {step}: {stats.bytes_in_use} bytes in use, allowed {allowed:.0f}"
        assert stats.bytes_in_use >= 0.9 * distinct * TOKEN_BYTES, f"step {step}: too few to be true"
        assert stats.bytes_reserved >= stats.bytes_in_use


# Given back


class RowEnds(StoppingCriteria):
    """Row i ends after `steps[i]` new tokens; with `eos`, stock then pads it."""

    def __init__(self, prompt_length: int, steps: list[int], eos: bool):
        self.prompt_length, self.steps = prompt_length, torch.tensor(steps)
        if eos:
            self.eos_token_id = torch.tensor([2])

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] - self.prompt_length >= self.steps


def stock_answer(inputs, ends):
    """At most 20 new tokens."""
    criteria = StoppingCriteriaList([ends])
    return stock_model("llama").generate(**inputs, do_sample=False, max_new_tokens=20, stopping_criteria=criteria)


def test_finished_rows_free_their_blocks_at_once():
    model, steps = patched(), [2, 5, 9, 14]
    inputs, ends = batch([tokens(40, seed) for seed in range(4)]), RowEnds(40, steps, eos=True)
    output, seen = watched(model, inputs, inner=ends, max_new_tokens=20)
    assert output.shape[1] == 40 + 14
    used = [stats.bytes_in_use for stats in seen]
    for step in steps[:-1]:
        # Seen by the criterion of the step after the one in which the row ended.
        assert used[step] <= used[step - 1] - 40 // BLOCK_SIZE * BLOCK_BYTES + 3 * BLOCK_BYTES, f"step {step}: {used}"
    assert used[-1] <= (40 + 14) / 40 * used[0] / 4 + BLOCK_BYTES, "only the last row is left"
    assert torch.equal(output, stock_answer(inputs, ends))


def test_real_end_tokens_free_blocks():
    inputs = batch([tokens(40, seed) for seed in range(4)])
    free = stock_model("llama").generate(**inputs, do_sample=False, max_new_tokens=12)[:, 40:]
    eos = [int(free[0, 2]), int(free[1, 5])]
    model = patched()
    output, seen = watched(model, inputs, eos_token_id=eos)
    expected = stock_model("llama").generate(**inputs, do_sample=False, max_new_tokens=16, eos_token_id=eos)
    assert torch.equal(output, expected)
    assert seen[-1].bytes_in_use < seen[1].bytes_in_use, "two of four rows have ended"


def test_rows_that_stock_goes_on_with_keep_their_blocks():
    """Without `eos_token_id` on the criterion, stock generates real tokens for finished rows: they need their past."""
    inputs, ends = batch([tokens(40, seed) for seed in range(4)]), RowEnds(40, [2, 5, 9, 14], eos=False)
    output, seen = watched(patched(), inputs, inner=ends, max_new_tokens=20)
    used = [stats.bytes_in_use for stats in seen]
    assert used == sorted(used), "nothing shrinks"
    assert torch.equal(output, stock_answer(inputs, ends))


def test_a_finished_row_leaves_the_prefix_that_others_share():
    system = tokens(48)
    inputs = batch([system + tokens(8, seed) for seed in (1, 2, 3)])
    ends = RowEnds(56, [1, 3, 12], eos=True)
    output, seen = watched(patched(), inputs, inner=ends, max_new_tokens=20)
    assert seen[-1].blocks_in_use >= 48 // BLOCK_SIZE
    assert torch.equal(output, stock_answer(inputs, ends))


def test_nothing_is_reserved_for_a_maximum_length():
    """`max_new_tokens` is a limit, not a reservation."""
    reserved = []
    for limit in (12, 200):
        model = patched()
        stop = RowEnds(21, [8], eos=True)
        model.generate(
            **prompts.single(), do_sample=False, max_new_tokens=limit, stopping_criteria=StoppingCriteriaList([stop])
        )
        reserved.append(model.paged.stats().bytes_reserved)
    assert reserved[1] <= 2 * reserved[0], f"{reserved} bytes for limits of 12 and 200"


def test_peak_after_a_large_call_does_not_stay_in_use():
    model = patched()
    model.generate(**batch([tokens(120, seed) for seed in range(4)]), do_sample=False, max_new_tokens=4)
    assert model.paged.stats().blocks_in_use == 0
    _, seen = watched(model, prompts.single(), max_new_tokens=4)
    assert max(stats.blocks_in_use for stats in seen) <= -(-25 // BLOCK_SIZE) + 1
