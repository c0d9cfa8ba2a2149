"""A `PagedCache` that a user makes and gives to a model, patched or not: to its forward, and to `generate`."""

import copy

import modes
import more_models
import prompts
import pytest
import torch
from compare import BLOCK_SIZE, copy_of, every_family
from families import stock_model
from mode_parts import Run
from pair import Pair
from tolerances import assert_close
from transformers import Cache, DynamicCache, EncoderDecoderCache
from versions import choose_attention

from hf_paged import PagedCache, PagedMemoryError, patch_model
from hf_paged.compat import CACHE_NAME
from hf_paged.forward import by_name


def with_attention(family, attention: str):
    model = copy_of(family)
    choose_attention(model, attention)
    return model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "family", every_family(lambda family: family.packed is True or family.name in ("opt", "falcon_rotary"))
)
@torch.no_grad()
def test_forward_on_an_unpatched_model_step_by_step(family, attention):
    model = with_attention(family, attention)
    ids = torch.tensor([prompts.tokens(24, seed) for seed in range(2)])
    caches = DynamicCache(config=model.config), PagedCache(model.config, block_size=BLOCK_SIZE)
    for index, piece in enumerate(ids.split([9, 1, 1, 6, 1, 1, 5], dim=1)):
        expected, actual = (model(piece, past_key_values=cache) for cache in caches)
        assert actual.past_key_values is caches[1]
        assert_close(actual.logits, expected.logits, f"{family.name} {attention}, piece {index}")
        assert_caches_equal_within(caches[0], caches[1], f"{family.name} {attention}, piece {index}")


def assert_caches_equal_within(dynamic: Cache, actual: Cache, what: str) -> None:
    """What stock keeps is there, where later layers carry rounding of earlier ones; ours may keep more.

    Layers that read what others keep have nothing of their own.
    """
    for index, (wanted, got) in enumerate(zip(dynamic.layers, actual.layers, strict=True)):
        if wanted.keys is None:
            assert got.keys is None
            continue
        kept = wanted.keys.shape[-2]
        assert_close(torch.clone(got.keys)[:, :, -kept:], wanted.keys, f"{what}, keys of layer {index}")
        assert_close(torch.clone(got.values)[:, :, -kept:], wanted.values, f"{what}, values of layer {index}")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", every_family(lambda family: family.packed is True))
@torch.no_grad()
def test_padded_forward_on_an_unpatched_model(family, attention):
    model = with_attention(family, attention)
    inputs = prompts.ragged()
    mask = inputs["attention_mask"]
    caches = DynamicCache(config=model.config), PagedCache(model.config, block_size=BLOCK_SIZE)
    pieces = [inputs["input_ids"], *torch.tensor([prompts.tokens(4, seed) for seed in range(4)]).split(1, dim=1)]
    for index, piece in enumerate(pieces):
        if index:
            mask = torch.cat([mask, torch.ones_like(piece)], dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -piece.shape[1] :]
        expected, actual = (
            model(piece, attention_mask=mask, position_ids=positions, past_key_values=cache).logits for cache in caches
        )
        real = mask[:, -piece.shape[1] :].bool()
        assert_close(actual[real], expected[real], f"{family.name} {attention}, piece {index}")


@pytest.mark.parametrize(
    "name", ["greedy_ragged", "shared_prefix", "beam_ragged", "num_return_sequences", "eos", "long"]
)
@pytest.mark.parametrize("family", every_family(lambda family: family.packed is True))
def test_generate_on_an_unpatched_model(family, name):
    """A user's PagedCache in stock `generate`: no patch in sight."""
    mode = modes.MODES[name]
    expected = mode.call(Run(stock_model(family.name), family, mode.inputs()))

    class WithCache(Run):
        def generate(self, **kwargs):
            return super().generate(past_key_values=PagedCache(self.model.config, block_size=BLOCK_SIZE), **kwargs)

    actual = mode.call(WithCache(stock_model(family.name), family, mode.inputs()))
    for wanted, got in zip(expected.tokens, actual.tokens, strict=True):
        assert torch.equal(got, wanted), f"{family.name} × {name}: {got.tolist()}, stock {wanted.tolist()}"


@pytest.mark.parametrize("family", every_family(lambda family: family.packed is True))
def test_users_paged_cache_on_a_patched_model(family):
    """Prefill by hand, then `generate` twice from copies: the pattern of transformers' prompt-reuse guide."""
    sequences = []
    for make, model in (
        (lambda config: DynamicCache(config=config), copy_of(family)),
        (lambda config: PagedCache(config, block_size=BLOCK_SIZE), patch_model(copy_of(family), block_size=BLOCK_SIZE)),
    ):
        prefix = torch.tensor([prompts.tokens(17)])
        with torch.no_grad():
            cache = model(prefix, past_key_values=make(model.config)).past_key_values
        for seed in (1, 2):
            ids = torch.cat([prefix, torch.tensor([prompts.tokens(5, seed)])], dim=1)
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=copy.deepcopy(cache),
                do_sample=False,
                max_new_tokens=8,
            )
            sequences.append(output)
    assert torch.equal(sequences[0], sequences[2]), family.name
    assert torch.equal(sequences[1], sequences[3]), family.name


# By position


@torch.no_grad()
def test_arguments_by_position():
    """As stock takes them: `model(ids, mask, positions, cache)`."""
    pair, inputs = Pair(), prompts.ragged()
    ids = torch.cat([inputs["input_ids"], 5 + torch.arange(len(inputs["input_ids"]))[:, None]], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(ids[:, :1])], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for by_position in (2, 3, 4):
        logits = []
        for model, cache in (
            (pair.stock, DynamicCache(config=pair.stock.config)),
            (pair.model, PagedCache(pair.model.config, block_size=BLOCK_SIZE)),
        ):
            for columns in (slice(0, -1), slice(-1, None)):
                given = [ids[:, columns], mask[:, : columns.stop], positions[:, columns], cache]
                names = ["input_ids", "attention_mask", "position_ids", CACHE_NAME]
                named = dict(zip(names[by_position:], given[by_position:], strict=True))
                logits.append(model(*given[:by_position], **named).logits[mask[:, columns].bool()])
        assert cache.owner() is pair.model, "a patched model takes note of it"
        assert_close(logits[2], logits[0], f"{by_position} by position, prompt")
        assert_close(logits[3], logits[1], f"{by_position} by position, step")


def test_a_forward_that_takes_anything_hands_it_on():
    """Somebody's wrapper without names: those of the class are meant, and the pass is as fast as by name."""
    pair = Pair("llama")
    forward = pair.model.forward
    pair.model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    ids = torch.tensor([prompts.tokens(20)])
    with torch.no_grad():
        cache = PagedCache(pair.model.config)
        found = pair.model(ids, **{CACHE_NAME: cache}).logits
        assert_close(found, pair.stock(ids).logits, "wrapped")
    assert cache.owner() is pair.model, "as only passes of a patched model say"


class _PositionalOnly:
    def forward(self, first, /, second=None, third=None):
        """Nothing here can be called by all of its names."""


def test_names_do_not_move_to_other_places():
    assert by_name(_PositionalOnly(), (1,), {"third": 2}) == ((1,), {"third": 2})


@torch.no_grad()
def test_a_first_argument_that_is_not_the_ids():
    """Whisper's are spectrograms."""
    pair = Pair.of(more_models.build("whisper"))
    features = torch.randn(2, 16, 128)
    both = EncoderDecoderCache(*(DynamicCache(config=pair.stock.config) for _ in range(2)))
    ours = pair.paged.new_cache(room_tokens=8)
    for piece in (torch.tensor([[1, 5, 6], [1, 7, 8]]), torch.tensor([[9], [4]])):
        expected, actual = (
            model(features, None, piece, **{CACHE_NAME: cache}).logits
            for model, cache in ((pair.stock, both), (pair.model, ours))
        )
        assert_close(actual, expected, f"{piece.shape[1]} tokens")
    assert ours.self_attention_cache.owner() is pair.model


# Settings of its own


@pytest.mark.parametrize("patched", [True, False], ids=["patched", "unpatched"])
@torch.no_grad()
def test_block_size_and_budget_are_those_of_the_cache(patched):
    pair = Pair(max_memory={"cpu": "1GiB"})
    model = pair.model if patched else pair.stock
    cache = PagedCache(model.config, block_size=64, max_memory={"cpu": "128KiB"})
    model(torch.tensor([prompts.tokens(20)]), **{CACHE_NAME: cache})
    assert cache.pool.block_size == 64
    with pytest.raises(PagedMemoryError, match="131072"):
        model(torch.tensor([prompts.tokens(2000)]), **{CACHE_NAME: cache})


@torch.no_grad()
def test_a_cache_without_a_budget_has_that_of_the_patched_model():
    pair = Pair(max_memory={"cpu": "128KiB"})
    cache = PagedCache(pair.model.config)
    with pytest.raises(PagedMemoryError, match="131072"):
        pair.model(torch.tensor([prompts.tokens(2000)]), **{CACHE_NAME: cache})


# Gradients


@pytest.mark.parametrize("patched", [True, False], ids=["patched", "unpatched"])
def test_gradients_are_refused_with_the_remedy(patched):
    pair = Pair()
    model, ids = pair.model if patched else pair.stock, torch.tensor([prompts.tokens(9)])
    cache = PagedCache(model.config, block_size=BLOCK_SIZE)
    with pytest.raises(ValueError, match=r"torch\.no_grad\(\)"):
        model(ids, **{CACHE_NAME: cache})
    with torch.no_grad():
        assert_close(model(ids, **{CACHE_NAME: cache}).logits, pair.stock(ids).logits, "after the refusal")
