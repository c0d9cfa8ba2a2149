"""Functions of a modeling file that somebody replaces between two calls: what was computed before is stale."""

import pytest
import torch
from families import FAMILIES
from pair import REUSED, ROWS, Pair
from torch import nn
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral

from hf_paged.called import CalledFunctions

FILES = {"llama": modeling_llama, "gemma2": modeling_gemma2}


def other_rotation(original):
    """In place of `apply_rotary_pos_emb`."""

    def rotated(q, k, cos, sin, *args, **kwargs):
        q, k = original(q, k, cos, sin, *args, **kwargs)
        return q * 1.5, k

    return rotated


def other_half(original):
    """In place of `rotate_half`, which the former calls."""
    return lambda x: -original(x)


CHANGES = {"apply_rotary_pos_emb": other_rotation, "rotate_half": other_half}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("family", FILES)
def test_prefixes_of_before_are_not_reused(family, name, reader, monkeypatch):
    pair, file = Pair(family), FILES[family]
    before = pair.ask(ROWS)
    pair.ask(ROWS)
    assert pair.reused == REUSED
    original = getattr(file, name)
    for function in (CHANGES[name](original), original):
        monkeypatch.setattr(file, name, function)
        after = pair.ask(ROWS)
        assert torch.equal(after, before) == (function is original), "the change must matter"
        assert pair.reused == 0
        pair.ask(ROWS)
        assert pair.reused == REUSED


def test_files_of_other_models_do_not_matter(reader, monkeypatch):
    pair = Pair("llama")
    pair.ask(ROWS)
    monkeypatch.setattr(modeling_mistral, "apply_rotary_pos_emb", None)
    pair.ask(ROWS)
    assert pair.reused == REUSED


def test_what_is_seen():
    def kinds(family):
        return dict.fromkeys(map(type, FAMILIES[family].build().modules()))

    names = {name for _, names in CalledFunctions(kinds("llama"))._names.values() for name in names}
    assert {"apply_rotary_pos_emb", "rotate_half", "create_causal_mask", "eager_attention_forward"} <= names
    assert names <= vars(modeling_llama).keys(), "nothing of torch's own files"
    assert CalledFunctions([nn.Linear, nn.SiLU]).same()
