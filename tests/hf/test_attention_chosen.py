"""The implementation of attention that a user chooses after the patch, and one of the user's own."""

import copy

import prompts
import pytest
import torch
from pair import BLOCK_SIZE, NEW, Pair, eager, piece
from prompts import batch
from tolerances import assert_close
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from versions import skip_if_older

from hf_paged import PagedCache, patch_model, unpatch_model

FAR = 40  # tokens; what is tried with a few does not show what the functions below do behind so many
NO_DIFFERENCE = "it makes no difference: this test could not fail"
NEAR = {f"{what}attention function of somebody else: near" for what in ("", "prefixes not reused: ")}
ROWS = [piece(60, 1), piece(23, 2)]


# Chosen after the patch


def by_method(name, model):
    model.set_attn_implementation(name)


def by_method_of_a_part(name, model):
    model.base_model.set_attn_implementation(name)


def by_config(name, model):
    model.config._attn_implementation = name


@pytest.mark.parametrize("choose", [by_method, by_method_of_a_part, by_config])
def test_another_implementation_takes_the_fast_path_and_outlives_the_patch(choose):
    pair = Pair()
    pair.ask(ROWS)
    for name in ("eager", "sdpa", "eager"):
        pair.both(lambda model, name=name: choose(name, model))
        for arguments in ({}, {"num_beams": 2}):
            pair.ask(ROWS, **arguments)
            assert pair.paged.stats().fallbacks == {}
        assert pair.reused > 0
        assert pair.model.config._attn_implementation == name
    given = {**prompts.single(), "do_sample": False, "max_new_tokens": 3}
    stock, patched = (
        model.generate(**given, output_attentions=True, return_dict_in_generate=True).attentions[0][0]
        for model in (pair.stock, pair.model)
    )
    assert_close(patched, stock, "attentions, which only eager attention returns")
    choose("sdpa", pair.model)
    unpatch_model(pair.model)
    assert type(pair.model.config._attn_implementation) is str
    assert pair.model.config._attn_implementation == "sdpa"


def test_a_cache_that_comes_back_goes_on_with_another_implementation():
    pair = Pair()
    outputs = pair.hold([piece(27, 1)])
    pair.paged.reset_stats()
    pair.both(lambda model: model.set_attn_implementation("eager"))
    pair.go_on(outputs)
    assert pair.paged.stats().fallbacks == {}


def test_a_loop_of_the_users_own_goes_on_with_another_implementation():
    pair = Pair()
    logits = []
    for model, output in zip((pair.stock, pair.model), pair.hold([piece(27, 1)]), strict=True):
        model.set_attn_implementation("eager")
        pair.paged.reset_stats()
        with torch.no_grad():
            logits.append(model(output.sequences[:, -1:], past_key_values=output.past_key_values).logits)
    assert_close(logits[1], logits[0], "logits of one more token")
    assert pair.paged.stats().fallbacks == {}


def test_models_that_share_a_config_are_unpatched_one_by_one():
    pairs = [Pair(), Pair()]
    for module in pairs[1].model.modules():
        if hasattr(module, "config"):
            module.config = pairs[0].model.config
    patch_model(unpatch_model(pairs[1].model), block_size=BLOCK_SIZE)
    for pair in pairs:
        pair.ask(ROWS)
        assert pair.paged.stats().fallbacks == {}
    unpatch_model(pairs[0].model)
    pairs[1].ask(ROWS, num_beams=2)
    assert pairs[1].paged.stats().fallbacks == {}


@pytest.mark.parametrize("is_later", [False, True])
def test_a_model_that_shares_the_config_of_a_patched_one_is_stocks(is_later):
    pair = Pair()
    unpatch_model(pair.model)

    def sharing():
        other = type(pair.model)(pair.model.config).eval()
        other.load_state_dict(pair.model.state_dict())
        other.generation_config = copy.deepcopy(pair.model.generation_config)
        return other

    other = None if is_later else sharing()
    patch_model(pair.model, block_size=BLOCK_SIZE)
    other = other or sharing()
    assert other.config is pair.model.config
    for _ in range(2):
        for arguments in ({}, {"num_beams": 2}):
            expected = pair.ask(ROWS, **arguments)
            answer = other.generate(**batch(ROWS), do_sample=False, max_new_tokens=NEW, **arguments)
            assert torch.equal(answer, expected)
        output = other.generate(**batch(ROWS), max_new_tokens=2, return_dict_in_generate=True)
        assert not isinstance(output.past_key_values, PagedCache)
        other.set_attn_implementation("eager")  # for both, whether they know it or not
        eager(pair.stock)
    unpatch_model(pair.model)
    assert type(other.config._attn_implementation) is str
    for model in (pair.stock, pair.model, other):
        assert torch.equal(model.generate(**batch(ROWS), do_sample=False, max_new_tokens=NEW, num_beams=2), expected)


# Of somebody else


class Near:
    """Attention that leaves out what is far, once there is much; keeps the shapes of queries and keys it was given."""

    def __init__(self, attention=sdpa_attention_forward):
        self.attention, self.shapes = attention, []

    def function(self):
        """As a function, which is what is registered."""

        def near(module, query, key, value, attention_mask, **kwargs):
            assert type(key) is torch.Tensor
            self.shapes.append((tuple(query.shape), tuple(key.shape)))
            if key.shape[2] > FAR:
                query = -query
            return self.attention(module, query, key, value, attention_mask, **kwargs)

        return near


def registered(near, monkeypatch):
    """Under a name of its own."""
    monkeypatch.setitem(AttentionInterface._global_mapping, "near", near.function())
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "near", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return "near"


def in_the_place_of_sdpa(near, monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", near.function())
    return "sdpa"


def in_the_place_of_eager(near, monkeypatch):
    from transformers.models.llama import modeling_llama

    near.attention = modeling_llama.eager_attention_forward
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", near.function())
    return "eager"


@pytest.mark.parametrize("place", [registered, in_the_place_of_sdpa, in_the_place_of_eager])
@pytest.mark.parametrize("first", ["patch", "choice"])
def test_it_is_called_as_by_stock(place, first, monkeypatch):
    pair, near = Pair(), Near()
    pair.both(lambda model: model.set_attn_implementation("eager" if place is in_the_place_of_eager else "sdpa"))
    without = pair.ask(ROWS)
    assert pair.paged.stats().fallbacks == {}
    with monkeypatch.context() as patch:
        name = place(near, patch)
        if first == "choice":
            unpatched = unpatch_model(pair.model)
            unpatched.set_attn_implementation(name)
            pair = Pair.of(unpatched)
        else:
            pair.both(lambda model: model.set_attn_implementation(name))
        for arguments in ({}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}):
            near.shapes.clear()
            answer = pair.ask(ROWS, **arguments)
            assert arguments or not torch.equal(answer, without), NO_DIFFERENCE
            assert set(pair.paged.stats().fallbacks) == NEAR
            calls = 2 * (answer.shape[1] - 60)  # of two layers
            assert near.shapes[:calls] == near.shapes[-calls:]
    pair.both(lambda model: model.set_attn_implementation("eager" if place is in_the_place_of_eager else "sdpa"))
    assert torch.equal(pair.ask(ROWS), without)
    assert pair.paged.stats().fallbacks == {}


def test_nothing_is_taken_from_calls_with_another_function(monkeypatch):
    """Nor from shorter ones with the same: what it makes of a token may depend on how many there are."""
    pair, near = Pair(), Near()
    pair.ask([ROWS[0][:35]])
    with monkeypatch.context() as patch:
        in_the_place_of_sdpa(near, patch)
        for rows in ([ROWS[0][:35]], [ROWS[0]]):
            pair.ask(rows)
            assert pair.reused == 0
    pair.ask([ROWS[0]])
    assert pair.reused <= 35


def test_attention_of_torch_that_somebody_has_replaced(monkeypatch):
    pair = Pair()
    without = pair.ask(ROWS)
    original = torch.nn.functional.scaled_dot_product_attention

    def near(query, key, *args, **kwargs):
        return original(query * 1.5 if key.shape[2] > FAR else query, key, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", near)
    assert not torch.equal(pair.ask(ROWS), without), NO_DIFFERENCE
    assert set(pair.paged.stats().fallbacks) == NEAR


def test_masks_of_somebody_else(monkeypatch):
    pair = Pair()
    without = pair.ask(ROWS)
    original = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]

    def near(*args, **kwargs):
        mask = original(*args, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
        return mask & (torch.arange(mask.shape[-1]) >= mask.shape[-1] - FAR) if mask.shape[-1] > FAR else mask

    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "sdpa", near)
    assert not torch.equal(pair.ask(ROWS), without), NO_DIFFERENCE
    assert set(pair.paged.stats().fallbacks) == NEAR


@pytest.mark.parametrize("name", ["bart", "t5", "qwen3_next"])
def test_decode_steps_over_blocks_leave_it_its_place(name, monkeypatch):
    """Models whose prompts are never packed; those with an encoder attend to its output as well, row by row."""
    pair, near = Pair(name), Near()
    if pair.stock.config._attn_implementation != "sdpa":
        skip_if_older(f"{name} has no functions of attention to replace in this version")
    rows = [piece(60, 1), piece(60, 1), piece(23, 2)]
    without = pair.ask(rows)
    in_the_place_of_sdpa(near, monkeypatch)
    for arguments in ({}, {"num_beams": 2}):
        near.shapes.clear()
        answer = pair.ask(rows, **arguments)
        assert arguments or not torch.equal(answer, without), NO_DIFFERENCE
        half = len(near.shapes) // 2
        assert near.shapes[:half] == near.shapes[half:]


def test_nothing_that_it_has_computed_for_a_hybrid_is_kept(monkeypatch):
    """The function is no part of what a prompt is known by; neither are K and V of it found, nor states."""
    pair, prompt = Pair("lfm2"), piece(60, 1)
    for last in (2, 3):
        pair.ask([piece(50, 4) + piece(9, last)])
    near = Near()
    with monkeypatch.context() as patch:
        patch.setitem(AttentionInterface._global_mapping, "sdpa", near.function())
        with_it = pair.ask([prompt])
        reasons = pair.paged.stats().fallbacks
    without = pair.ask([prompt + piece(7, 5)])
    assert near.shapes, "it was called"
    assert (pair.computed, pair.reused) == (67, 0)
    assert not torch.equal(without[:, : with_it.shape[1]], with_it), NO_DIFFERENCE
    assert "prefixes not reused: attention function of somebody else: near" in reasons
