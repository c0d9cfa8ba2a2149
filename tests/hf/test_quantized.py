"""`kv_cache_dtype`: the same tokens as stock on a cache that keeps what a second implementation makes of K and V."""

import copy
import itertools
import json

import prompts
import pytest
import torch
from compare import BLOCK_SIZE, copy_of
from disk import tiered
from families import FAMILIES, stock_model
from pair import Pair, evict
from quantized import RoundingCache

from hf_paged import patch_model
from hf_paged.backends import plain_torch_reason
from hf_paged.core.prefix import root_key
from hf_paged.footprint import formats_for
from hf_paged.persist import _sum_of
from hf_paged_kernels import FORMATS

MODES = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "samples": {"do_sample": True, "num_return_sequences": 3},
}
NEW = 12


def patched(family, name, **overrides):
    overrides = {"block_size": BLOCK_SIZE, "verify": False, **overrides}
    return patch_model(copy_of(FAMILIES[family]), kv_cache_dtype=name, **overrides)


def stock_answer(family, name, inputs, nudge=None, **kwargs):
    model = stock_model(family)
    torch.manual_seed(1)
    cache = RoundingCache(model.config, name, nudge)
    return model.generate(**inputs, max_new_tokens=NEW, past_key_values=cache, **kwargs)


def assert_answer(actual, family, name, inputs, what="", **kwargs):
    """Stock's tokens. A number halfway between two codes may fall either way, which all that follows depends on: rows
    may also be those of stock where K and V are off by what float32 leaves open."""
    expected = stock_answer(family, name, inputs, **kwargs)
    for nudge in range(8):
        if torch.equal(actual, expected):
            return
        other = stock_answer(family, name, inputs, nudge, **kwargs)
        expected = torch.where((actual == other).all(dim=1, keepdim=True), other, expected)
    assert torch.equal(actual, expected), what


def answer(model, inputs, **kwargs):
    torch.manual_seed(1)
    result = model.generate(**inputs, max_new_tokens=NEW, **kwargs)
    model.paged._pool.manager.check_integrity()
    assert model.paged.stats().blocks_in_use == 0
    return result


# Packed with one window and with two kinds, V of another dim than K, the padded path, a hybrid, softcaps and sinks.
NAMES = ["llama", "gemma3", "gpt2", "deepseek_v3", "bloom", "lfm2", "gemma2", "gpt_oss"]


# All but the one whose head dims int4 does not take; that is refused, see below.
PAIRS = [(family, name) for family in NAMES for name in FORMATS if (family, name) != ("deepseek_v3", "int4")]


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_tokens_are_those_of_stock_on_rounded_kv_cold_and_warm(family, name):
    if FAMILIES[family].missing():
        pytest.skip(FAMILIES[family].missing())
    for mode, arguments in MODES.items():
        inputs = prompts.shared_prefix() if mode != "samples" else prompts.ragged()
        model = patched(family, name)
        first = answer(model, inputs, **arguments)
        assert_answer(first, family, name, inputs, mode, **arguments)
        assert torch.equal(answer(model, inputs, **arguments), first), mode
        if FAMILIES[family].packed:
            assert model.paged.stats().reused_tokens > 0
            assert model.paged.stats().fallbacks == {}


def test_the_yardstick_is_not_stock_itself():
    """Else the tests above would pass with full precision stored."""
    inputs = prompts.shared_prefix()
    plain = stock_model("llama").generate(**inputs, max_new_tokens=NEW, do_sample=False)
    answers = {"auto": plain, **{name: stock_answer("llama", name, inputs, do_sample=False) for name in FORMATS}}
    for other, name in itertools.pairwise(answers):
        with pytest.raises(AssertionError):
            assert_answer(answers[other], "llama", name, inputs, do_sample=False)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("switch", ["reference", "off"])
def test_plain_torch_is_right_for_everything(name, switch, monkeypatch):
    from hf_paged_kernels.native import kernel_for, native_kernels

    if switch == "off":
        monkeypatch.setenv("HF_PAGED_NATIVE", "off")
        for cached in (native_kernels, kernel_for):
            cached.cache_clear()
    try:
        inputs = prompts.ragged()
        expected = stock_answer("llama", name, inputs, do_sample=False)
        model = patched("llama", name, attention_backend="reference" if switch == "reference" else "cpu")
        assert torch.equal(answer(model, inputs, do_sample=False), expected)
    finally:
        monkeypatch.undo()
        for cached in (native_kernels, kernel_for):
            cached.cache_clear()


@pytest.mark.parametrize("name", FORMATS)
def test_prefixes_that_were_saved_go_on_where_they_ended(name, tmp_path):
    inputs = prompts.shared_prefix()
    expected = stock_answer("llama", name, inputs, do_sample=False)
    first = patched("llama", name)
    answer(first, inputs, do_sample=False)
    written = first.paged.save(tmp_path)
    other = patched("llama", name, block_size=16)
    assert other.paged.load(tmp_path) == written
    assert torch.equal(answer(other, inputs, do_sample=False), expected)
    assert other.paged.stats().reused_tokens == prompts.num_real_tokens(inputs) - len(inputs["input_ids"])
    for wrong in {"auto", *FORMATS} - {name}:
        model = patched("llama", wrong)
        with pytest.raises(ValueError, match=f"have kv_cache_dtype {name}, this model has {wrong}"):
            model.paged.load(tmp_path)


def test_prefixes_that_an_older_version_saved_are_refused(tmp_path):
    """Its keys were not rotated."""
    first = patched("llama", "int8")
    answer(first, prompts.single(), do_sample=False)
    first.paged.save(tmp_path)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["format_version"] = 3
    del manifest["sha256"]
    path.write_text(json.dumps({**manifest, "sha256": _sum_of(manifest)}))
    second = patched("llama", "int8")
    with pytest.raises(ValueError, match="the saved prefixes have format_version 3, this model has 4"):
        second.paged.load(tmp_path)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_eviction_and_the_disk_tier_bring_records_back(name):
    class Rounded(Pair):
        """A pair whose stock side keeps rounded KV."""

        def ask(self, rows, **kwargs):
            def cache(model):
                return RoundingCache(model.config, name) if model is self.stock else None

            return super().ask(rows, past_key_values=cache, **kwargs)

    # Memory for three to five prompts: float32 takes 256 bytes a token and layer, int8 80 and int4 48.
    pair = tiered("llama", blocks=4, make=Rounded, kv_cache_dtype=name, verify=False)
    rows = [prompts.tokens(30, seed=each) for each in range(8)]
    for _ in range(2):
        for row in rows:
            pair.ask([row])
    stats = pair.paged.stats()
    assert stats.fetched_bytes > 0
    assert pair.reused > 0
    evict(pair)
    pair.ask([rows[0]])


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_are_counted_as_they_are(name):
    model, plain = patched("llama", name), patched("llama", "auto")
    heads, dim, layers = 2, 16, 2
    record_bytes = {"int8": dim + 4, "fp8": dim + 4, "int4": dim // 2 + 4}[name]
    for each, token in ((model, 2 * heads * record_bytes * layers), (plain, 2 * heads * dim * 4 * layers)):
        each.generate(**prompts.single(), max_new_tokens=NEW, do_sample=False)
        stats = each.paged.stats()
        assert each.paged._pool.token_bytes == token
        assert stats.blocks_cached > 0
        assert stats.bytes_reserved % (token * BLOCK_SIZE) == 0
        assert 0 < stats.bytes_reserved <= (stats.blocks_cached + 4) * token * BLOCK_SIZE


def test_a_budget_holds_so_many_more_tokens():
    def most(name):
        model = patched("llama", name, max_memory={"cpu": 64 * 1024})
        model.generate(**prompts.single(), max_new_tokens=1, do_sample=False)
        return model.paged._pool.manager.budget.limit_bytes // model.paged._pool.token_bytes

    plain = most("auto")
    assert most("int8") / plain == pytest.approx(256 / 80, rel=0.02)
    assert most("int4") / plain == pytest.approx(256 / 48, rel=0.02)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_cache_that_is_handed_out_shows_what_is_stored_and_goes_on(name):
    inputs = prompts.single()
    model = patched("llama", name)
    given = {"max_new_tokens": 4, "do_sample": False}
    first = model.generate(**inputs, **given, return_dict_in_generate=True)
    keys = first.past_key_values.layers[0].keys
    assert keys.dtype == torch.float32
    assert keys.shape == (1, 2, 24, 16)
    twin = copy.deepcopy(first.past_key_values)
    for cache in (twin, first.past_key_values):
        rest = model.generate(first.sequences, past_key_values=cache, max_new_tokens=NEW - 4, do_sample=False)
        assert_answer(rest, "llama", name, inputs, do_sample=False)


def test_the_format_is_part_of_the_key():
    keys = {root_key(b"model", None, name) for name in (None, *FORMATS)}
    assert len(keys) == 1 + len(FORMATS)


def test_int4_is_refused_where_head_dims_are_no_multiples_of_16():
    """K of this family has a dim of 24."""
    model, inputs = copy_of(FAMILIES["qwen3"]), prompts.single()
    expected = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    message = "kv_cache_dtype='int4': head dims must be multiples of 16, but K has 24 and V 24"
    with pytest.raises(ValueError, match=message):
        patch_model(model, kv_cache_dtype="int4")
    assert type(model) is type(stock_model("qwen3"))
    patch_model(model, kv_cache_dtype="int8", verify=False)
    with pytest.raises(ValueError, match=message):
        patch_model(model, kv_cache_dtype="int4")
    assert model.paged.config.kv_cache_dtype == "int8"
    assert [each.name for each in formats_for(model)] == ["int8", "fp8"]
    patch_model(model, kv_cache_dtype="auto")
    assert torch.equal(model.generate(**inputs, max_new_tokens=NEW, do_sample=False), expected)


def test_plain_torch_on_a_gpu_is_counted(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr("hf_paged.backends.triton_obstacle", lambda device: None)
    assert plain_torch_reason("auto", gpu) is None
    monkeypatch.setattr("hf_paged.backends.triton_obstacle", lambda device: "a toaster")
    assert plain_torch_reason("reference", gpu) is None, "as it was asked for"
    assert plain_torch_reason("auto", torch.device("cpu")) is None
    reason = plain_torch_reason("auto", gpu)
    assert "a toaster" in reason

    model = patched("llama", "int8")
    monkeypatch.setattr("hf_paged.runtime.plain_torch_reason", lambda *_: reason)
    answer(model, prompts.ragged())
    assert model.paged.stats().fallbacks == {reason: 1}
