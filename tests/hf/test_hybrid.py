"""Models whose layers keep a convolutional or recurrent state: attention in blocks, states as stock keeps them."""

import copy

import more_models
import prompts
import pytest
import torch
import transformers
from compare import copy_of
from families import FAMILIES
from pair import Pair
from versions import IS_PINNED

from hf_paged import PagedCache, stepwise

NEW = 14  # beyond the first steps, which are padded until a step was tried


def trials(pair: Pair) -> list[str | None]:
    """What came out of the trials of decode steps."""
    return list(pair.paged._stepwise._trials.values())


@pytest.mark.parametrize("name", more_models.HYBRIDS)
def test_same_as_stock(name):
    pair = Pair.of(more_models.build(name))
    more_models.assert_varied(pair.ask(prompts.ragged(), max_new_tokens=NEW), NEW)
    pair.ask(prompts.ragged(), max_new_tokens=NEW, num_beams=3)
    pair.ask(prompts.single(), max_new_tokens=NEW, do_sample=True, num_return_sequences=3)
    is_stocks = name == "recurrent_gemma" and not IS_PINNED  # older versions are left to stock
    assert is_stocks or "layers that keep a state" in pair.paged.stats().fallbacks


@pytest.mark.parametrize("name", ["lfm2", "qwen3_next"])
def test_decode_steps_read_the_blocks_once_that_was_tried(name):
    pair = Pair(name)
    pair.ask(prompts.single(), max_new_tokens=NEW)
    assert trials(pair) == [None]


def test_a_decode_step_that_would_differ_stays_padded(monkeypatch):
    """The trial compares logits: where the fast path is wrong, it is not taken."""
    pair = Pair("lfm2")
    right = stepwise.try_decode.__globals__["run_decode"]

    def wrong(*args):
        outputs = right(*args)
        outputs.logits = outputs.logits * 1.01
        return outputs

    monkeypatch.setitem(stepwise.try_decode.__globals__, "run_decode", wrong)
    monkeypatch.setattr(stepwise, "run_decode", wrong)
    pair.ask(prompts.ragged(), max_new_tokens=NEW)
    assert "decoded logits differ from stock" in trials(pair)[0]


def test_a_model_that_keeps_states_in_its_modules_is_not_tried():
    """One decode step more would move such a state on."""
    pair = Pair("lfm2")
    model = pair.model

    def count(module, args, kwargs):
        module.steps = getattr(module, "steps", torch.zeros(1)) + 1

    model.model.register_forward_pre_hook(count, with_kwargs=True)
    pair.ask(prompts.single(), max_new_tokens=NEW)
    assert trials(pair) == ["modules that keep a state of their own"]
    assert int(model.model.steps) == NEW


def test_memory_is_that_of_the_attention_layers():
    pair = Pair("lfm2")  # one attention layer of three: 2 KV heads of dim 16, in float32
    output = pair.model.generate(**prompts.single(), max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
    blocks = -(-(21 + 11) // 8)
    assert pair.paged.stats().blocks_in_use == blocks
    assert pair.paged.stats().bytes_in_use == blocks * 8 * (2 * 2 * 16 * 4)
    assert [layer.keys is not None for layer in output.past_key_values.paged_layers] == [True]
    del output
    pair.check()


@pytest.mark.parametrize("kwargs", [{"num_beams": 4}, {"do_sample": True, "num_return_sequences": 4}])
def test_the_prompt_is_stored_once_for_beams_and_samples(kwargs):
    """40 tokens in 5 blocks, 13 more in at most 3 blocks a row: 4 rows on stock hold 4 × 7 of them."""
    pair = Pair("lfm2")
    inputs = prompts.batch([prompts.tokens(40)])
    torch.manual_seed(7)
    output = pair.model.generate(**inputs, max_new_tokens=NEW, return_dict_in_generate=True, **kwargs)
    assert pair.paged.stats().blocks_in_use <= 5 + 4 * 3
    del output
    pair.ask(inputs, max_new_tokens=NEW, **kwargs)


def test_rows_that_differ_share_nothing():
    pair = Pair("lfm2")
    row = prompts.tokens(24)
    inputs = prompts.batch([row, [*row[:-1], row[-1] + 1], row])
    output = pair.model.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True)
    first, other, same = (table.chains[0].blocks for table in output.past_key_values.tables)
    assert same == first
    assert not set(other) & set(first)


def test_an_error_gives_everything_back():
    class Stop(transformers.generation.streamers.BaseStreamer):
        def put(self, value):
            self.puts = getattr(self, "puts", 0) + 1
            if self.puts == 5:
                raise KeyboardInterrupt

        def end(self):
            pass

    pair = Pair("qwen3_next")
    with pytest.raises(KeyboardInterrupt):
        pair.model.generate(**prompts.single(), max_new_tokens=NEW, streamer=Stop())
    pair.check()
    pair.ask(prompts.ragged(), max_new_tokens=NEW)


def test_a_failed_pass_forgets_what_it_moved_on():
    """States cannot go back: after an error in the middle of a pass the cache is empty, not half a step ahead."""
    pair = Pair("lfm2")
    output = pair.model.generate(**prompts.single(), max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    cache = output.past_key_values
    handle = pair.model.lm_head.register_forward_pre_hook(lambda *args: (_ for _ in ()).throw(RuntimeError("no")))
    with pytest.raises(RuntimeError, match="no"), torch.no_grad():
        pair.model(output.sequences[:, -1:], past_key_values=cache)
    handle.remove()
    assert cache.get_seq_length() == 0
    assert not cache.tables


@pytest.mark.parametrize("name", ["falcon_h1", "zamba2"])
@torch.no_grad()
def test_paged_cache_on_an_unpatched_model(name):
    """Layers with both a state and K and V; a copy goes on by itself, reordered rows go on as each other."""
    model = more_models.build(name)
    ids = torch.tensor([prompts.tokens(13, seed) for seed in (1, 2)])
    steps = {}
    for cache in (transformers.DynamicCache(config=model.config), PagedCache(model.config, block_size=8)):
        logits = [model(ids[:, :9], past_key_values=cache).logits]
        logits += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(9, 11)]
        twin = copy.deepcopy(cache)
        logits.append(model(ids[:, 11:12], past_key_values=cache).logits)
        cache.reorder_cache(torch.tensor([1, 1]))
        logits.append(model(ids[:, 12:], past_key_values=cache).logits)
        logits.append(model(ids[:, 12:], past_key_values=twin).logits)
        steps[type(cache)] = torch.cat(logits, dim=1)
    torch.testing.assert_close(steps[PagedCache], steps[transformers.DynamicCache], atol=1e-4, rtol=1e-4)


def test_saving_prefixes_is_refused():
    pair = Pair("lfm2")
    pair.ask(prompts.single())
    with pytest.raises(ValueError, match="not written to files: layers that keep a state"):
        pair.paged.save("never written")


def test_a_model_without_attention_stays_on_stock():
    """Mamba has no K and V at all."""
    pair = Pair.of(copy_of(FAMILIES["mamba"]))
    pair.ask(prompts.single())
    assert pair.paged.stats().fallbacks == {"stock generate: model keeps a cache of its own": 1}
