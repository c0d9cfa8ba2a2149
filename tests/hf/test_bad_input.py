"""Mistakes get an error that says what would be right; whatever goes wrong in a call, no block leaks."""

import contextlib
import copy
import functools
import gc
import threading

import modes
import prompts
import pytest
import torch
from compare import BLOCK_SIZE, copy_of
from families import FAMILIES, VOCAB, stock_model
from transformers import StoppingCriteria, StoppingCriteriaList

from hf_paged import PagedCache, PagedConfig, PagedMemoryError, paged, patch_model, unpatch_model

LLAMA = FAMILIES["llama"]
GREEDY = {"do_sample": False, "max_new_tokens": 8}


def patched(**overrides):
    return patch_model(copy_of(LLAMA), **{"block_size": BLOCK_SIZE, **overrides})


BEAMS = {"num_beams": 3, "do_sample": False, "max_new_tokens": 4}


@functools.cache
def expected(prompt, beams: bool = False) -> torch.Tensor:
    return stock_model("llama").generate(**prompt(), **(BEAMS if beams else GREEDY))


def assert_usable(model):
    """Nothing is left in use, and the next calls are right."""
    gc.collect()
    stats = model.paged.stats()
    assert (stats.blocks_in_use, stats.bytes_in_use) == (0, 0)
    assert torch.equal(model.generate(**prompts.shared_prefix(), **GREEDY), expected(prompts.shared_prefix))
    assert torch.equal(model.generate(**prompts.ragged(), **BEAMS), expected(prompts.ragged, beams=True))
    assert model.paged.stats().blocks_in_use == 0


# What can be patched


def bert():
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    )


def headless_llama():
    return copy_of(LLAMA).model


@pytest.mark.parametrize(
    "build",
    [
        lambda: torch.nn.Linear(2, 2),
        bert,
        headless_llama,
        lambda: "a model",
        lambda: None,
        lambda: stock_model("llama").config,
    ],
    ids=["linear", "bert", "llama without a head", "str", "None", "config"],
)
@pytest.mark.parametrize(
    "function", [patch_model, lambda model: paged(model).__enter__()], ids=["patch_model", "paged"]
)
def test_what_cannot_generate_is_a_type_error(function, build):
    thing = build()
    with pytest.raises(TypeError) as raised:
        function(thing)
    assert type(thing).__name__ in str(raised.value), "the message names what was passed"
    assert "generate" in str(raised.value), "the message says what is missing"


def test_a_refused_model_is_left_alone():
    model = bert()
    before = type(model), dict(vars(model))
    with pytest.raises(TypeError):
        patch_model(model)
    assert (type(model), dict(vars(model))) == before


# Settings

BAD_SETTINGS = [
    ("block_size", 10),
    ("block_size", 4),
    ("block_size", 512),
    ("block_size", 0),
    ("block_size", -16),
    ("block_size", 16.0),
    ("block_size", "16"),
    ("block_size", True),
    ("block_size", None),
    ("kv_cache_dtype", "float3"),
    ("kv_cache_dtype", None),
    ("kv_cache_dtype", torch.int8),
    ("attention_backend", "cuda!"),
    ("attention_backend", None),
    ("max_memory", "8GiB"),
    ("max_memory", {"cpu": "lots"}),
    ("max_memory", {"cpu": -1}),
    ("max_memory", {"cpu": None}),
    ("max_memory", {"tape": "1GiB"}),
    ("max_memory", {-1: "1GiB"}),
    ("max_memory", {"cpu": "-1GiB"}),
    ("prefix_caching", "yes"),
    ("cuda_graphs", 2),
    ("verify", "maybe"),
]


@pytest.mark.parametrize(("field", "value"), BAD_SETTINGS, ids=[f"{field}={value!r}" for field, value in BAD_SETTINGS])
def test_bad_setting_is_a_value_error_that_names_the_field(field, value):
    with pytest.raises(ValueError, match=field):
        PagedConfig(**{field: value})
    model = copy_of(LLAMA)
    with pytest.raises(ValueError, match=field):
        patch_model(model, **{field: value})
    assert not hasattr(model, "paged"), "a refused patch leaves the model unpatched"
    assert type(model) is type(stock_model("llama"))


@pytest.mark.parametrize("size", [8, 16, 32, 64, 128, 256])
def test_every_allowed_block_size_is_allowed(size):
    assert PagedConfig(block_size=size).block_size == size


def test_unknown_setting():
    with pytest.raises(ValueError, match="blocksize"):
        patch_model(copy_of(LLAMA), blocksize=16)


def test_config_of_another_type():
    with pytest.raises((TypeError, ValueError), match="config"):
        patch_model(copy_of(LLAMA), {"block_size": 16})


def test_config_is_frozen_and_keyword_only():
    config = PagedConfig()
    with pytest.raises(AttributeError):
        config.block_size = 32
    with pytest.raises(TypeError):
        PagedConfig(32)


def test_bad_reconfiguration_keeps_the_old_one():
    model = patched()
    with pytest.raises(ValueError, match="block_size"):
        patch_model(model, block_size=10)
    assert model.paged.config.block_size == BLOCK_SIZE
    assert_usable(model)


# Caches that do not fit


def returned_cache(model, inputs):
    return model.generate(**inputs, do_sample=False, max_new_tokens=4, return_dict_in_generate=True)


@pytest.mark.parametrize("patch", [False, True], ids=["unpatched", "patched"])
def test_cache_of_another_model(patch):
    """Same class, other shape: the heads do not fit. (Stock's DynamicCache would take them and be wrong.)"""
    model = copy_of(LLAMA)
    if patch:
        patch_model(model, block_size=BLOCK_SIZE)
    other = LLAMA.build(num_hidden_layers=3, num_key_value_heads=4)
    cache = PagedCache(other.config, block_size=BLOCK_SIZE)
    with torch.no_grad():
        other(prompts.single()["input_ids"], past_key_values=cache)
    with pytest.raises(ValueError, match=r"past_key_values|cache|model"):
        model.generate(**prompts.single(), past_key_values=cache, **GREEDY)
    if patch:
        assert_usable(model)


def test_empty_cache_of_another_model():
    model = patched()
    cache = PagedCache(LLAMA.build(num_hidden_layers=3, num_key_value_heads=4).config, block_size=BLOCK_SIZE)
    with pytest.raises(ValueError, match=r"past_key_values|cache|model"):
        model.generate(**prompts.single(), past_key_values=cache, **GREEDY)
    assert_usable(model)


@pytest.mark.parametrize("changes", [{}, {"num_hidden_layers": 3}], ids=["same shape", "other shape"])
def test_returned_cache_given_to_another_patched_model(changes):
    """K and V of other weights would be silent nonsense, even where the shapes agree."""
    one, two = patched(), patch_model(LLAMA.build(seed=5, **changes), block_size=BLOCK_SIZE)
    output = returned_cache(one, prompts.single())
    whole = {"input_ids": output.sequences, "attention_mask": torch.ones_like(output.sequences)}
    with pytest.raises(ValueError, match=r"past_key_values|cache|model"):
        two.generate(**whole, past_key_values=output.past_key_values, **GREEDY)
    del output
    assert_usable(one)


def test_cache_of_another_batch_size():
    model = patched()
    output = returned_cache(model, prompts.diverse())  # three rows
    whole = torch.cat([output.sequences, output.sequences[:1]])  # four
    with pytest.raises(ValueError, match=r"batch|rows"):
        model.generate(whole, attention_mask=torch.ones_like(whole), past_key_values=output.past_key_values, **GREEDY)
    del output
    assert_usable(model)


def test_cache_of_another_batch_size_on_an_unpatched_model():
    model = stock_model("llama")
    cache = PagedCache(model.config, block_size=BLOCK_SIZE)
    with torch.no_grad():
        model(prompts.diverse()["input_ids"], past_key_values=cache)
        with pytest.raises(ValueError, match=r"batch|rows"):
            model(torch.tensor([[5], [6]]), past_key_values=cache)


@pytest.mark.parametrize("remove", [22, 100])
def test_crop_beyond_the_length(remove):
    model = stock_model("llama")
    cache = PagedCache(model.config, block_size=BLOCK_SIZE)
    with torch.no_grad():
        model(prompts.single()["input_ids"], past_key_values=cache)
    with pytest.raises(ValueError, match=r"crop|21"):
        cache.crop(-remove)
    assert cache.get_seq_length() == 21, "a refused crop changes nothing"


def test_cache_arguments():
    config = stock_model("llama").config
    with pytest.raises(ValueError, match="block_size"):
        PagedCache(config, block_size=10)
    with pytest.raises((TypeError, ValueError), match="config"):
        PagedCache(None)


# Exceptions in the middle


class Boom(Exception):
    pass


class BadStreamer:
    def __init__(self, error, at):
        self.error, self.left = error, at

    def put(self, value):
        self.left -= 1
        if self.left < 0:
            raise self.error("streamer")

    def end(self):
        pass


class BadCriterion(StoppingCriteria):
    def __init__(self, error, at):
        self.error, self.left = error, at

    def __call__(self, input_ids, scores, **kwargs):
        self.left -= 1
        if self.left < 0:
            raise self.error("criterion")
        return torch.zeros(len(input_ids), dtype=torch.bool)


def bad_processor(error, at):
    left = [at]

    def processor(input_ids, scores):
        left[0] -= 1
        if left[0] < 0:
            raise error("processor")
        return scores

    return processor


@pytest.mark.parametrize(("at", "error"), [(0, Boom), (1, KeyboardInterrupt), (4, Boom)])
@pytest.mark.parametrize(
    "how", ["streamer", "criterion", "criterion in beams", "processor", "criterion in assisted", "returned dict"]
)
def test_exception_leaves_no_block_in_use(how, at, error):
    model = patched()
    bad = StoppingCriteriaList([BadCriterion(error, at)])
    calls = {
        "streamer": {"streamer": BadStreamer(error, at)},
        "criterion": {"stopping_criteria": bad},
        "criterion in beams": {"stopping_criteria": bad, "num_beams": 3},
        "processor": {"logits_processor": [bad_processor(error, at)]},
        "criterion in assisted": {"stopping_criteria": bad, "assistant_model": LLAMA.build(seed=99)},
        "returned dict": {"stopping_criteria": bad, "return_dict_in_generate": True, "output_scores": True},
    }
    inputs = prompts.single() if "assisted" in how else prompts.shared_prefix()
    with pytest.raises(error) as raised:
        model.generate(**inputs, do_sample=False, max_new_tokens=10, **calls[how])
    assert model.paged.stats().blocks_in_use == 0, "in use while somebody handles the exception, traceback and all"
    del raised
    assert_usable(model)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("at", [0, 1, 3])
def test_exception_inside_the_model(layer, at):
    """Ctrl-C or an out-of-memory error strikes in the middle of a forward: some layers have written, some not."""
    model, left = patched(), [at]

    def hook(*args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt

    model.generate(**prompts.single(), **GREEDY)  # what the model can do has been found out before
    handle = model.model.layers[layer].self_attn.register_forward_hook(hook)
    with pytest.raises(KeyboardInterrupt) as raised:
        model.generate(**prompts.shared_prefix(), **GREEDY)
    handle.remove()
    assert model.paged.stats().blocks_in_use == 0
    del raised
    assert_usable(model)


def test_exception_while_the_model_is_looked_at_for_the_first_time():
    """The very first call tries out what the model can do: Ctrl-C there must not leave a wrong answer behind."""
    model = patched()

    def hook(*args):
        raise KeyboardInterrupt

    handle = model.model.layers[0].register_forward_hook(hook)
    with pytest.raises(KeyboardInterrupt) as raised:
        model.generate(**prompts.shared_prefix(), **GREEDY)
    handle.remove()
    assert model.paged.stats().blocks_in_use == 0
    del raised
    model.paged.reset_stats()  # which say that nothing is reused where a hook might change it
    assert_usable(model)
    assert model.paged.stats().fallbacks == {}


def test_exception_with_a_cache_that_the_user_holds():
    """The user's cache survives a failed call, and letting go of it frees its blocks."""
    model = patched()
    output = returned_cache(model, prompts.single())
    whole = {"input_ids": output.sequences, "attention_mask": torch.ones_like(output.sequences)}
    bad = StoppingCriteriaList([BadCriterion(Boom, 2)])
    with pytest.raises(Boom):
        model.generate(**whole, past_key_values=output.past_key_values, stopping_criteria=bad, **GREEDY)
    assert model.paged.stats().blocks_in_use > 0
    del output
    assert_usable(model)


def test_invalid_arguments_of_generate_leave_nothing_behind():
    model = patched()
    for arguments in (
        {"num_beams": 0},
        {"max_new_tokens": -3},
        {"no_such_argument": 1},
        {"num_return_sequences": 3},
    ):
        with pytest.raises((ValueError, RuntimeError, ArithmeticError)):
            model.generate(**prompts.single(), **{"do_sample": False, "max_new_tokens": 4, **arguments})
    assert_usable(model)


# Memory

BUDGET = {"cpu": "64KiB"}  # 16 blocks of 8 tokens: two layers × K and V × 2 heads × 16 × 4 bytes = 512 bytes a token


def test_prompt_that_does_not_fit():
    model = patched(max_memory=BUDGET)
    ids = torch.tensor([prompts.tokens(200)])
    with pytest.raises(PagedMemoryError) as raised:
        model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
    assert isinstance(raised.value, RuntimeError)
    message = str(raised.value)
    assert "max_memory" in message, "names the setting to raise"
    assert any(character.isdigit() for character in message), "says how many tokens"
    assert model.paged.stats().blocks_in_use == 0
    assert torch.equal(model.generate(**prompts.single(), **GREEDY), expected(prompts.single))
    assert model.paged.stats().blocks_in_use == 0


def test_decode_that_outgrows_the_budget():
    model = patched(max_memory=BUDGET)
    with pytest.raises(PagedMemoryError):
        model.generate(**prompts.single(), do_sample=False, max_new_tokens=180)
    assert model.paged.stats().blocks_in_use == 0
    assert torch.equal(model.generate(**prompts.ragged(), **GREEDY), expected(prompts.ragged))


def test_beams_that_outgrow_the_budget():
    model = patched(max_memory=BUDGET)
    with pytest.raises(PagedMemoryError):
        model.generate(**prompts.ragged(), num_beams=4, do_sample=False, max_new_tokens=60)
    assert model.paged.stats().blocks_in_use == 0
    assert torch.equal(model.generate(**prompts.single(), **GREEDY), expected(prompts.single))


def test_budget_is_kept():
    model = patched(max_memory=BUDGET)
    for seed in range(6):  # 36 tokens each: cached blocks of earlier calls must be evicted for later ones
        ids = torch.tensor([prompts.tokens(28, seed)])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        assert torch.equal(model.generate(**inputs, **GREEDY), stock_model("llama").generate(**inputs, **GREEDY))
        assert model.paged.stats().bytes_reserved <= 64 * 1024


def test_held_caches_count_against_the_budget_and_come_back():
    model = patched(max_memory=BUDGET)
    held = []

    def hold(count):
        for seed in range(count):
            held.append(returned_cache(model, {"input_ids": torch.tensor([prompts.tokens(28, seed)])}))

    with pytest.raises(PagedMemoryError):
        hold(10)
    assert held, "the first ones fit"
    held.clear()
    gc.collect()
    assert model.paged.stats().blocks_in_use == 0
    assert torch.equal(model.generate(**prompts.single(), **GREEDY), expected(prompts.single))


def test_zero_budget():
    with pytest.raises((ValueError, PagedMemoryError), match="max_memory"):
        patched(max_memory={"cpu": 0}).generate(**prompts.single(), **GREEDY)


# Threads


def in_threads(functions):
    results, errors = [None] * len(functions), []
    start = threading.Barrier(len(functions))

    def work(index):
        try:
            start.wait(timeout=60)
            results[index] = functions[index]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]
    return results


def test_four_threads_on_one_model():
    model, stock = patched(), stock_model("llama")
    names = ["shared_prefix", "greedy_ragged", "beam", "greedy_single"]  # nothing drawn at random: the seed is global
    calls = [modes.MODES[name] for name in names]
    right = [mode.call(modes.Run(stock, LLAMA, mode.inputs())).tokens for mode in calls]

    def repeat(mode):
        return lambda: [mode.call(modes.Run(model, LLAMA, mode.inputs())).tokens for _ in range(5)]

    for name, wanted, rounds in zip(names, right, in_threads([repeat(mode) for mode in calls]), strict=True):
        for got in rounds:
            assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)), name
    stats = model.paged.stats()
    assert stats.blocks_in_use == 0
    assert stats.prompt_tokens == stats.computed_tokens + stats.reused_tokens + stats.shared_tokens
    once = sum(mode.copies * prompts.num_real_tokens(mode.inputs()) for mode in calls)
    assert stats.prompt_tokens == 5 * once


def test_a_thread_that_fails_does_not_disturb_the_others():
    model = patched()

    def fail():
        for at in range(4):
            bad = StoppingCriteriaList([BadCriterion(Boom, at)])
            with pytest.raises(Boom):
                model.generate(**prompts.shared_prefix(), stopping_criteria=bad, **GREEDY)

    def succeed():
        return [model.generate(**prompts.shared_prefix(), **GREEDY) for _ in range(4)]

    for result in in_threads([fail, succeed, succeed])[1:]:
        assert all(torch.equal(tokens, expected(prompts.shared_prefix)) for tokens in result)
    assert_usable(model)


def test_scoring_in_one_thread_while_another_generates():
    model, stock = patched(), stock_model("llama")
    ids = prompts.single()["input_ids"]
    with torch.no_grad():
        logits = stock(ids).logits
    tokens = expected(prompts.shared_prefix)

    def score():
        with torch.no_grad():
            return all(torch.equal(model(ids).logits, logits) for _ in range(20))

    def generate():
        return all(torch.equal(model.generate(**prompts.shared_prefix(), **GREEDY), tokens) for _ in range(5))

    assert in_threads([score, generate, score]) == [True, True, True]


def test_unpatching_inside_a_generate_is_refused_or_harmless():
    """A criterion that unpatches the model it runs on: whatever happens, nothing leaks and stock is back."""
    model = patched()

    class Unpatch(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            unpatch_model(model)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    with contextlib.suppress(RuntimeError):
        model.generate(**prompts.single(), stopping_criteria=StoppingCriteriaList([Unpatch()]), **GREEDY)
    unpatch_model(model)
    assert torch.equal(model.generate(**prompts.single(), **GREEDY), expected(prompts.single))
    assert not hasattr(copy.copy(model), "paged")
