"""Decode steps that are prepared for all layers at the first one: when they are, and what they must not share."""

from collections import Counter
from functools import partial

import pytest
import torch
from compare import copy_of
from families import FAMILIES
from pair import Pair
from prompts import batch, tokens
from transformers.models.llama.modeling_llama import LlamaAttention

from hf_paged import PagedCache
from hf_paged.backends.prepared import PreparedDecode, PreparedLayer
from hf_paged.compat import CACHE_NAME
from hf_paged_kernels import NativeKernel, kernel_for

NEW = 5
LAYERS = 2  # of the family llama

pytestmark = pytest.mark.skipif(
    kernel_for(torch.float32, 16, 16) is None,  # no compiler at install, or no variant that was measured on this CPU
    reason="steps are prepared for the native kernel, which is not here",
)


@pytest.fixture
def seen(monkeypatch):
    """What was done: attention calls of prepared layers, and of these those left to others; layouts of calls."""
    counts = Counter()
    attend = PreparedLayer.attend

    def counting(self, query, call):
        out = attend(self, query, call)
        counts["attended" if out is not None else "left"] += 1
        return out

    monkeypatch.setattr(PreparedLayer, "attend", counting)
    for name in ("rows_call", "parts_call"):
        whole = getattr(NativeKernel, name)

        def laying_out(self, *args, whole=whole, name=name):
            counts[name] += 1
            return whole(self, *args)

        monkeypatch.setattr(NativeKernel, name, laying_out)
    return counts


def test_rows_of_equal_length_lay_one_call_out_a_step(seen):
    pair = Pair()
    pair.ask([tokens(20, seed=1), tokens(20, seed=2)], max_new_tokens=NEW)
    seen.clear()
    pair.ask([tokens(20, seed=3), tokens(20, seed=4)], max_new_tokens=NEW)
    assert seen["attended"] == LAYERS * (NEW - 1)
    assert seen["left"] == 0
    assert seen["rows_call"] == NEW - 1


@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        ([tokens(20, seed=1), tokens(11, seed=2)], {}),
        ([tokens(24, seed=5) + tokens(3, seed=6), tokens(24, seed=5) + tokens(3, seed=7)], {}),
    ],
    ids=["ragged", "shared prefix"],
)
def test_other_rows_are_prepared_too(seen, rows, settings):
    pair = Pair(**settings)
    pair.ask([tokens(9, seed=8)], max_new_tokens=2)
    seen.clear()
    pair.ask(rows, max_new_tokens=NEW)
    assert seen["attended"] == LAYERS * (NEW - 1)
    assert seen["left"] == 0
    assert seen["rows_call"] == 0


def test_quantized_rows_are_prepared_too(seen):
    model = Pair(kv_cache_dtype="int8", verify=False).model
    given = torch.tensor([tokens(20, seed=1)])
    model.generate(given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=NEW)
    assert seen["attended"] >= LAYERS * (NEW - 1)
    assert seen["left"] == 0


def test_results_that_somebody_keeps_stay_as_they_were():
    """Results of one step's layers lie in one piece of memory; whoever keeps them must find them unchanged."""

    def keep(kept, forward, result):
        kept.append((result, result.clone()))
        return forward(result)

    def keeping(model):
        kept = []
        for name, module in model.named_modules():
            if name.endswith("o_proj"):
                module.forward = partial(keep, kept, module.forward)
        return kept

    pair = Pair()
    stocks, ours = keeping(pair.stock), keeping(pair.model)
    pair.ask([tokens(20, seed=1), tokens(20, seed=2)], max_new_tokens=NEW)
    decoded = LAYERS * (NEW - 1)
    assert pair.paged.stats().fallbacks == {}
    assert all(torch.equal(now, then) for now, then in ours)
    for (mine, _), (theirs, _) in zip(ours[-decoded:], stocks[-decoded:], strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


class _Altering(LlamaAttention):
    """Attends to K and V that are not those that the cache returned."""

    altered: str

    def forward(self, hidden_states, **kwargs):
        if kwargs.get(CACHE_NAME) is not None:
            kwargs[CACHE_NAME] = _Between(kwargs[CACHE_NAME], self.altered)
        return super().forward(hidden_states, **kwargs)


class _Between:
    def __init__(self, cache, altered):
        self._cache, self._altered = cache, altered

    def update(self, key, value, *args, **kwargs):
        key, value = self._cache.update(key, value, *args, **kwargs)
        return (key * 1.5, value) if self._altered == "key" else (key, value * 1.5)


@pytest.mark.parametrize("altered", ["key", "value"])
@pytest.mark.parametrize("lengths", [(20, 20), (20, 11)], ids=["rows", "ragged"])
def test_what_a_model_makes_of_keys_and_values_counts(altered, lengths):
    def wrap(model):
        for layer in model.model.layers:
            layer.self_attn.__class__ = type("Altering", (_Altering,), {"altered": altered})
        return model

    Pair(wrap=wrap).ask([tokens(n, seed=n + i) for i, n in enumerate(lengths)], max_new_tokens=NEW)


def test_layers_that_look_otherwise_are_left_alone(monkeypatch):
    """A pass in which the second layer's K has other strides than the first one's."""
    returned = []
    update = PreparedDecode.update

    def noting(self, index, key, value):
        if index == 1:
            key = key.transpose(1, 2).contiguous().transpose(1, 2) if key.shape[0] == 1 else key
            key = torch.cat([key, key], dim=-1)[..., : key.shape[-1]]
        dense = update(self, index, key, value)
        returned.append((index, dense is not None))
        return dense

    monkeypatch.setattr(PreparedDecode, "update", noting)
    pair = Pair()
    pair.ask([tokens(20, seed=1)], max_new_tokens=NEW)
    assert set(returned) == {(0, True), (1, False)}


def test_queries_that_look_otherwise_are_left_alone(monkeypatch):
    """The same for the second layer's query."""
    taken = []
    attend = PreparedLayer.attend

    def spreading(self, query, call):
        is_second = len(taken) % LAYERS == 1
        if is_second:
            query = torch.cat([query, query], dim=-1)[..., : query.shape[-1]]
        out = attend(self, query, call)
        taken.append(out is not None)
        return out

    pair = Pair()
    pair.ask([tokens(20, seed=2)], max_new_tokens=NEW)
    monkeypatch.setattr(PreparedLayer, "attend", spreading)
    pair.ask([tokens(20, seed=1)], max_new_tokens=NEW)
    assert taken == [True, False] * (NEW - 1)


@pytest.mark.parametrize(
    ("changed", "is_taken"),
    [
        (lambda query, call, tokens: (query.double(), call), False),
        (lambda query, call, tokens: (query, call._replace(window=tokens - 1)), False),
        (lambda query, call, tokens: (query, call._replace(window=tokens)), True),
    ],
    ids=["dtype", "window that hides", "window that hides nothing"],
)
def test_only_what_the_kernel_does_is_taken(changed, is_taken, monkeypatch):
    taken = []
    attend = PreparedLayer.attend

    def changing(self, query, call):
        taken.append(attend(self, *changed(query, call, self._plan.kv_len)) is not None)
        return attend(self, query, call)

    pair = Pair()
    pair.ask([tokens(20, seed=2)], max_new_tokens=NEW)
    monkeypatch.setattr(PreparedLayer, "attend", changing)
    pair.ask([tokens(20, seed=1)], max_new_tokens=NEW)
    assert taken == [is_taken] * LAYERS * (NEW - 1)


def test_keys_of_fewer_rows_are_refused_in_the_middle_of_a_decode_loop(monkeypatch):
    pair, rows = Pair(), [tokens(20, seed=1), tokens(20, seed=2)]
    pair.ask(rows, max_new_tokens=NEW)
    update = PagedCache.update
    with monkeypatch.context() as patched:
        patched.setattr(
            PagedCache,
            "update",
            lambda self, key, value, *args, **kwargs: update(
                self, *((key[:1], value[:1]) if self.prepared else (key, value)), *args, **kwargs
            ),
        )
        with pytest.raises(ValueError, match="K and V of 1 tokens in a pass over 2"):
            pair.model.generate(**batch(rows), do_sample=False, max_new_tokens=NEW)
    pair.ask(rows, max_new_tokens=NEW)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_under_autocast(name):
    """Some models leave queries, K and V in one dtype there, others do not."""
    pair, rows = Pair(name), batch([tokens(20, seed=1), tokens(20, seed=2)])
    arguments = {"do_sample": False, "max_new_tokens": NEW, "return_dict_in_generate": True, "output_logits": True}
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = (model.generate(**rows, **arguments) for model in (pair.stock, pair.model))
    error = [(a - b).abs().max() / b.abs().max() for a, b in zip(actual.logits, expected.logits, strict=True)]
    assert max(error[:2]) < 0.05  # bfloat16; later tokens may differ
    assert not pair.paged.stats().fallbacks


def test_others_find_keys_as_keys_and_values_as_values(monkeypatch):
    checked = []
    update = PreparedDecode.update

    def reading(self, index, key, value):
        dense = update(self, index, key, value)
        store = self._stores[index]
        for given, expected in zip(dense, store.read(self._step.dense(store.group).of), strict=True):
            assert torch.equal(given.to_dense(), expected)
            checked.append(index)
        return dense

    pair = Pair()
    pair.ask([tokens(20, seed=3)], max_new_tokens=NEW)
    monkeypatch.setattr(PreparedDecode, "update", reading)
    pair.ask([tokens(20, seed=1), tokens(11, seed=2)], max_new_tokens=NEW)
    assert len(checked) == 2 * LAYERS * (NEW - 1)


def test_keys_that_need_gradients_are_refused_in_the_middle_of_a_decode_loop():
    model = Pair().model
    given = torch.tensor([tokens(20, seed=1)])
    with torch.no_grad():
        cache = model(given, use_cache=True, past_key_values=PagedCache(model.config)).past_key_values
    with pytest.raises(ValueError, match="carries no gradients"):
        model(given[:, :1], past_key_values=cache)


def test_family_llama_has_the_layers_that_are_counted_here():
    assert copy_of(FAMILIES["llama"]).config.num_hidden_layers == LAYERS
