"""`PagedCache` as a cache: on unpatched models, and method for method against `DynamicCache`."""

import copy
import gc
import inspect

import modes
import prompts
import pytest
import torch
from compare import BLOCK_SIZE, copy_of, every_family
from families import FAMILIES, stock_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tolerances import KV, assert_close
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from hf_paged import PagedCache, patch_model

CONFIGS = ["llama", "mistral_sliding", "gemma3"]  # full layers only, sliding layers only, both


def both_caches(name: str, batch_size: int = 2, tokens: int = 13, record_past: bool = False) -> tuple[Cache, Cache]:
    """A DynamicCache and a PagedCache that have seen the same random K and V."""
    actual = PagedCache(stock_model(name).config, block_size=BLOCK_SIZE)
    caches = dynamic_twin(name, actual), actual
    if record_past:
        for cache in caches:
            cache.activate_past_recording()
    if tokens:
        append(caches, batch_size, tokens)
    return caches


def dynamic_twin(name: str, actual: Cache) -> Cache:
    """The DynamicCache that a PagedCache has to behave as, layer by layer as it calls itself.

    A layer that says it slides must do all that a DynamicSlidingWindowLayer does; one that keeps everything although
    the model looks through a window, all that a DynamicLayer does, as in a `DynamicCache()` without a config.
    """
    twin = DynamicCache(config=stock_model(name).config)
    assert len(actual.layers) == len(twin.layers)
    for index, slides in enumerate(actual.is_sliding):
        if not slides:
            twin.layers[index] = DynamicLayer()
    return twin


def append(caches: tuple[Cache, Cache], batch_size: int, tokens: int, seed: int = 0) -> None:
    """The same new K and V to both; what `update` returns must be equal, bit for bit."""
    generator = torch.Generator().manual_seed(seed)
    for layer in range(len(caches[0].layers)):
        heads, dim = 2, 16
        keys, values = (torch.randn(batch_size, heads, tokens, dim, generator=generator) for _ in range(2))
        # transformers 5.17 returns more than its own masks cover while a window layer records its past.
        visible, _ = caches[0].get_mask_sizes(tokens, layer)
        results = [cache.update(keys, values, layer) for cache in caches]
        for name, expected, actual in zip(("keys", "values"), *results, strict=True):
            expected = expected[:, :, -visible:]
            assert_close(torch.clone(actual), expected, f"{name} returned by update of layer {layer}", KV)


def assert_caches_equal(dynamic: Cache, actual: Cache, what: str = "") -> None:
    """Everything visible: lengths, mask sizes, kinds of layers, and the dense K and V of every layer."""
    assert len(actual) == len(dynamic), what
    assert actual.get_seq_length() == dynamic.get_seq_length(), what
    assert actual.is_sliding == dynamic.is_sliding, what
    for index, (wanted, got) in enumerate(zip(dynamic.layers, actual.layers, strict=True)):
        name = f"{what}, layer {index}"
        assert got.get_seq_length() == wanted.get_seq_length(), name
        for queries in (1, 3, 20):
            assert actual.get_mask_sizes(queries, index) == dynamic.get_mask_sizes(queries, index), (
                f"{name}, {queries} queries"
            )
        if wanted.get_seq_length() == 0:
            continue
        assert_close(torch.clone(got.keys), wanted.keys, f"{name} keys", KV)
        assert_close(torch.clone(got.values), wanted.values, f"{name} values", KV)


def test_append_uses_the_shape_of_the_configs():
    for name in CONFIGS:
        config = stock_model(name).config
        assert (config.num_key_value_heads, config.head_dim) == (2, 16), name


# On unpatched models


def with_attention(family, attention: str):
    model = copy_of(family)
    try:
        model.set_attn_implementation(attention)
    except ValueError as error:
        pytest.skip(f"this transformers refuses {attention} for {family.name}: {str(error)[:80]}")
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
    expected = mode.call(modes.Run(stock_model(family.name), family, mode.inputs()))

    class WithCache(modes.Run):
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


# Method for method


def test_it_has_every_public_member_of_dynamic_cache():
    dynamic, actual = both_caches("gemma3")
    missing = [name for name in dir(dynamic) if not name.startswith("_") and hasattr(dynamic, name)]
    missing = [name for name in missing if not hasattr(actual, name)]
    assert missing == []
    for wanted, got in zip(dynamic.layers, actual.layers, strict=True):
        allowed = {"dtype", "device", "lazy_initialization"}  # how a dense layer happens to keep its tensors
        missing = [name for name in dir(wanted) if not name.startswith("_") and not hasattr(got, name)]
        assert set(missing) <= allowed, missing


@pytest.mark.parametrize("name", CONFIGS)
def test_methods_take_the_arguments_of_dynamic_cache(name):
    dynamic, actual = both_caches(name)
    for method, function in inspect.getmembers(dynamic, inspect.ismethod):
        if method.startswith("_") or method == "crop":  # whose only argument has had two names
            continue
        wanted = list(inspect.signature(function).parameters)
        got = inspect.signature(getattr(actual, method)).parameters
        takes_anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in got.values())
        assert takes_anything or list(got)[: len(wanted)] == wanted, f"{method}: {list(got)}, DynamicCache {wanted}"


@pytest.mark.parametrize("name", CONFIGS)
def test_empty(name):
    dynamic, actual = both_caches(name, tokens=0)
    assert_caches_equal(dynamic, actual)
    assert isinstance(actual, Cache)
    assert actual.is_initialized == dynamic.is_initialized
    assert actual.is_compileable == dynamic.is_compileable
    assert (actual.get_seq_length(), actual.get_seq_length(1)) == (0, 0)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("pieces", [[1], [8], [16], [7, 1, 1], [13, 5, 1, 20], [1] * 12])
def test_append(name, pieces):
    caches = both_caches(name, tokens=0)
    for seed, count in enumerate(pieces):
        append(caches, 2, count, seed)
        assert_caches_equal(*caches, f"after {pieces[: seed + 1]}")
    assert caches[1].is_initialized == caches[0].is_initialized is True


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("order", [[1, 0, 2], [0, 0, 0], [2, 2, 1], [0, 1, 2]])
def test_reorder(name, order):
    caches = both_caches(name, batch_size=3)
    for cache in caches:
        cache.reorder_cache(torch.tensor(order))
    assert_caches_equal(*caches, "after the reorder")
    append(caches, 3, 4, seed=1)
    assert_caches_equal(*caches, "rows that share blocks must part when they grow")


@pytest.mark.parametrize("name", CONFIGS)
def test_repeat_interleave(name):
    caches = both_caches(name)
    for cache in caches:
        cache.batch_repeat_interleave(3)
    assert_caches_equal(*caches)
    append(caches, 6, 2, seed=1)
    assert_caches_equal(*caches, "after growing")


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("rows", [[0], [2, 0], [1, 1, 1, 2], [-1]])
def test_select(name, rows):
    caches = both_caches(name, batch_size=3)
    for cache in caches:
        cache.batch_select_indices(torch.tensor(rows))
    assert_caches_equal(*caches)
    append(caches, len(rows), 3, seed=1)
    assert_caches_equal(*caches, "after growing")


@pytest.mark.parametrize("name", CONFIGS)
def test_select_with_a_mask(name):
    caches = both_caches(name, batch_size=3)
    for cache in caches:
        cache.batch_select_indices(torch.tensor([True, False, True]))
    assert_caches_equal(*caches)


def positive_crop_is_supported() -> bool:
    """Up to 5.13 a positive argument was the length to keep; later versions refuse it."""
    cache = DynamicCache(config=stock_model("llama").config)
    for layer in range(2):
        cache.update(torch.zeros(1, 2, 5, 16), torch.zeros(1, 2, 5, 16), layer)
    try:
        cache.crop(3)
    except ValueError:
        return False
    return cache.get_seq_length() == 3


def test_crop_of_zero():
    """The number that is neither positive nor negative: all or nothing, as the installed transformers has it."""
    caches = both_caches("llama")
    for cache in caches:
        cache.crop(0)
    assert caches[1].get_seq_length() == caches[0].get_seq_length()


@pytest.mark.parametrize("remove", [1, 5, 8, 12])
def test_crop_by_a_number_of_tokens(remove):
    caches = both_caches("llama")
    for cache in caches:
        cache.crop(-remove)
    assert caches[1].get_seq_length() == 13 - remove
    assert_caches_equal(*caches)
    append(caches, 2, 6, seed=1)
    assert_caches_equal(*caches, "after growing again")


@pytest.mark.parametrize("keep", [1, 8, 12, 13, 40])
def test_crop_to_a_length(keep):
    """The old convention is accepted everywhere; where stock accepts it too, the results are equal."""
    dynamic, actual = both_caches("llama")
    actual.crop(keep)
    assert actual.get_seq_length() == min(keep, 13)
    if positive_crop_is_supported():
        dynamic.crop(keep)
    elif keep < 13:
        dynamic.crop(keep - 13)
    assert_caches_equal(dynamic, actual)


@pytest.mark.parametrize("name", CONFIGS)
def test_crop_below_the_window(name):
    caches = both_caches(name, tokens=6)
    for cache in caches:
        cache.crop(-2)
    assert_caches_equal(*caches)
    append(caches, 2, 9, seed=1)
    assert_caches_equal(*caches, "after growing past the window")


needs_past_recording = pytest.mark.skipif(
    not hasattr(Cache, "activate_past_recording"), reason="this transformers has no past recording"
)


@needs_past_recording
@pytest.mark.parametrize("name", CONFIGS)
def test_crop_beyond_the_window_while_the_past_is_recorded(name):
    caches = both_caches(name, tokens=0, record_past=True)
    assert (
        caches[1].is_recording_past(0) == caches[0].is_recording_past(0)
        if hasattr(Cache, "is_recording_past")
        else True
    )
    append(caches, 2, 13)
    for seed, (count, remove) in enumerate([(5, 4), (3, 3), (6, 0), (1, 1), (4, 2)], start=1):
        append(caches, 2, count, seed)
        for cache in caches:
            cache.crop(-remove)
        assert_caches_equal(*caches, f"after +{count} −{remove}")


@pytest.mark.parametrize("name", CONFIGS)
def test_is_croppable(name):
    dynamic, actual = both_caches(name)
    if not hasattr(dynamic, "is_croppable"):
        pytest.skip("this transformers has no is_croppable")
    assert actual.is_croppable == dynamic.is_croppable
    assert [layer.is_croppable for layer in actual.layers] == [layer.is_croppable for layer in dynamic.layers]


@pytest.mark.parametrize("name", CONFIGS)
def test_maximum_length(name):
    dynamic, actual = both_caches(name)
    method = "get_max_length" if hasattr(dynamic, "get_max_length") else "get_max_cache_shape"
    for layer in range(len(dynamic)):
        assert getattr(actual, method)(layer) == getattr(dynamic, method)(layer)
    assert getattr(actual, method)() == getattr(dynamic, method)()


@pytest.mark.parametrize("name", CONFIGS)
def test_reset_and_reuse_with_another_batch_size(name):
    caches = both_caches(name)
    actual = caches[1]
    actual.reset()
    assert actual.get_seq_length() == 0
    fresh = dynamic_twin(name, actual)
    append((fresh, actual), 3, 11, seed=4)
    assert_caches_equal(fresh, actual)


@pytest.mark.parametrize("name", CONFIGS)
def test_iteration_over_layers(name):
    dynamic, actual = both_caches(name)
    wanted, got = list(dynamic), list(actual)
    assert len(wanted) == len(got)
    for layer, (expected, found) in enumerate(zip(wanted, got, strict=True)):
        assert len(expected) == len(found)
        assert_close(torch.clone(found[0]), expected[0], f"keys of layer {layer}", KV)
        assert_close(torch.clone(found[1]), expected[1], f"values of layer {layer}", KV)
        assert (found[2] is None) == (expected[2] is None)
        assert expected[2] is None or int(found[2]) == int(expected[2])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_dynamic_cache_can_be_made_from_it(name):
    """The way DDP and older code convert caches: through iteration."""
    dynamic, actual = both_caches(name)
    rebuilt = DynamicCache([(torch.clone(layer[0]), torch.clone(layer[1])) for layer in actual])
    for wanted, got in zip(dynamic.layers, rebuilt.layers, strict=True):
        assert torch.equal(got.keys, wanted.keys)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "operation",
    [
        lambda layer: layer.reorder_cache(torch.tensor([1, 1])),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.batch_select_indices(torch.tensor([1])),
        lambda layer: layer.crop(-3),
    ],
    ids=["reorder", "repeat", "select", "crop"],
)
def test_layer_methods_one_by_one(name, operation):
    """`for layer in cache.layers: layer.method(...)` is how `Cache` itself and other code apply an operation."""
    caches = both_caches(name, tokens=6)
    for cache in caches:
        for layer in cache.layers:
            operation(layer)
    assert_caches_equal(*caches, "after the loop over layers")
    rows = caches[0].layers[0].keys.shape[0]
    append(caches, rows, 5, seed=2)
    assert_caches_equal(*caches, "after growing")


@pytest.mark.parametrize("name", CONFIGS)
def test_layer_update_one_by_one(name):
    caches = both_caches(name, tokens=0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        for layers in zip(caches[0].layers, caches[1].layers, strict=True):
            keys, values = (torch.randn(2, 2, 5, 16, generator=generator) for _ in range(2))
            (keys_a, values_a), (keys_b, values_b) = (layer.update(keys, values) for layer in layers)
            assert_close(torch.clone(keys_b), keys_a, "keys", KV)
            assert_close(torch.clone(values_b), values_a, "values", KV)
    assert_caches_equal(*caches)


@pytest.mark.parametrize("name", CONFIGS)
def test_layer_reset_one_by_one(name):
    caches = both_caches(name)
    for layer in caches[1].layers:
        layer.reset()
    assert caches[1].get_seq_length() == 0
    fresh = dynamic_twin(name, caches[1])
    append((fresh, caches[1]), 2, 7, seed=3)
    assert_caches_equal(fresh, caches[1])


@pytest.mark.parametrize("name", CONFIGS)
def test_deepcopies_go_on_independently(name):
    caches = both_caches(name)
    copies = copy.deepcopy(caches)
    assert_caches_equal(*copies, "right after the copy")
    append(caches, 2, 4, seed=1)
    append(copies, 2, 6, seed=2)
    assert_caches_equal(*caches, "the original")
    assert_caches_equal(*copies, "the copy")
    del caches
    gc.collect()
    append(copies, 2, 1, seed=3)
    assert_caches_equal(*copies, "the copy, after the original is gone")


def test_deepcopy_on_a_pool_frees_only_its_own():
    model = patch_model(copy_of(FAMILIES["llama"]), block_size=BLOCK_SIZE)
    output = model.generate(**prompts.single(), do_sample=False, max_new_tokens=4, return_dict_in_generate=True)
    held = model.paged.stats().blocks_in_use
    assert held > 0
    twin = copy.deepcopy(output.past_key_values)
    del output
    gc.collect()
    assert model.paged.stats().blocks_in_use > 0
    before = [torch.clone(layer.keys) for layer in twin.layers]
    model.generate(**prompts.ragged(), do_sample=False, max_new_tokens=12)
    assert all(torch.equal(torch.clone(layer.keys), keys) for layer, keys in zip(twin.layers, before, strict=True))
    del twin
    gc.collect()
    assert model.paged.stats().blocks_in_use == 0


def test_returned_tensors_are_not_overwritten_later():
    """What `update` returned is the user's: with DynamicCache it is a snapshot of that moment."""
    caches = both_caches("llama", tokens=0)
    keys, values = torch.randn(2, 2, 5, 16), torch.randn(2, 2, 5, 16)
    returned = torch.clone(caches[1].update(keys, values, 0)[0])
    assert torch.equal(returned, keys)
    keys.zero_()
    assert not torch.equal(torch.clone(caches[1].layers[0].keys), keys), "the cache keeps its own copy"


@pytest.mark.parametrize("shape", [(1, 1, 64), (5, 7, 16)], ids=str)
def test_other_shapes_come_from_the_tensors(shape):
    """Heads and dims of a config may mislead (as for latent attention): what is appended decides."""
    heads, tokens, dim = shape
    config = FAMILIES["llama"].build(num_attention_heads=4, num_key_value_heads=2).config
    dynamic, actual = DynamicCache(config=config), PagedCache(config, block_size=BLOCK_SIZE)
    keys, values = torch.randn(2, heads, tokens, dim), torch.randn(2, heads, tokens, dim // 2)
    for layer in range(2):
        for cache in (dynamic, actual):
            cache.update(keys, values, layer)
    assert_caches_equal(dynamic, actual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes_come_back_bit_for_bit(dtype):
    config = stock_model("llama").config
    dynamic, actual = DynamicCache(config=config), PagedCache(config, block_size=BLOCK_SIZE)
    for layer in range(2):
        keys, values = torch.randn(2, 2, 11, 16).to(dtype), torch.randn(2, 2, 11, 16).to(dtype)
        for cache in (dynamic, actual):
            cache.update(keys, values, layer)
    for wanted, got in zip(dynamic.layers, actual.layers, strict=True):
        assert got.keys.dtype == dtype
        assert torch.equal(torch.clone(got.keys), wanted.keys)
        assert torch.equal(torch.clone(got.values), wanted.values)


# Random sequences of operations


class AgainstDynamicCache(RuleBasedStateMachine):
    """Any order of operations leaves both caches with the same K and V in every layer, bit for bit."""

    config_name = "llama"

    def __init__(self):
        super().__init__()
        self.pairs: list[tuple[Cache, Cache]] = []
        self.rows: list[int] = []
        self.seed = 0

    @initialize(rows=st.integers(1, 4), tokens=st.integers(1, 20))
    def start(self, rows, tokens):
        record = hasattr(Cache, "activate_past_recording") and self.config_name != "llama"
        self.pairs = [both_caches(self.config_name, rows, tokens, record_past=record)]
        self.rows = [rows]

    def pick(self, choice: int) -> int:
        return choice % len(self.pairs)

    @rule(choice=st.integers(0, 3), tokens=st.integers(1, 11))
    def append(self, choice, tokens):
        index = self.pick(choice)
        self.seed += 1
        append(self.pairs[index], self.rows[index], tokens, self.seed)

    @rule(choice=st.integers(0, 3), order=st.lists(st.integers(0, 7), min_size=8, max_size=8))
    def reorder(self, choice, order):
        index = self.pick(choice)
        beam_idx = torch.tensor([position % self.rows[index] for position in order[: self.rows[index]]])
        for cache in self.pairs[index]:
            cache.reorder_cache(beam_idx)

    @rule(choice=st.integers(0, 3), order=st.lists(st.integers(0, 7), min_size=1, max_size=5))
    def select(self, choice, order):
        index = self.pick(choice)
        indices = torch.tensor([position % self.rows[index] for position in order])
        for cache in self.pairs[index]:
            cache.batch_select_indices(indices)
        self.rows[index] = len(order)

    @precondition(lambda self: max(self.rows, default=0) <= 4)
    @rule(choice=st.integers(0, 3))
    def repeat(self, choice):
        index = self.pick(choice)
        for cache in self.pairs[index]:
            cache.batch_repeat_interleave(2)
        self.rows[index] *= 2

    @rule(choice=st.integers(0, 3), remove=st.integers(0, 12))
    def crop(self, choice, remove):
        """As far as stock can: a window layer only remembers what was recorded since its last crop."""
        index = self.pick(choice)
        dynamic = self.pairs[index][0]
        amount = min(remove, *(self.can_crop(layer) for layer in dynamic.layers))
        if amount > 0 or hasattr(dynamic, "activate_past_recording"):  # before that, 0 was a length
            for cache in self.pairs[index]:
                cache.crop(-amount)

    @staticmethod
    def can_crop(layer) -> int:
        length = layer.get_seq_length()
        if not getattr(layer, "is_sliding", False):
            return length - 1
        if length < layer.sliding_window:
            return length - 1
        if not getattr(layer, "record_past", False):
            return 0
        return max(0, layer.keys.shape[-2] - (layer.sliding_window - 1))

    @precondition(lambda self: len(self.pairs) < 3)
    @rule(choice=st.integers(0, 3))
    def copy(self, choice):
        index = self.pick(choice)
        self.pairs.append(copy.deepcopy(self.pairs[index]))
        self.rows.append(self.rows[index])

    @precondition(lambda self: len(self.pairs) > 1)
    @rule(choice=st.integers(0, 3))
    def drop(self, choice):
        index = self.pick(choice)
        del self.pairs[index], self.rows[index]

    @invariant()
    def equal(self):
        for index, pair in enumerate(self.pairs):
            assert_caches_equal(*pair, f"cache {index}")


@pytest.mark.parametrize("name", CONFIGS)
def test_random_operations_leave_the_same_keys_and_values(name):
    if name != "llama" and not hasattr(Cache, "activate_past_recording"):
        AgainstDynamicCacheOnWindows = type("WithoutCrop", (AgainstDynamicCache,), {"config_name": name, "crop": None})
        machine = AgainstDynamicCacheOnWindows
    else:
        machine = type(f"On_{name}", (AgainstDynamicCache,), {"config_name": name})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=40, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


@settings(max_examples=40, deadline=None)
@given(
    pieces=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    rows=st.integers(1, 3),
    block_size=st.sampled_from([8, 16, 32]),
)
@torch.no_grad()
def test_any_split_of_a_text_gives_the_same_logits(pieces, rows, block_size):
    """Feeding a text in any pieces through a PagedCache gives the logits of feeding it at once without a cache."""
    model = stock_model("gemma3")
    ids = torch.tensor([prompts.tokens(sum(pieces), seed) for seed in range(rows)])
    cache = PagedCache(model.config, block_size=block_size)
    logits = torch.cat([model(piece, past_key_values=cache).logits for piece in ids.split(pieces, dim=1)], dim=1)
    assert_close(logits, model(ids, use_cache=False).logits, f"pieces {pieces}")
