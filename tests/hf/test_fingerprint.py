"""The fingerprint that files carry: of the content, the same in every process."""

import copy

import torch
from identity_changes import (
    add_in_place,
    by_name,
    edit_config,
    generate,
    llama,
    load_weights,
    other_attention,
    other_frequencies_through_data,
    to_bfloat16,
)

from hf_paged.identity import ModelIdentity, encodable, fingerprint


def test_fingerprint_is_of_the_content(tmp_path):
    model = llama()
    before = fingerprint(model)
    assert fingerprint(copy.deepcopy(model)) == before
    model.save_pretrained(tmp_path)
    assert fingerprint(type(model).from_pretrained(tmp_path, dtype=torch.float32)) == before
    assert fingerprint(type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)) != before
    generate(model)
    assert fingerprint(model) == before


def test_fingerprint_of_a_patched_model():
    from hf_paged import paged

    model = llama()
    before = fingerprint(model)
    with paged(model):
        assert fingerprint(model) == before


def test_fingerprint_is_the_same_in_whatever_order_attributes_were_set():
    model = llama()
    before = fingerprint(model)
    for module in model.modules():
        for name, value in reversed(list(vars(module).items())):
            del vars(module)[name]
            vars(module)[name] = value
    assert fingerprint(model) == before


def test_sets_are_told_in_an_order_of_their_own():
    """Their own one differs from process to process."""
    assert encodable({"norm", "bias", "gate", "lm_head"}) == ["bias", "gate", "lm_head", "norm"]
    model = llama()
    model.config.kept_apart = {"norm", "bias"}
    before = fingerprint(model)
    model.config.kept_apart = {"norm", "gate"}
    assert fingerprint(model) != before


@by_name(
    "change", [add_in_place, other_frequencies_through_data, to_bfloat16, edit_config, other_attention, load_weights]
)
def test_fingerprint_sees(change):
    model = llama()
    before = fingerprint(model)
    change(model)
    assert fingerprint(model) != before


def test_fingerprint_sees_a_single_element_that_no_sample_does():
    model = llama()
    identity = ModelIdentity(model)
    digest, content = identity.digest(), fingerprint(model)
    model.model.embed_tokens.weight.data[0, 1] += 1
    assert fingerprint(model) != content
    assert identity.digest() == digest, "the limit that the docstring tells of"
    other = llama()
    other.model.embed_tokens.weight.data[0, 2] += 1
    assert fingerprint(other) != fingerprint(model)
