"""Models of many kinds in the usual modes. `make capabilities` walks over all that transformers has; these have each
shown, or could show, something that others do not."""

import copy

import prompts
import pytest
import torch
import walk
import zoo
from families import FAMILIES
from pair import Pair
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from versions import IS_PINNED, skip_if_older

from hf_paged import patch_model, probe

# How prompts are computed, those of a batch that comes again, and those of a chat; where these are not all the same.
WAYS = {
    "fast": ("fast", "reused", "reused"),
    "padded, reused": ("padded", "padded, reused", "padded, reused"),
    "padded, a chat reused": ("padded", "padded", "padded, reused"),
}
# Model type, how its prompts are computed, and what is special about it.
KINDS = [
    ("camembert", "fast", "positions begin behind the padding id"),
    ("cohere2", "fast", "windows, no rotary embedding in full layers"),
    ("ctrl", "fast", "sinusoids instead of a rotary embedding"),
    ("deepseek_v2", "fast", "keeps latents, from which K and V are computed after the cache"),
    ("ernie4_5_moe", "fast", "experts in every other layer"),
    ("exaone4", "fast", "norms after attention"),
    ("gemma3n_text", "fast", "layers that read the K and V of another"),
    ("gemma4_text", "fast", "the same, with other head dims in full layers"),
    ("gpt_bigcode", "fast", "one KV head, projected together"),
    ("longcat_flash", "fast", "latents that are scaled, two attentions in each layer"),
    ("minicpm3", "fast", "latents, and embeddings that are scaled"),
    ("modernbert-decoder", "fast", "windows on both sides in its encoder form"),
    ("qwen3_moe", "fast", "experts in all layers"),
    ("cpmant", "stock", "puts a prompt of its own before every prompt"),
    ("dory", "stock", "runs layers more than once, and adds copies of them to its cache"),
    ("inkling2_loop_text", "stock", "the same, in a model with states"),
    ("deepseek_v32", "stock", "looks at the name of its attention to mask what an indexer leaves out"),
    ("minimax_m3_vl_text", "stock", "the same, by blocks"),
    ("gpt_neo", "padded, reused", "attention of its own with a local mask"),
    ("gpt_neox_japanese", "padded, reused", "attention of its own, which takes K and V to be contiguous"),
    ("llama4_text", "padded", "chunks, and queries scaled by positions that it counts itself"),
    ("mpt", "padded, reused", "ALiBi"),
    ("xlm", "padded", "is given all tokens in each step, and leaves out those that it has seen"),
    ("lfm2", "padded, a chat reused", "short convolutions in most layers"),
    ("qwen3_5_text", "padded, a chat reused", "a recurrent state in most layers"),
    ("zaya", "padded, a chat reused", "a state and K and V in each layer"),
    ("zamba", "padded", "a scan that begins anew with several tokens"),
    ("moshi", "padded", "a window, and other masks for a prompt in pieces beyond it"),
    ("phimoe", "padded", "a window that its attention is not told of"),
]


@pytest.mark.parametrize(("model_type", "way", "special"), KINDS, ids=[kind[0] for kind in KINDS])
def test_right_and_as_fast_as_expected(model_type, way, special):
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        skip_if_older("this version of transformers does not have it")
    cells = walk.walk_type(model_type, new_tokens=5)
    if isinstance(cells, str):
        skip_if_older(f"not built by this version: {cells}")
    assert not isinstance(cells, str), cells
    assert [cell for cell in cells if cell.wrong] == [], special
    if IS_PINNED:  # older versions call attention differently
        once, again, chat = WAYS.get(way, (way, way, way))
        expected = dict.fromkeys(walk.MODES, once) | dict(zip(walk.AGAIN, (again, chat), strict=True))
        assert {cell.mode: cell.way for cell in cells} == expected, special


def test_what_is_built_differs_with_the_past():
    """The walk can fail: a cache that forgets a token early in the prompt shows in every kind."""
    stock = zoo.build("cohere2")
    ids = torch.tensor([prompts.tokens(40)])
    changed = ids.clone()
    changed[0, 25] = (ids[0, 25] + 20) % 100 + 3
    with torch.no_grad():
        moved = (stock(ids).logits[0, -1] - stock(changed).logits[0, -1]).abs().max()
    assert moved > 1e-2


# Layers that share K and V


@pytest.mark.parametrize("model_type", ["gemma3n_text", "gemma4_text"])
def test_shared_kv_is_stored_once(model_type):
    """By bytes: half of the four layers read what the others have stored, and cost nothing."""
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        skip_if_older("this version of transformers does not have it")
    stock = zoo.build(model_type)
    layers = walk.patch_model(copy.deepcopy(stock), block_size=8)
    held = {}

    class Look:
        def put(self, value):
            held["bytes"] = layers.paged.stats().bytes_in_use

        def end(self):
            pass

    layers.generate(**prompts.single(), max_new_tokens=4, do_sample=False, streamer=Look())
    stores = layers.paged._pool.stores
    blocks = -(-(21 + 3) // 8)
    assert len(stores) == 2
    assert held["bytes"] == blocks * 8 * sum(2 * store.keys.shape[0] * store.keys.shape[2] * 4 for store in stores)


# What only shows in long sequences: the trial of a model looks at 13 tokens


def longrope(original_length: int = 20) -> dict:
    """Rotary embedding with other frequencies once any position of a pass is beyond `original_length`."""
    return {
        "max_position_embeddings": 256,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
            "original_max_position_embeddings": original_length,
            "factor": 4.0,
        },
    }


def longrope_pair(**overrides) -> Pair:
    """Stock and patched llamas with such an embedding."""
    pair = Pair()
    pair.stock = FAMILIES["llama"].build(**longrope())
    pair.model = patch_model(copy.deepcopy(pair.stock), block_size=8, **overrides)
    return pair


ROWS = [prompts.tokens(30, seed=1), prompts.tokens(9, seed=2), prompts.tokens(26, seed=3)]


def test_frequencies_that_depend_on_the_longest_row_see_the_whole_prompt(monkeypatch):
    """In pieces, the short rows would be computed with the frequencies of short sequences."""
    longrope_pair().ask(ROWS)
    monkeypatch.setattr("hf_paged.packed.PACKED_CHUNK_TOKENS", 16)
    pair = longrope_pair()
    pair.ask(ROWS)
    assert any("does not go in one piece" in reason for reason in pair.paged.stats().fallbacks)


def test_frequencies_that_depend_on_the_longest_row_still_do_when_it_has_ended():
    pair = longrope_pair()
    rows = [ROWS[0], ROWS[1], prompts.tokens(6, seed=4)]
    free = pair.stock.generate(**prompts.batch(rows), do_sample=False, max_new_tokens=8)
    # The longest row ends soon; the others, which do not, stay below 20 tokens.
    ends = next(int(token) for token in free[0, 30:34] if token not in free[1:, 30:])
    pair.ask(rows, eos_token_id=ends, max_new_tokens=8)


def test_windows_do_not_cut_a_prompt_whose_frequencies_depend_on_its_length(monkeypatch):
    monkeypatch.setattr("hf_paged.packed.WINDOW_STRETCH_TOKENS", 8)
    family = FAMILIES["mistral_sliding"]
    pair = Pair("mistral_sliding")
    pair.stock = family.build(**{**longrope(), "sliding_window": 24})
    pair.model = patch_model(copy.deepcopy(pair.stock), block_size=8)
    pair.ask(ROWS)
    assert not any("in one piece" in reason or "packed" in reason for reason in pair.paged.stats().fallbacks)


def test_positions_that_a_model_counts_itself_are_noticed():
    """llama4 scales queries by one step every 8,192 tokens (here 24), which no short trial shows."""
    if "llama4_text" not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        skip_if_older("this version of transformers does not have it")
    short = {"attention_chunk_size": 200, "layer_types": ["full_attention"] * 4}
    for tuned, reasons in ((True, {"positions that the model counts itself": 1}), (False, {})):
        stock = zoo.build("llama4_text", attn_temperature_tuning=tuned, floor_scale=24, **short)
        model = patch_model(copy.deepcopy(stock), block_size=8)
        inputs = prompts.shared_prefix()
        expected = stock.generate(**inputs, do_sample=False, max_new_tokens=6)
        assert torch.equal(model.generate(**inputs, do_sample=False, max_new_tokens=6), expected), tuned
        assert model.paged.stats().fallbacks == reasons


def test_a_window_that_only_the_attention_call_knows_limits_the_fast_path(monkeypatch):
    """Stock's own attention looks at the mask alone, so such a call attends to everything."""
    from transformers.models.llama import modeling_llama

    forward = modeling_llama.LlamaAttention.forward
    monkeypatch.setattr(
        modeling_llama.LlamaAttention,
        "forward",
        lambda self, *args, **kwargs: forward(self, *args, **kwargs, sliding_window=16),
    )
    pair = Pair()
    pair.ask([prompts.tokens(12)], max_new_tokens=4)
    assert pair.paged.stats().fallbacks == {}
    pair.ask([prompts.tokens(20)])
    assert pair.paged.stats().fallbacks == {"sliding window that attention is not told of": 1}


def test_the_trial_is_shorter_than_what_these_tests_look_at():
    assert max(probe._ROW_TOKENS) + 1 < 16 < zoo.WINDOW


@pytest.mark.parametrize(("model_type", "copies"), [("bloom", False), ("llama", False), ("gpt_neox_japanese", True)])
def test_padded_passes_copy_k_and_v_only_where_the_model_needs_it(model_type, copies):
    """gpt_neox_japanese calls `view` on them, which needs them without gaps; nobody else is to pay for that."""
    model = patch_model(zoo.build(model_type), block_size=8)
    asked = {"do_sample": False, "max_new_tokens": 3, "return_dict_in_generate": True}
    out = model.generate(**prompts.right_padded(), **asked)
    assert out.past_key_values.copies_dense is copies
