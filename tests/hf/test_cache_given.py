"""A `PagedCache` that a user makes and gives to a model, patched or not: to its forward, and to `generate`."""

import copy

import modes
import prompts
import pytest
import torch
from compare import BLOCK_SIZE, copy_of, every_family
from families import stock_model
from mode_parts import Run
from tolerances import assert_close
from transformers import Cache, DynamicCache
from versions import choose_attention

from hf_paged import PagedCache, patch_model


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
