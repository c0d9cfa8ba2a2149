"""Models that run some of their layers more than once, each time on K and V of its own, or on the past of the last."""

import pytest
import torch
import zoo
from pair import Pair
from prompts import batch, tokens
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from versions import skip_if_older

from hf_paged import PagedCache
from hf_paged.cli import main
from hf_paged.compat import CACHE_NAME
from hf_paged.footprint import footprint_of

ROWS = [tokens(30, seed=1), tokens(11, seed=2)]
CALLS = {
    "greedy": {},
    "long": {"max_new_tokens": 30},
    "beams": {"num_beams": 3},
    "samples": {"do_sample": True, "num_return_sequences": 2},
    "lookup": {"prompt_lookup_num_tokens": 3},
}


def dory(**changes) -> torch.nn.Module:
    if "dory" not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        skip_if_older("this version of transformers does not have it")
    return zoo.build("dory", **changes)


@pytest.mark.parametrize("mode", CALLS)
@pytest.mark.parametrize("window", [8, 24])
def test_a_model_that_reads_the_past_before_it_adds_to_it(window, mode):
    """Its first loops see what the last one has left there, and write nothing."""
    pair = Pair.of(dory(recurrent_kv_cache_mode="last_loop", sliding_window=window))
    pair.ask([tokens(6) * 4] if mode == "lookup" else ROWS, **CALLS[mode])
    assert pair.computed > 0, "not left to stock"


@pytest.mark.parametrize("mode", CALLS)
@pytest.mark.parametrize("model_type", ["dory", "inkling2_loop_text"])
def test_a_model_that_adds_layers_to_its_cache_is_left_to_stock(model_type, mode):
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        skip_if_older("this version of transformers does not have it")
    pair = Pair.of(zoo.build(model_type))
    pair.ask([tokens(6) * 4] if mode == "lookup" else ROWS, **CALLS[mode])
    (reason,) = pair.paged.stats().fallbacks
    assert reason.startswith("stock generate: the model adds ")
    assert footprint_of(pair.model).added_layers in reason


@pytest.mark.parametrize("patched", [True, False], ids=["patched", "unpatched"])
def test_a_paged_cache_has_no_room_for_layers_that_are_added(patched):
    pair = Pair.of(dory())
    model = pair.model if patched else pair.stock
    with pytest.raises(ValueError, match=f"a layer of {CACHE_NAME} is to be copied"):
        model.generate(**batch(ROWS), max_new_tokens=4, do_sample=False, **{CACHE_NAME: PagedCache(model.config)})


def test_there_is_nothing_to_plan_where_layers_are_added(tmp_path, capsys):
    config = dory().config
    config.architectures = ["DoryForCausalLM"]
    config.save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        main(["plan", str(tmp_path), "--max-memory", "cpu=1GiB"])
    assert "the model adds 2 layers to its cache; there is nothing to plan" in capsys.readouterr().err
