"""Hybrids: states are kept where later prompts go on, and prompts of which some was computed begin there."""

import contextlib
import copy
import functools

import more_models
import prompts
import pytest
import torch
from compare import BLOCK_SIZE
from mishaps import BadCriterion, Boom
from pair import Pair, evict, text
from prompts import batch, tokens
from transformers import StoppingCriteriaList
from transformers.cache_utils import LinearAttentionLayer
from versions import IS_PINNED, skip_if_older

from hf_paged import resume, stepwise

NOT_SHARED = "prompts not shared: "
# With every prompt of several tokens, in modules of its own, or with other states behind answers than behind prompts.
BEGINS_ANEW = ["jamba", "recurrent_gemma", "zamba2"]
GOES_ON = ["lfm2", "qwen3_next", *(name for name in more_models.HYBRIDS if name not in BEGINS_ANEW)]
SYSTEM = tokens(43, seed=1)
OTHER = tokens(51, seed=2)


def hybrid(name: str, wrap=lambda model: model, **overrides) -> Pair:
    if name not in more_models.HYBRIDS:
        return Pair(name, wrap, **overrides)
    return Pair.of(wrap(copy.deepcopy(more_models.build(name))), **overrides)


def tried(name: str, **overrides) -> Pair:
    """A pair whose model has been found to compute prompts in pieces as in one."""
    pair = hybrid(name, **overrides)
    for last in range(2):
        pair.ask([SYSTEM + tokens(5, seed=60 + last)])
        assert (pair.computed, pair.reused) == (48, 0), "the second is computed both ways"
    pair.ask([SYSTEM])
    reasons = [each for each in pair.paged.stats().fallbacks if each.startswith(NOT_SHARED)]
    if reasons:
        skip_if_older(f"this transformers cannot go on from a state of {name} with several tokens: {reasons}")
    return pair


def kept(pair: Pair) -> int:
    return pair.paged._pool.kept_states.cached


def turn(pair: Pair, prompt: list[int], number: int, said: int = 7) -> list[int]:
    """Asks, and returns the prompt of the next turn: the answer and something more to say."""
    return pair.ask([prompt], max_new_tokens=10)[0].tolist() + tokens(said, seed=number + 5)


@pytest.mark.parametrize("name", GOES_ON)
def test_turns_of_a_chat(name):
    pair = tried(name)
    prompt = turn(pair, OTHER, 0)
    for number, said in enumerate((1, 2, 3, 20), start=1):
        given = number and len(prompt)
        known = pair.computed + pair.reused + 10 - 1  # the last token of the answer was never computed
        prompt = turn(pair, prompt, number, said)
        assert (pair.computed, pair.reused) == (given - known, known)


@pytest.mark.parametrize("name", GOES_ON)
def test_questions_under_one_system_prompt(name):
    pair = tried(name)
    pair.ask([SYSTEM + tokens(9, seed=70)])
    assert (pair.computed, pair.reused) == (9, 43), "a state was kept when the second was computed both ways"
    for last, computed in enumerate((51 + 6, 51 + 6, 6, 6)):
        pair.ask([OTHER + tokens(6, seed=80 + last)])
        assert pair.computed == computed, "where the second parts from the first a state is kept"


@pytest.mark.parametrize("name", ["lfm2", "qwen3_next"])
def test_the_same_prompt_again(name):
    pair = tried(name)
    for computed in (51, 51, 1, 1):
        pair.ask([OTHER])
        assert pair.computed == computed


@pytest.mark.parametrize("name", ["lfm2", "qwen3_next"])
def test_answers_that_are_left_out_of_the_next_turn(name):
    """As chat templates do with what a model has thought."""
    pair = tried(name)
    pair.ask([OTHER], max_new_tokens=10)
    pair.ask([OTHER + tokens(8, seed=90)], max_new_tokens=10)
    assert (pair.computed, pair.reused) == (8, 51)


@pytest.mark.parametrize("name", GOES_ON)
@pytest.mark.parametrize("kwargs", [{"do_sample": True, "num_return_sequences": 3}, {"num_beams": 3}], ids=str)
def test_equal_rows_are_computed_once(name, kwargs):
    pair = tried(name)
    for seed, computed in ((2, 3 * 47), (4, 47)):  # with padding that is tried by itself
        pair.ask([tokens(25, seed), tokens(22, seed + 1)], **kwargs)
        assert (pair.computed, pair.reused) == (computed, 0)
    before = kept(pair)
    pair.ask([SYSTEM + tokens(4, seed=5)], **kwargs)
    assert (pair.computed, pair.reused) == (4, 3 * 43)
    assert kept(pair) == before + 1, "nobody goes on with samples and beams: the prompt's state alone is kept"


@pytest.mark.parametrize("name", GOES_ON)
def test_rows_of_a_batch(name):
    pair = tried(name)
    rows = [SYSTEM + tokens(9, seed=70), SYSTEM + tokens(9, seed=71)]
    pair.ask(rows)
    assert (pair.computed, pair.reused) == (18, 86)
    pair.ask([SYSTEM + tokens(9, seed=72), SYSTEM + tokens(4, seed=73)])
    assert (pair.computed, pair.reused) == (52 + 47, 0), "their states would be kept behind other columns"
    pair.ask([SYSTEM + tokens(4, seed=74), tokens(4, seed=75)])
    assert pair.reused == 0


def test_rows_that_end_early_are_found_again():
    """Their states are those of the end of the answer, not of the padding that follows it."""
    pair = tried("lfm2")
    rows = [OTHER, tokens(51, seed=4)]
    plain = pair.ask(rows, max_new_tokens=10)[:, 51:]
    end = int(plain[0, 3])
    assert end not in plain[0, :3].tolist() + plain[1, :8].tolist(), "row 0 ends before row 1"
    pair.paged.clear()
    pair.ask(rows, max_new_tokens=10, eos_token_id=end)
    assert kept(pair) == 4, "of each row behind its prompt and behind its answer"
    pair.ask([OTHER + plain[0, :4].tolist() + tokens(6, seed=3)])
    assert (pair.computed, pair.reused) == (7, 51 + 3)


@pytest.mark.parametrize("name", BEGINS_ANEW)
def test_models_that_begin_anew(name):
    pair, prompt = hybrid(name), OTHER
    for number in range(4):
        prompt = turn(pair, prompt, number)
        assert pair.reused == 0
    reasons = (NOT_SHARED, "prefixes not reused", "stock generate: layer 0 keeps no K and V")
    assert any(each.startswith(reasons) for each in pair.paged.stats().fallbacks)


@pytest.mark.parametrize("forgets", [lambda count: count > 1, lambda count: 1 < count < 4], ids=["all", "few"])
def test_a_model_that_forgets_is_given_whole_prompts(monkeypatch, forgets):
    """As older versions of some do: they begin anew with any prompt of several tokens, or of less than a kernel."""
    update = LinearAttentionLayer.update_conv_state

    @functools.wraps(update)
    def forgetting(self, conv_states, *args, **kwargs):
        if forgets(conv_states.shape[-1]) and any(self.has_previous_state.values()):
            LinearAttentionLayer.reset(self)
        return update(self, conv_states, *args, **kwargs)

    if not isinstance(LinearAttentionLayer().conv_states, dict):
        skip_if_older("this transformers keeps one state a layer")
    monkeypatch.setattr(LinearAttentionLayer, "update_conv_state", forgetting)
    pair, prompt = Pair("lfm2"), OTHER
    for number, said in enumerate((30, 30, 2, 1, 7)):
        prompt = turn(pair, prompt, number, said)
        assert pair.reused == 0
    reasons = pair.paged.stats().fallbacks
    assert any(each.startswith(NOT_SHARED + "logits of a prompt in two pieces") for each in reasons)


@pytest.mark.parametrize("salt", [None, "tenant"])
def test_salts_and_weights(salt):
    tried("qwen3_next").check_salts_and_weights([SYSTEM + tokens(5, seed=last) for last in (65, 66)], salt, known=43)


def test_what_gives_memory_back():
    pair = tried("qwen3_next")
    runtime = pair.paged
    held = runtime.stats().bytes_reserved
    states = kept(pair) * pair.paged._pool.kept_states.block_bytes
    assert 0 < states < held
    runtime.clear()
    assert kept(pair) == 0
    assert runtime.stats().bytes_reserved <= held - states
    pair.ask([SYSTEM + tokens(5, seed=65)])
    assert (pair.computed, pair.reused) == (48, 0)
    runtime.release()
    assert runtime.stats().bytes_reserved == 0


def test_states_without_prefixes():
    pair = hybrid("lfm2", prefix_caching=False)
    for _ in range(3):
        pair.ask([SYSTEM])
        assert (pair.computed, pair.reused) == (43, 0)
    assert kept(pair) == 0
    pair.ask([SYSTEM], num_beams=2)
    pair.ask([SYSTEM], num_beams=2)
    assert pair.computed == 43 or not IS_PINNED, "older versions may begin anew with several tokens"


def test_states_count_and_the_oldest_go_first():
    """A budget with room for two prompts and a few states: all answers are right, and no more than that is held."""
    pair = tried("qwen3_next")
    state_bytes, block_bytes = pair.paged._pool.kept_states.block_bytes, pair.pool.pools[0].block_bytes
    budget = 3 * state_bytes + 24 * block_bytes
    pair = tried("qwen3_next", max_memory={"cpu": budget})
    for number in range(12):
        pair.ask([tokens(50, seed=number % 5)])
        assert pair.paged.stats().bytes_reserved <= budget
        assert kept(pair) >= 1
    with pytest.raises(RuntimeError, match="max_memory"):
        pair.model.generate(**batch([tokens(60 * BLOCK_SIZE)]), max_new_tokens=1)
    pair.ask([tokens(20 * BLOCK_SIZE)], max_new_tokens=4)
    assert pair.paged.stats().bytes_reserved <= budget


def test_no_room_for_a_state():
    pair = tried("qwen3_next")
    state_bytes, block_bytes = pair.paged._pool.kept_states.block_bytes, pair.pool.pools[0].block_bytes
    assert state_bytes > block_bytes
    pair = hybrid("qwen3_next", max_memory={"cpu": 8 * block_bytes})  # of which a prompt takes 7, and the null block
    for _ in range(3):
        pair.ask([SYSTEM])
        assert kept(pair) == 0


def test_a_state_whose_blocks_are_gone_is_of_no_use():
    pair = tried("lfm2")
    pair.ask([OTHER])
    before = kept(pair)
    evict(pair)
    pair.ask([OTHER + tokens(6, seed=4)])
    assert (pair.computed, pair.reused) == (57, 0)
    assert kept(pair) == before + 1, "of three, one was given up when it was looked for"


def test_refused_memory_for_a_state_is_no_error(monkeypatch):
    pair = tried("lfm2")

    def refuse(*args):
        raise torch.OutOfMemoryError("made up")

    monkeypatch.setattr("hf_paged.kept_states.state_of_row", refuse)
    before = kept(pair)
    pair.ask([OTHER])
    assert kept(pair) == before


@pytest.mark.parametrize("when", range(4))
def test_errors_and_what_follows_them(monkeypatch, when):
    pair = tried("lfm2")
    run, calls = resume.run_padded, []

    def failing(*args):
        calls.append(args)
        if len(calls) == when:
            raise Boom
        return run(*args)

    pair.ask([OTHER + tokens(4, seed=4)])
    monkeypatch.setattr(resume, "run_padded", failing)
    prompt = {**batch([OTHER + tokens(5, seed=5)]), "max_new_tokens": 4}
    with contextlib.suppress(Boom):
        pair.model.generate(**prompt, stopping_criteria=StoppingCriteriaList([BadCriterion(Boom, 3)]))
    monkeypatch.undo()
    pair.check()
    for last in (6, 7):
        pair.ask([OTHER + tokens(5, seed=last)])
    assert pair.reused == 51


def test_hooks_see_every_row():
    pair, seen = tried("lfm2"), []
    handle = pair.model.model.layers[0].register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    pair.ask([SYSTEM + tokens(5, seed=60)], num_beams=3)
    assert seen[0][:2] == (3, 48)
    handle.remove()
    pair.ask([SYSTEM + tokens(5, seed=60)], num_beams=3)
    assert pair.reused == 3 * 43


@pytest.mark.parametrize("kwargs", [{"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 7}], ids=str)
def test_other_ways_through_a_prompt(kwargs):
    pair = tried("lfm2")
    prompt = SYSTEM + SYSTEM[3:20]
    pair.skip_where_older_stock_refuses([prompt], max_new_tokens=10, **kwargs)
    for _ in range(2):
        pair.ask([prompt], max_new_tokens=10, **kwargs)
    pair.ask([prompt + tokens(4, seed=8)])


def test_a_returned_cache_goes_on():
    pair = tried("qwen3_next")
    outputs = pair.hold([SYSTEM + tokens(6, seed=66)])
    assert pair.reused == 43
    pair.go_on(outputs)
    del outputs
    pair.ask([SYSTEM + tokens(6, seed=67)])
    assert pair.reused == 43, "what goes on in place has left the kept state as it was"


@pytest.mark.parametrize("name", GOES_ON)
def test_rows_of_unequal_length(name):
    """All go on behind one column: the next turn of each, where these have the same length; padding is hidden there."""
    pair = tried(name)
    rows = [tokens(50, seed=1), tokens(43, seed=2), tokens(31, seed=3)]
    reused = []
    for turn in range(4):
        answers = pair.ask(rows, max_new_tokens=10)
        reused.append(pair.reused)
        own = [tokens(6, seed=10 * turn + row) for row in range(3)]
        rows = [text(answer) + new for answer, new in zip(answers, own, strict=True)]
    (known,) = pair.paged._capabilities._unpacked.values()
    reasons = list(filter(None, known.later.resumes.values()))
    if reasons or not known.later.ignores_padding:
        skip_if_older(f"this transformers lets padding into the states of {name}: {reasons}")
    assert reused == [0, 0, 3 * 25 + 124, 3 * 41 + 124], "the second is computed both ways"


@pytest.mark.parametrize("name", GOES_ON)
def test_short_rows_among_long_ones(name):
    """None of the columns that end with a token of all rows would do for a trial."""
    pair = hybrid(name)
    for beams in (1, 2, 2):
        pair.ask(prompts.ragged(), max_new_tokens=12, num_beams=beams)
    assert pair.reused == 0
    assert not any(each.startswith(NOT_SHARED) for each in pair.paged.stats().fallbacks)
    tried(name).ask(prompts.ragged(), max_new_tokens=12, num_beams=2)


@pytest.mark.parametrize("name", [*GOES_ON, "jamba"])
@pytest.mark.parametrize("falls_back", [False, True])
def test_rows_that_have_ended_are_not_computed(monkeypatch, name, falls_back):
    """Where a step must be in stock's shapes after all, every row takes part again."""
    pair, decode, obstacle = hybrid(name), stepwise.run_decode, stepwise.fast_path_obstacle
    rows = [tokens(21, seed=1), tokens(13, seed=2), tokens(17, seed=3), tokens(21, seed=4)]
    plain = pair.ask(rows, max_new_tokens=14)[:, 21:].tolist()
    ends = [plain[0][3], plain[2][6]]
    lengths = [min([row.index(end) + 1 for end in ends if end in row], default=14) for row in plain]
    assert min(lengths) < 9 < max(lengths)
    decoded, finished = [], []

    def noting(request, cache, *args):
        decoded.append(len(cache.active_rows))
        return decode(request, cache, *args)

    def falling_back(request, cache):
        finished.append(set(cache.finished))
        return "made up" if len(decoded) == 8 else obstacle(request, cache)

    monkeypatch.setattr(stepwise, "run_decode", noting)
    if falls_back:
        monkeypatch.setattr(stepwise, "fast_path_obstacle", falling_back)
    pair.ask(rows, max_new_tokens=14, eos_token_id=ends)
    left = [sum(length > step for length in lengths) for step in range(1, max(lengths))]
    if falls_back:
        assert finished[8]
        assert not finished[-1]
    else:
        assert decoded[1:] == left[1:], "from the second step on, before which nothing was read from blocks"
