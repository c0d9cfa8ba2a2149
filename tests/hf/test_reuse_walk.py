"""Prefix reuse under pressure: small pools, exceptions, threads, and random walks over everything at once."""

import threading

import pytest
import torch
from families import VOCAB
from mode_parts import RecordingStreamer
from pair import NEW, Pair, distinct_pieces, evict, piece
from prompts import batch, tokens
from test_sharing import BLOCK_BYTES
from transformers import StoppingCriteria, StoppingCriteriaList

from hf_paged import PagedMemoryError

# Behind the skip: a machine that is there for its GPU may lack hypothesis.
hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402


def small(blocks: int, name: str = "llama") -> Pair:
    """A pair whose pool holds so many blocks, and the null block; the families used here have tokens of one size."""
    return Pair(name, max_memory={"cpu": (blocks + 1) * BLOCK_BYTES})


# Little memory


@pytest.mark.parametrize("blocks", [5, 6, 9, 16])
def test_a_long_series_of_prompts_in_a_small_pool(blocks):
    """21 prompt tokens and 5 stored new ones take 4 blocks; what was cached makes room for them."""
    pair, evicted = small(blocks), 0
    for row in distinct_pieces(9, 21):
        pair.ask([row])
        stats = pair.check()
        assert (stats.fallbacks, stats.reused_tokens) == ({}, 0)
        evicted += stats.evicted_blocks
        assert stats.blocks_cached <= blocks
    assert evicted == 9 * 4 - pair.pool.cached
    for row in (piece(21, 8), piece(21, 3), [*piece(21, 8)[:12], 5], piece(21, 3)):
        pair.ask([row])


def test_evicted_blocks_are_counted():
    pair = small(8)
    for row in distinct_pieces(2, 21):
        pair.ask([row])
        assert pair.paged.stats().evicted_blocks == 0
    assert pair.paged.stats().blocks_cached == 8
    pair.ask([piece(21, 3)])
    assert pair.paged.stats().evicted_blocks == 4


def test_the_least_recently_used_prompt_goes_first():
    """Three prompts of 3 full blocks and one to work in: the fourth takes that and the end of the second."""
    pair = small(10)
    first, second, third, fourth = distinct_pieces(4, 21)
    for row in (first, second, third, first):
        pair.ask([row], max_new_tokens=4)
        assert pair.paged.stats().evicted_blocks == 0
    assert pair.reused == 20
    pair.ask([fourth], max_new_tokens=4)
    assert pair.paged.stats().evicted_blocks == 2
    evict(pair, 1)
    for row, reused in ((first, 20), (third, 20), (fourth, 20), (second, 0)):
        pair.ask([row], max_new_tokens=1)
        assert pair.reused == reused


def test_a_prompt_that_is_hit_in_its_beginning_only_keeps_that():
    pair = small(12)
    first, second, third = distinct_pieces(3, 21)
    pair.ask([first])
    pair.ask([second])
    pair.ask([first[:9]], max_new_tokens=1)  # the first block is used again, the others are not
    pair.ask([third])
    pair.ask([piece(21, 9)])  # takes four blocks; the oldest are the rest of the first prompt
    pair.ask([first])
    assert 8 <= pair.reused < 20


@pytest.mark.parametrize("evicted", range(1, 9))
def test_chains_lose_their_ends_before_their_roots(evicted):
    pair = Pair()
    pair.ask([piece(61, 1)], max_new_tokens=4)  # 64 stored tokens
    assert pair.pool.cached == 8
    evict(pair, evicted)
    pair.ask([piece(61, 1)])
    assert pair.reused == min(8 * (8 - evicted), 60), "what is left is the beginning"


def test_a_call_that_fits_only_when_nothing_is_reused():
    """A hit inside a block needs the block and its copy at once."""
    pair, row = small(4), piece(20, 1)
    pair.ask([row])
    parted = [*row[:17], 5, 6, *tokens(8, seed=3)]
    pair.ask([parted])
    assert pair.reused in (0, 16), "in the last of four blocks there is no room for a copy"
    pair.ask([parted])


def test_a_batch_that_fits_only_when_nothing_is_reused():
    """Rows that hit different blocks of one content hold more of them than a fresh batch would."""
    pair = small(8)
    pair.ask([piece(24, 1)])
    for rows in ([piece(24, 1), piece(24, 2)], [piece(23, 1), [*piece(17, 1), 4], [*piece(18, 1), 6]], [piece(58, 1)]):
        pair.ask(rows, max_new_tokens=4)


def test_what_cannot_fit_at_all_says_so_and_leaves_the_rest():
    pair = small(6)
    pair.ask([piece(21, 1)])
    with pytest.raises(PagedMemoryError):
        pair.model.generate(**batch([piece(70, 2)]), do_sample=False, max_new_tokens=2)
    pair.check()
    pair.ask([piece(21, 1)])
    assert pair.reused == 20, "a call that was refused at once has evicted nothing"
    with pytest.raises(PagedMemoryError):
        pair.model.generate(**batch([piece(40, 2)]), do_sample=False, max_new_tokens=30)
    pair.check()
    pair.ask([piece(21, 1)])
    pair.ask([piece(40, 2)])


def test_blocks_in_use_are_never_evicted():
    """A held cache beside a series of prompts in a pool that is too small for all."""
    pair, ids = small(10), torch.tensor([piece(21, 1)])
    outputs = [
        model.generate(ids, do_sample=False, max_new_tokens=4, return_dict_in_generate=True)
        for model in (pair.stock, pair.model)
    ]
    for row in distinct_pieces(5, 30):
        expected, actual = (
            model.generate(**batch([row]), do_sample=False, max_new_tokens=NEW) for model in (pair.stock, pair.model)
        )
        assert torch.equal(actual, expected)
        pair.paged._pool.manager.check_integrity()
    following = [
        model.generate(output.sequences, past_key_values=output.past_key_values, do_sample=False, max_new_tokens=6)
        for model, output in zip((pair.stock, pair.model), outputs, strict=True)
    ]
    assert torch.equal(*following)
    outputs.clear()
    pair.check()


# Exceptions


class Boom(Exception):
    pass


class RaisingStreamer(RecordingStreamer):
    def __init__(self, at: int):
        super().__init__()
        self.at = at

    def put(self, value):
        super().put(value)
        if len(self.puts) > self.at:
            raise Boom


class RaisingCriterion(StoppingCriteria):
    def __init__(self, at: int):
        self.at = at

    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] >= self.at:
            raise Boom
        return torch.zeros(len(input_ids), dtype=torch.bool)


RAISING = {
    "streamer": lambda at: {"streamer": RaisingStreamer(at)},
    "criterion": lambda at: {"stopping_criteria": StoppingCriteriaList([RaisingCriterion(21 + at)])},
    "beams": lambda at: {"stopping_criteria": StoppingCriteriaList([RaisingCriterion(21 + at)]), "num_beams": 3},
    "lookup": lambda at: {
        "stopping_criteria": StoppingCriteriaList([RaisingCriterion(21 + at)]),
        "prompt_lookup_num_tokens": 3,
        "eos_token_id": VOCAB - 1,  # 5.8 asks for one
    },
}


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("at", [0, 1, 4])
@pytest.mark.parametrize("who", RAISING)
def test_an_exception_gives_blocks_back(who, at, warm):
    pair, row = Pair(), piece(21, 1)
    if warm:
        pair.ask([row])
    with pytest.raises(Boom):
        pair.model.generate(**batch([row]), do_sample=False, max_new_tokens=12, **RAISING[who](at))
    pair.check()
    pair.ask([row], max_new_tokens=12)
    pair.ask([[*row[:15], 4]], num_beams=2)


@pytest.mark.parametrize("layer", [0, 1])
def test_an_exception_in_a_pass_leaves_nothing_half_written(layer):
    """Tokens of a pass that did not come to its end must not be found."""
    pair, row = Pair(), piece(21, 1)
    pair.ask([row[:6]])
    plain = type(pair.model.model.layers[layer].mlp).forward
    for failing in (1, 2, 3):
        calls = []

        def fail(module, hidden, failing=failing, calls=calls):
            calls.append(1)
            if len(calls) >= failing:
                raise Boom
            return plain(module, hidden)

        type(pair.model.model.layers[layer].mlp).forward = fail
        try:
            with pytest.raises(Boom):
                pair.model.generate(**batch([row]), do_sample=False, max_new_tokens=5, prefill_chunk_size=8)
        finally:
            type(pair.model.model.layers[layer].mlp).forward = plain
        pair.check()
        pair.ask([row])


# Threads


@pytest.mark.timeout(120)
@pytest.mark.parametrize("blocks", [None, 40], ids=["room", "pressure"])
def test_threads_that_share_prefixes(blocks):
    pair = Pair() if blocks is None else small(blocks)
    system = piece(20, 1)
    asked = [system[: 9 + 4 * (at % 4)] + piece(5 + at % 3, at % 5) for at in range(24)]
    expected = {tuple(row): pair.stock.generate(**batch([row]), do_sample=False, max_new_tokens=NEW) for row in asked}
    wrong, barrier = [], threading.Barrier(4)

    def work(mine):
        try:
            barrier.wait()
            for at, row in enumerate(mine):
                salt = "other" if at % 5 == 4 else None
                answer = pair.model.generate(**batch([row]), do_sample=False, max_new_tokens=NEW, cache_salt=salt)
                if not torch.equal(answer, expected[tuple(row)]):
                    wrong.append((row, answer))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(asked[at::4] + asked[: 4 * at],)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    stats = pair.check()
    assert stats.reused_tokens > 0


# Random walks


PIECES = [piece(length, name) for name, length in enumerate((19, 1, 2, 5, 8, 11, 16))]
HOW = {
    "greedy": {},
    "beams": {"num_beams": 2},
    "samples": {"do_sample": True, "num_return_sequences": 2},
    "chunks": {"prefill_chunk_size": 3},
    "scores": {"return_dict_in_generate": True, "output_scores": True},
    "lookup": {"prompt_lookup_num_tokens": 3, "eos_token_id": VOCAB - 1},  # 5.8 asks for an end token
    "embeds": None,
}


def weights(at: int):
    def change(model):
        parameter = list(model.parameters())[at % len(list(model.parameters()))]
        (parameter.data if at % 2 else parameter.detach()).mul_(1.1 if at % 3 else -1.0)

    return change


prompt = st.lists(st.sampled_from(range(len(PIECES))), min_size=1, max_size=4)
step = {
    "ask": st.tuples(
        st.lists(st.tuples(st.sampled_from(["new", "under", "under", "told", "cut"]), prompt), min_size=1, max_size=3),
        st.sampled_from(["greedy", "greedy", *HOW]),
        st.sampled_from([None, None, None, "a", "b"]),
        st.integers(1, 11),
    ),
    "evict": st.tuples(st.integers(1, 6)),
    "weights": st.tuples(st.integers(0, 40)),
    "clear": st.tuples(),
    "release": st.tuples(),
}
KINDS = ["ask"] * 14 + ["evict"] * 2 + ["weights", "clear", "release"]
steps_of_a_walk = st.lists(
    st.sampled_from(KINDS).flatmap(lambda kind: st.tuples(st.just(kind), step[kind])), min_size=12, max_size=20
)


def row_of(kind: str, names: list[int], told: list[list[int]]) -> list[int]:
    """A prompt: pieces, also under a system prompt or behind what was said before, or a part of what was said."""
    row = [token for name in names for token in PIECES[name]]
    if kind == "under":
        row = PIECES[0] + row
    if told and kind == "told":
        row = told[sum(names) % len(told)] + row
    if told and kind == "cut":
        said = told[sum(names) % len(told)]
        row = said[: 1 + sum(names) * 7 % len(said)]
    return row[-60:] if sum(names) % 5 == 4 else row[:60]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("blocks", [None, 36], ids=["room", "pressure"])  # three rows of 71 tokens, twice, fit
def test_a_random_walk_answers_as_stock(name, blocks):
    @settings(max_examples=8, deadline=None)
    @given(steps=steps_of_a_walk)
    def walk(steps):
        pair, told = Pair(name) if blocks is None else small(blocks, name), []
        for what, arguments in steps:
            if what == "ask":
                take_turn(pair, told, *arguments)
            elif what == "weights":
                pair.both(weights(*arguments))
            elif pair.paged._pool is not None:
                evict(pair, *arguments) if what == "evict" else getattr(pair.paged, what)()
                pair.check()

    walk()


def take_turn(pair, told, asked, how, salt, new) -> None:
    rows = [row_of(kind, names, told) for kind, names in asked]
    if how == "lookup":
        rows = rows[:1]
    if how == "embeds":
        inputs = batch(rows)
        ids = inputs.pop("input_ids")
        inputs["inputs_embeds"] = pair.stock.get_input_embeddings()(ids).detach()
        pair.ask(inputs, salt=salt, max_new_tokens=new)
        return
    answer = pair.ask(rows, salt=salt, max_new_tokens=new, **HOW[how])
    width = max(map(len, rows))
    told += [answer[at, width - len(row) :].tolist() for at, row in enumerate(rows) if len(answer) == len(rows)]
