"""Who finds a prompt again, and until when: salts keep callers apart, and what is forgotten is computed anew."""

import pytest
import torch
from pair import Pair, patched_draft, piece, text
from prompts import batch

from hf_paged import patch_model


def test_a_salt_sees_its_own_prefixes_only():
    pair, rows = Pair(), [piece(21, 1)]
    for salt in ("a", "b", None, "", "A", "a ", "ä", "\ud800", "none", "a" * 1000):
        pair.ask(rows, salt=salt)
        assert (pair.reused, pair.computed) == (0, 21), repr(salt)
        pair.ask(rows, salt=salt)
        assert (pair.reused, pair.computed) == (20, 1), repr(salt)


def test_a_salt_covers_what_was_generated():
    pair = Pair()
    answer = text(pair.ask([piece(21, 1)], salt="a")[0])
    for salt in (None, "b"):
        pair.ask([[*answer, 5]], salt=salt)
        assert pair.reused == 0, salt
    pair.ask([[*answer, 5]], salt="a")
    assert pair.reused == len(answer) - 1


def test_a_salt_covers_a_cache_that_comes_back():
    """The tokens of a continued cache are found under the salt of the call that made them, or not at all."""
    pair = Pair()
    ids = torch.tensor([piece(21, 1)])
    first = pair.model.generate(ids, do_sample=False, max_new_tokens=6, cache_salt="a", return_dict_in_generate=True)
    again = pair.model.generate(
        first.sequences, past_key_values=first.past_key_values, do_sample=False, max_new_tokens=20, cache_salt="b"
    )
    told, seen = again[0].tolist(), first.sequences.shape[1]
    del first
    for salt in ("b", None):
        pair.ask([[*told, 5]], salt=salt)
        assert pair.reused == 0, salt
    pair.ask([[*told, 5]], salt="a")
    assert pair.reused < seen, "the first caller does not see how the second went on"


def test_a_salt_covers_the_draft_model():
    """A patched draft model must not tell one tenant's prompts from another's either."""
    pair = Pair()
    helper, near = patched_draft()
    for salt in ("a", "b", None):
        helper.paged.reset_stats()
        pair.ask([piece(21, 1)], salt=salt, assistant_model=lambda model: helper if model is pair.model else near)
        assert helper.paged.stats().reused_tokens == 0, f"salt {salt!r}"


@pytest.mark.parametrize("salt", [7, b"a", ["a"], True, torch.ones(1)], ids=repr)
def test_a_salt_must_be_a_string(salt):
    pair = Pair()
    with pytest.raises(ValueError, match="cache_salt must be a string"):
        pair.model.generate(**batch([piece(5, 1)]), max_new_tokens=2, cache_salt=salt)
    pair.ask([piece(5, 1)])


def test_settings_that_are_switched_start_anew():
    pair = Pair()
    pair.ask([piece(21, 1)])
    for overrides in ({"prefix_caching": False}, {"block_size": 16}, {"block_size": 8}):
        patch_model(pair.model, **overrides)
        pair.ask([piece(21, 1)])
        assert pair.reused == 0, overrides


@pytest.mark.parametrize("forget", ["clear", "release"])
def test_what_is_forgotten_is_computed_again(forget):
    pair = Pair()
    pair.ask([piece(21, 1)])
    assert pair.paged.stats().blocks_cached > 0
    getattr(pair.paged, forget)()
    assert pair.paged.stats().blocks_cached == 0
    for reused in (0, 20):
        pair.ask([piece(21, 1)])
        assert pair.reused == reused
    if forget == "release":
        pair.paged.release()
        assert pair.paged.stats().bytes_reserved == 0


@pytest.mark.parametrize("forget", ["clear", "release"])
def test_forgetting_while_a_cache_is_held(forget):
    pair, rows = Pair(), [piece(21, 1)]
    outputs = pair.hold(rows)
    getattr(pair.paged, forget)()
    pair.model.generate(torch.tensor(rows), do_sample=False, max_new_tokens=6)
    following = pair.go_on(outputs)
    outputs.clear()
    pair.ask([[*following[0].tolist(), 5]])
