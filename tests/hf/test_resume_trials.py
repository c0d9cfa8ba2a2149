"""The first prompt that might begin with what is kept is tried so, beside stock's pass, as strictly as from nothing."""

import functools
from dataclasses import replace

import media_prompts
import more_models
import pytest
import test_kept_states
import torch
import zoo
from mishaps import Boom
from pair import Pair, evict, text
from prompts import batch, tokens
from test_kept_states import GOES_ON, NOT_SHARED, OTHER, hybrid, kept, turn
from transformers.models.bloom.modeling_bloom import BloomModel
from versions import skip_if_older

from hf_paged import capabilities, resume
from hf_paged.errors import PagedMemoryError
from hf_paged.own_state import OwnState

SAID = 20  # new tokens of a turn, beside the last one of the answer: enough for all cuts
PACKED = ["bloom", "deepseek_v3", "falcon_alibi"]


@pytest.fixture
def passes(monkeypatch):
    """Rows, columns and columns before them, of each pass of a prompt."""
    run, seen = resume.run_padded, []

    def noting(request, cache, *args):
        if request.tokens > 1 or cache.dense_len:
            seen.append((*request.inputs.shape, cache.dense_len))
        return run(request, cache, *args)

    monkeypatch.setattr(resume, "run_padded", noting)
    return seen


@pytest.fixture
def in_stock_shapes(monkeypatch):
    """Whatever could be packed, as deepseek can in older versions."""
    probe = capabilities.probe
    monkeypatch.setattr(capabilities, "probe", lambda *args: replace(probe(*args), obstacle="made up"))


def going_on(name: str) -> Pair:
    """A pair that was asked nothing, of a model that can go on from a state of its."""
    if name in GOES_ON:
        test_kept_states.tried(name)
    return hybrid(name)


def asked(pair: Pair, said: int = SAID) -> list[int]:
    """A first turn was asked; the prompt of the second, of which all but the last `said + 1` tokens are known."""
    return turn(pair, OTHER, 0, said)


def not_shared(pair: Pair) -> list[str]:
    return [each for each in pair.paged.stats().fallbacks if each.startswith(NOT_SHARED)]


def tokens_of(prompt_passes: list[tuple[int, int, int]]) -> int:
    return sum(rows * columns for rows, columns, _ in prompt_passes)


def tried(pair: Pair, passes: list, prompt: list[int], **kwargs) -> list[tuple[int, int, int]]:
    """Asks for one token, and returns the passes that made it, of which none was a decode step."""
    passes.clear()
    pair.ask([prompt], max_new_tokens=1, **kwargs)
    return list(passes)


@pytest.mark.parametrize("name", GOES_ON)
def test_a_hybrids_second_turn_begins_with_what_the_first_has_left(passes, name):
    pair = going_on(name)
    prompt = asked(pair)
    known = len(prompt) - SAID - 1
    whole, *pieces = tried(pair, passes, prompt)
    assert whole == (1, len(prompt), 0)
    assert tokens_of(pieces) == SAID + 1
    assert pieces[0] == (1, SAID + 1 - 14, known)
    assert [columns for _, columns, _ in pieces] == [SAID + 1 - 14, 5, *[1] * 7, 2]
    prompt = turn(pair, prompt, 1)
    turn(pair, prompt, 2)
    assert pair.reused == len(prompt) - 8


@pytest.mark.parametrize("name", PACKED)
def test_a_second_turn_begins_with_what_the_first_has_left(in_stock_shapes, passes, name):
    pair = Pair(name)
    prompt = asked(pair)
    whole, *pieces = tried(pair, passes, prompt)
    known = len(prompt) - SAID - 1
    assert whole == (1, len(prompt), 0)
    assert pieces == [(1, SAID + 1 - 8, known), (1, 8, len(prompt) - 8)], "cut once more behind what is kept"
    assert not not_shared(pair)
    turn(pair, prompt, 1)
    assert (pair.computed, pair.reused) == (1, len(prompt) - 1)


@pytest.mark.parametrize("name", ["qwen3_next", "bloom"])
@pytest.mark.parametrize("new", [15, 16])
def test_where_too_little_is_new_all_is_computed_both_ways(in_stock_shapes, passes, name, new):
    pair = hybrid(name)
    prompt = asked(pair, new - 1)
    whole, *pieces = tried(pair, passes, prompt)
    assert tokens_of(pieces) == (new if new == 16 else tokens_of([whole]))


@pytest.mark.parametrize("rows", ["two", "padded", "equal", "some equal"])
@pytest.mark.parametrize("name", ["lfm2", "qwen3_next", "bloom"])
def test_rows_that_are_tried(in_stock_shapes, passes, name, rows):
    """Of those that are equal one is; each begins with its own."""
    pair, firsts = going_on(name), [OTHER, tokens(len(OTHER) - 3 * (rows == "padded"), seed=3)]
    answers = pair.ask(firsts[:1] if rows == "equal" else firsts, max_new_tokens=10)
    prompts = [text(answer) + tokens(SAID, seed=4 + row) for row, answer in enumerate(answers)]
    prompts = [*prompts[:1], *prompts] if "equal" in rows else prompts
    passes.clear()
    pair.ask(prompts, max_new_tokens=1)
    whole, *pieces = passes
    if rows == "padded" and not pieces:
        skip_if_older(f"this transformers lets padding into the states of {name}")
    assert whole[0] == len(prompts)
    assert {each[0] for each in pieces} == {1 if rows == "equal" else 2}
    assert pieces[0][2] == len(OTHER) + 9
    assert sum(columns for _, columns, _ in pieces) == SAID + 1
    pair.ask([prompt + tokens(4, seed=9) for prompt in prompts])
    assert pair.reused == sum(map(len, prompts)), "the prompts of before, as they were computed whole"


def test_a_trial_leaves_what_is_kept_as_it_was(passes, monkeypatch):
    """States that go on are copies, and nobody finds what is tried."""
    pair, try_both, indexed = hybrid("qwen3_next"), resume._try_both, []
    prompt = asked(pair)
    states = dict(pair.paged._pool.kept_states._kept)
    before = {key: [tensor.clone() for tensor in resume.tensors_of(each.state)] for key, each in states.items()}

    def noting(*args):
        indexed.append(len(pair.pool.index))
        outputs = try_both(*args)
        indexed.append(len(pair.pool.index))
        return outputs

    monkeypatch.setattr(resume, "_try_both", noting)
    assert tokens_of(tried(pair, passes, prompt)) == len(prompt) + SAID + 1
    assert indexed[0] == indexed[1] > 0
    for key, tensors in before.items():
        assert all(map(torch.equal, tensors, resume.tensors_of(states[key].state)))
    assert kept(pair) == len(before) + 1, "behind the prompt, as ever"
    changed = [*prompt[:-9], *tokens(9, seed=77)]
    pair.ask([changed])
    assert pair.reused == len(prompt) - SAID - 1


@pytest.mark.parametrize("what", ["states", "K and V"])
def test_a_trial_takes_what_later_calls_would_take(passes, what):
    """Where that is not as stock's is, nothing is taken any more."""
    pair = hybrid("qwen3_next")
    prompt = asked(pair)
    if what == "states":
        for each in pair.paged._pool.kept_states._kept.values():
            for tensor in resume.tensors_of(each.state):
                tensor.mul_(1.5)
    else:
        for store in pair.paged._pool.stores:
            store.values.mul_(1.5)
    tried(pair, passes, prompt)
    pair.ask([prompt])
    (reason,) = not_shared(pair)
    assert "differ from stock" in reason
    assert pair.reused == 0


@pytest.mark.parametrize("name", ["jamba", "zamba2"])
@pytest.mark.parametrize("said", [7, 20, 40])
def test_hybrids_that_go_wrong_in_pieces_are_refused(name, said):
    pair, prompt = hybrid(name), OTHER
    for number in range(3):
        prompt = turn(pair, prompt, number, said)
        assert pair.reused == 0
    assert len(not_shared(pair)) == 1


@pytest.mark.parametrize("sees", [1, 7])
def test_what_has_seen_all_that_follows_hides_no_model_that_does_so(in_stock_shapes, passes, monkeypatch, sees):
    """Asked again when the end of it is gone: what is left is right, and goes with no other end."""
    forward = BloomModel.forward

    @functools.wraps(forward)
    def seeing(self, input_ids=None, inputs_embeds=None, **kwargs):
        embedded = self.word_embeddings(input_ids)
        ahead = torch.nn.functional.pad(embedded[:, sees:], (0, 0, 0, min(sees, input_ids.shape[1])))
        return forward(self, input_ids=None, inputs_embeds=embedded + ahead, **kwargs)

    monkeypatch.setattr(BloomModel, "forward", seeing)
    pair = Pair("bloom")
    tried(pair, passes, OTHER)
    evict(pair, 3)
    _, *pieces = tried(pair, passes, OTHER)
    assert pieces[0][2] == 32, "of 51"
    pair.ask([OTHER])
    (reason,) = not_shared(pair)
    assert "in two pieces" in reason


def test_what_is_gone_when_it_is_to_be_tried_is_computed(passes, monkeypatch):
    """The pass of all may have needed its memory."""
    pair, is_changed = hybrid("qwen3_next"), OwnState.is_changed
    prompt = asked(pair)

    def evicting(state):
        evict(pair)
        return is_changed(state)

    monkeypatch.setattr(OwnState, "is_changed", evicting)
    whole, *pieces = tried(pair, passes, prompt)
    assert pieces[0] == (1, len(prompt) - SAID - 1, 0)
    assert tokens_of(pieces) == tokens_of([whole])
    monkeypatch.undo()
    pair.ask([prompt + tokens(3, seed=9)])
    assert pair.reused == len(prompt)


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt, PagedMemoryError])
@pytest.mark.parametrize("where", ["run_padded", "put_states", "joined", "_go_on"])
def test_an_error_in_a_trial_leaves_nothing_behind(monkeypatch, where, error):
    """But in the pass that the call is for."""
    pair, right, calls = hybrid("qwen3_next"), getattr(resume, where), []
    prompt = asked(pair)
    when = 3 if where == "run_padded" else 1

    def failing(*args):
        calls.append(args)
        if len(calls) == when:
            raise error("made up")
        return right(*args)

    cached = kept(pair)
    with monkeypatch.context() as patch:
        patch.setattr(resume, where, failing)
        given = {**batch([prompt]), "max_new_tokens": 1, "do_sample": False}
        if error is KeyboardInterrupt:
            with pytest.raises(KeyboardInterrupt):
                pair.model.generate(**given)
        else:
            assert torch.equal(pair.model.generate(**given), pair.stock.generate(**given))
            cached += 1
    assert len(calls) == when
    pair.check()
    assert kept(pair) == cached
    pair.ask([prompt[:-3]])
    pair.ask([prompt[:-3] + tokens(5, seed=9)])
    assert pair.reused == (0 if error is Boom else len(prompt) - 3)


@pytest.mark.parametrize("name", ["jamba", "zamba2"])
@pytest.mark.parametrize("kwargs", [{"do_sample": True, "num_return_sequences": 3}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("lengths", [(40,), (25, 25), (25, 22)], ids=str)
def test_equal_rows_of_what_may_not_be_cut_are_computed_once(name, lengths, kwargs):
    """That is tried by itself; all go on from the state of the one that was computed."""
    pair = hybrid(name)
    for number, times in enumerate((3, 3, 1, 1)):
        rows = [tokens(length, seed=10 * number + row) for row, length in enumerate(lengths)]
        pair.ask(rows, max_new_tokens=12, **kwargs)
        assert (pair.computed, pair.reused) == (times * sum(lengths), 0)
        assert not not_shared(pair), "nothing of these was known"
    if len(set(lengths)) == 1:  # with padding nothing is kept
        for longer in (rows, [row + tokens(5, seed=9) for row in rows]):
            pair.ask(longer, max_new_tokens=12, **kwargs)
            assert (pair.computed, pair.reused) == (sum(map(len, longer)), 0)
            assert len(not_shared(pair)) == 1


@pytest.mark.parametrize("sees", ["what follows", "that and how many rows there are"])
def test_prompts_that_see_how_many_rows_there_are(in_stock_shapes, monkeypatch, sees):
    """One thing is found out of cuts, and another of equal rows."""
    forward = BloomModel.forward

    @functools.wraps(forward)
    def seeing(self, input_ids=None, inputs_embeds=None, **kwargs):
        embedded = self.word_embeddings(input_ids)
        if input_ids.shape[1] > 1:
            embedded = embedded + embedded.mean(dim=1, keepdim=True)
            if "how many" in sees:
                embedded = embedded + len(input_ids) * torch.arange(embedded.shape[-1]).sin()
        return forward(self, input_ids=None, inputs_embeds=embedded, **kwargs)

    monkeypatch.setattr(BloomModel, "forward", seeing)
    pair, computed = Pair("bloom"), []
    for seed in range(4):
        pair.ask([tokens(30, seed)], num_return_sequences=3, do_sample=True)
        computed.append(pair.computed)
    if "how many" in sees:
        assert computed == [90] * 4
        (reason,) = not_shared(pair)
        assert "without the rows that are equal" in reason
    else:
        assert computed == [90, 90, 30, 30]
        assert not not_shared(pair)


@pytest.mark.parametrize("model_type", ["phimoe", "moshi"])
def test_equal_rows_beyond_a_window_that_attention_is_not_told_of(model_type):
    """Prompts beyond it are never cut, and rows that are equal are computed once all the same."""
    pair = Pair.of(zoo.build(model_type))
    length = 3 * zoo.WINDOW
    for seed, times in enumerate((3, 1, 1)):
        pair.ask([tokens(length, seed)], num_return_sequences=3, do_sample=True, max_new_tokens=zoo.WINDOW)
        if "sliding window that attention is not told of" not in pair.paged.stats().fallbacks:
            skip_if_older(f"this transformers asks more of {model_type}: {list(pair.paged.stats().fallbacks)}")
        assert pair.computed == times * length


def test_media_are_computed_in_any_case(passes):
    """Of what is known behind them nobody would learn whether they may be given without those of other rows."""
    inputs = media_prompts.prompt("idefics3")
    pair = Pair.of(more_models.build("idefics3"))
    answer = pair.ask(inputs, max_new_tokens=10)
    passes.clear()
    pair.ask(media_prompts.followed_by(inputs, answer, tokens(SAID, seed=5)), max_new_tokens=1)
    whole, *pieces = passes
    assert whole[1:] == (answer.shape[1] + SAID, 0)
    assert pieces[0][2] == 0
    assert tokens_of(pieces) == tokens_of([whole])
