"""Families × modes: a patched model returns what the stock model returns, from the same weights."""

import copy

import compare
import modes
import prompts
import pytest
import torch
from compare import (
    BLOCK_SIZE,
    assert_blocks_given_back,
    assert_same,
    copy_of,
    every_family,
    patched_outcome,
    stock_outcome,
)
from families import FAMILIES, stock_model
from tolerances import assert_close
from transformers import DynamicCache

from hf_paged import PagedCache, patch_model
from hf_paged_kernels import native_kernels


def assert_counts(stats, family, mode) -> None:
    """The sums always hold; a packed family in a plain mode computes each distinct token once and never falls back."""
    what = f"{family.name} × {mode.name}"
    parts = (stats.computed_tokens, stats.reused_tokens, stats.shared_tokens)
    assert stats.prompt_tokens == sum(parts), (
        f"{what}: {stats.prompt_tokens} prompt tokens, but {parts} add up otherwise"
    )
    assert min(parts) >= 0, f"{what}: {parts}"
    if not mode.plain or mode.name == "from_bos":
        return
    inputs = mode.inputs()
    if family.packed is True:
        assert stats.fallbacks == {}, f"{what}: fell back: {stats.fallbacks}"
        assert stats.prompt_tokens == mode.copies * prompts.num_real_tokens(inputs), what
        assert stats.computed_tokens == prompts.num_distinct_tokens(inputs), what
        assert stats.reused_tokens == 0, f"{what}: nothing came before this call"
    if family.packed is False:
        assert stats.fallbacks, f"{what}: took the padded path without saying why"


@pytest.mark.parametrize(("family", "mode"), compare.all_pairs())
def test_same_as_stock(family, mode):
    what = f"{family.name} × {mode.name}"
    stock = stock_outcome(family, mode)
    helpers = []

    def patch_helper(model):
        helpers.append(patch_model(model, block_size=BLOCK_SIZE))
        return helpers[-1]

    model = patch_model(copy_of(family, mode), block_size=BLOCK_SIZE)
    patched = patched_outcome(model, family, mode, patch_helper)
    assert_same(family, mode, stock, patched)
    assert_counts(model.paged.stats(), family, mode)
    if family.packed and mode.name != "own_dynamic_cache" and any(cache is not None for cache in patched.caches):
        assert all(isinstance(cache, PagedCache) for cache in patched.caches), f"{what}: not a PagedCache"
        assert model.paged.stats().blocks_in_use > 0, f"{what}: the returned cache holds no blocks"
    patched.caches.clear()
    for owner in (model, *helpers):
        assert_blocks_given_back(owner, what)
    if mode.name != "static_cache":  # the user's own; 5.8 cannot use that of a recurrent model twice
        assert_same_again(model, family, mode, stock, patch_helper)


def assert_same_again(model, family, mode, stock, patch_helper) -> None:
    """Once more on what the first call left: on all of it or, every other family or mode, on half of that."""
    kept = ("all", "half")[(list(FAMILIES).index(family.name) + list(modes.MODES).index(mode.name)) % 4 // 2]
    what = f"{family.name} × {mode.name}, {kept} of the first call's blocks kept"
    pool = model.paged._pool
    if kept == "half" and pool is not None:
        pool.manager.budget.evict(pool.manager.cached // 2)
    model.paged.reset_stats()
    assert_same(family, mode, stock, patched_outcome(model, family, mode, patch_helper))
    stats = model.paged.stats()
    assert stats.prompt_tokens == stats.computed_tokens + stats.reused_tokens + stats.shared_tokens, what
    if mode.plain and family.packed is True and kept == "all" and mode.name != "from_bos":
        rows = mode.copies * len(mode.inputs()["input_ids"])
        assert stats.computed_tokens + stats.shared_tokens <= rows, f"{what}: only last tokens are computed again"
    assert_blocks_given_back(model, what)
    if pool is not None:
        pool.manager.check_integrity()


@pytest.mark.parametrize(
    "name", ["shared_prefix", "beam_ragged", "prefill_chunks_shared", "assisted_near", "holes", "long"]
)
@pytest.mark.parametrize("family", every_family(lambda family: family.packed is True))
def test_reference_backend(family, name):
    mode = modes.MODES[name]
    stock = stock_outcome(family, mode)
    model = patch_model(copy_of(family, mode), block_size=BLOCK_SIZE, attention_backend="reference")
    assert_same(family, mode, stock, patched_outcome(model, family, mode, patch_model))
    assert_counts(model.paged.stats(), family, mode)
    assert_blocks_given_back(model, f"{family.name} × {name} × reference")


@pytest.mark.parametrize("name", ["prefill_chunks_shared", "long"])
@pytest.mark.parametrize("family", every_family(lambda family: family.packed is True))
def test_prompts_by_torch(family, name, monkeypatch):
    """As on CPUs whose prompts nobody has measured on the native kernel."""
    available = native_kernels()._replace(multiplies=False)
    monkeypatch.setattr("hf_paged.backends.native.native_kernels", lambda: available)
    mode = modes.MODES[name]
    model = patch_model(copy_of(family, mode), block_size=BLOCK_SIZE)
    assert_same(family, mode, stock_outcome(family, mode), patched_outcome(model, family, mode, patch_model))


@pytest.mark.parametrize("family", every_family())
def test_one_patched_model_through_many_calls(family):
    """Every call of a series is right, whatever the calls before it have left behind in the pool."""
    model = patch_model(copy_of(family), block_size=BLOCK_SIZE)
    for name in (
        "shared_prefix",
        "beam_ragged",
        "shared_prefix",
        "num_return_sequences",
        "eos",
        "greedy_single",
        "beam_ragged",
    ):
        mode = modes.MODES[name]
        stock = stock_outcome(family, mode)
        model.paged.reset_stats()
        assert_same(family, mode, stock, patched_outcome(model, family, mode, patch_model))
        stats = model.paged.stats()
        assert stats.prompt_tokens == stats.computed_tokens + stats.reused_tokens + stats.shared_tokens, name
        assert_blocks_given_back(model, f"{family.name} × {name}, in a series")


@pytest.mark.parametrize("block_size", [16, 32, 256])
@pytest.mark.parametrize("name", ["shared_prefix", "beam_ragged", "long", "continue_whole_ragged"])
@pytest.mark.parametrize("family", every_family(lambda family: family.name in ("llama", "gemma2", "gpt2", "opt")))
def test_every_block_size(family, name, block_size):
    mode = modes.MODES[name]
    stock = stock_outcome(family, mode)
    model = patch_model(copy_of(family), block_size=block_size)
    patched = patched_outcome(model, family, mode, patch_model)
    assert_same(family, mode, stock, patched)
    patched.caches.clear()
    assert_blocks_given_back(model, f"{family.name} × {name} × block_size={block_size}")


@pytest.mark.parametrize("layers", ["as here", "native"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", every_family(lambda family: family.packed is True))
@torch.no_grad()
def test_half_precision_is_as_near_to_float32_as_stock(family, dtype, layers, request):
    """In half precision tokens may part at near-ties, so logits of one fixed text are compared, step by step."""
    products = [] if layers == "as here" else request.getfixturevalue("native_products")
    inputs, steps = prompts.ragged(), 6
    exact = stock_model(family.name).generate(**inputs, do_sample=False, max_new_tokens=steps,
                                              return_dict_in_generate=True, output_logits=True)  # fmt: skip
    forced = exact.sequences[:, inputs["input_ids"].shape[1] :]

    def logits(model):
        """Logits along the float32 tokens: generation is forced to them."""

        def only(batch_id, ids):
            step = len(ids) - inputs["input_ids"].shape[1]
            return [int(forced[batch_id, step])]

        output = model.generate(**inputs, do_sample=False, max_new_tokens=steps, prefix_allowed_tokens_fn=only,
                                return_dict_in_generate=True, output_logits=True)  # fmt: skip
        assert torch.equal(output.sequences, exact.sequences)
        return torch.stack(output.logits)

    stock = logits(copy_of(family).to(dtype))
    model = patch_model(copy_of(family).to(dtype), block_size=BLOCK_SIZE)
    patched = logits(model)
    assert model.paged.stats().fallbacks == {}
    assert bool(products) == (layers == "native")
    truth = torch.stack(exact.logits)
    assert not patched.isnan().any()
    error = {"stock": (stock - truth).abs().mean(), "patched": (patched - truth).abs().mean()}
    assert error["patched"] <= 1.5 * error["stock"], f"{family.name} {dtype}: mean error {error}"


@pytest.mark.parametrize("family", every_family())
def test_scoring_is_bit_for_bit_stock(family):
    """`model(...)` without a paged cache runs the model's own attention, padded rows included."""
    inputs = prompts.ragged()
    if "encoder_decoder" in family.tags:
        inputs["decoder_input_ids"] = prompts.identical()["input_ids"][:1].repeat(len(inputs["input_ids"]), 1)
    model = patch_model(copy_of(family), block_size=BLOCK_SIZE)
    with torch.no_grad():
        expected = stock_model(family.name)(**inputs).logits
        assert torch.equal(model(**inputs).logits, expected), family.name
        model.generate(**prompts.single(), do_sample=False, max_new_tokens=3)
        assert torch.equal(model(**inputs).logits, expected), f"{family.name}, after a generate"
    assert model.paged.stats().blocks_in_use == 0


@pytest.mark.parametrize("family", every_family(lambda family: family.packed is True))
def test_own_loop_over_forward_with_the_users_cache(family):
    """Calling a patched model step by step with one's own DynamicCache is stock, bit for bit."""
    ids = prompts.single()["input_ids"]
    results = []
    for model in (stock_model(family.name), patch_model(copy_of(family), block_size=BLOCK_SIZE)):
        cache, steps = DynamicCache(config=model.config), []
        with torch.no_grad():
            for piece in ids.split([9, 1, 1, 6, 4], dim=1):
                steps.append(model(piece, past_key_values=cache).logits)
        results.append(torch.cat(steps, dim=1))
    assert torch.equal(*results), family.name


@pytest.mark.parametrize("family", every_family(lambda family: family.packed is True))
def test_own_loop_over_forward_with_a_returned_cache(family):
    """The cache that a patched `generate` returned also works in a plain `model(...)` call."""
    inputs = prompts.single()
    logits = []
    for model in (copy_of(family), patch_model(copy_of(family), block_size=BLOCK_SIZE)):
        output = model.generate(**inputs, do_sample=False, max_new_tokens=5, return_dict_in_generate=True)
        with torch.no_grad():
            step = model(output.sequences[:, -1:], past_key_values=output.past_key_values).logits
            following = model(step.argmax(-1), past_key_values=output.past_key_values).logits
        logits.append(torch.cat([step, following], dim=1))
    assert_close(logits[1], logits[0], family.name)


def test_every_mode_is_tested_on_most_families():
    """A guard on the tables of exclusions: no mode may be excluded away."""
    for mode in modes.MODES.values():
        tested = [family for family in FAMILIES.values() if family.packed and not compare.applicable(family, mode.name)]
        assert len(tested) >= 14, f"{mode.name} runs on {len(tested)} packed families only"


def test_generation_config_object_and_defaults_are_respected():
    """Settings may come from the call, from a GenerationConfig, or from the model's own."""
    stock, model = copy_of(FAMILIES["llama"]), patch_model(copy_of(FAMILIES["llama"]), block_size=BLOCK_SIZE)
    config = copy.deepcopy(stock.generation_config)
    config.update(max_new_tokens=7, num_beams=2, do_sample=False)
    expected = stock.generate(**prompts.ragged(), generation_config=config)
    assert torch.equal(model.generate(**prompts.ragged(), generation_config=config), expected)
    for one in (stock, model):
        one.generation_config.update(max_new_tokens=5, do_sample=False, repetition_penalty=1.3)
    assert torch.equal(model.generate(**prompts.ragged()), stock.generate(**prompts.ragged()))
    assert torch.equal(model.generate(prompts.single()["input_ids"]), stock.generate(prompts.single()["input_ids"]))


def test_unknown_arguments_are_refused_as_by_stock():
    """`_validate_model_kwargs` reads signatures: a typo must not slip through, nor a valid argument be refused."""
    stock, model = copy_of(FAMILIES["llama"]), patch_model(copy_of(FAMILIES["llama"]), block_size=BLOCK_SIZE)
    messages = []
    for one in (stock, model):
        with pytest.raises(ValueError) as raised:
            one.generate(**prompts.single(), max_new_tokens=2, atention_mask=torch.ones(1, 21))
        messages.append(str(raised.value))
    assert messages[0] == messages[1]
