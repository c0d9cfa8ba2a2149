"""What a call asks of a model's identity: obstacles to reuse, and looks at its begin and end."""

import gc

import pytest
from identity_changes import (
    LLAMA,
    add_a_bias,
    add_in_place,
    add_to_data,
    attention,
    by_name,
    edit_config,
    llama,
    other_data,
    other_parameter,
)
from torch import nn

from hf_paged.identity import ModelIdentity

pytestmark = pytest.mark.usefixtures("reader")


# Obstacles


def hook_a_module(model):
    return attention(model).register_forward_hook(lambda *args: None)


def hook_before_a_module(model):
    return attention(model).register_forward_pre_hook(lambda *args: None)


def hook_every_module(model):
    return nn.modules.module.register_module_forward_hook(lambda *args: None)


def hook_before_every_module(model):
    return nn.modules.module.register_module_forward_pre_hook(lambda *args: None)


@by_name("hook", [hook_a_module, hook_before_a_module, hook_every_module, hook_before_every_module])
def test_forward_hooks_are_an_obstacle(hook):
    model = llama()
    identity = ModelIdentity(model)
    handle = hook(model)
    try:
        assert "hook" in identity.obstacle()
    finally:
        handle.remove()
    assert identity.obstacle() is None


def test_training_mode_of_any_module_is_an_obstacle():
    model = llama()
    identity = ModelIdentity(model)
    attention(model).train()
    assert "training" in identity.obstacle()
    model.eval()
    assert identity.obstacle() is None


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {
            "rope_type": "longrope",
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
            "factor": 2.0,
            "original_max_position_embeddings": 16,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_frequencies_that_depend_on_the_length_are_an_obstacle(rope):
    identity = ModelIdentity(model := LLAMA.build(rope_parameters={"rope_theta": 10000.0, **rope}))
    assert "rotary" in identity.obstacle()
    assert model.model.rotary_emb.rope_type == rope["rope_type"]


# One look for a call's begin, one for its end


def test_look_is_digest_and_obstacle():
    model = llama()
    identity = ModelIdentity(model)
    digest, obstacle = identity.look()
    assert obstacle is None
    assert digest == identity.digest()
    add_to_data(model)
    assert identity.look() == (identity.digest(), None) != (digest, None)
    attention(model).train()
    assert identity.look() == (None, identity.obstacle()) != (None, None)


def test_a_look_that_was_begun_is_a_look():
    model = llama()
    identity = ModelIdentity(model)
    assert identity.begin_look() is None, "there is nothing to compare with yet"
    digest = identity.digest()
    assert identity.look(identity.begin_look()) == (digest, None)
    add_to_data(model)
    begun = identity.begin_look()
    assert begun.differs(), "what is begun sees the edit, and not only the look that it is given to"
    after = identity.look(begun)
    assert after != (digest, None)
    assert identity.look(identity.begin_look()) == after


@by_name("change", [add_in_place, other_parameter, other_data, edit_config, add_a_bias])
def test_changes_between_the_begin_of_a_look_and_its_end(change):
    model = llama()
    identity = ModelIdentity(model)
    digest = identity.digest()
    begun = identity.begin_look()
    change(model)
    assert identity.look(begun) == (identity.digest(), None) != (digest, None)


def test_a_begun_look_compares_with_the_sample_that_holds_now():
    model = llama()
    identity = ModelIdentity(model)
    identity.digest()
    begun = identity.begin_look()
    add_to_data(model)
    digest = identity.digest()  # another thread's
    assert identity.look(begun) == (digest, None)
    add_to_data(model)
    assert identity.look(begun) != (digest, None)


def test_no_look_is_begun_with_tensors_that_are_gone():
    model = llama()
    identity = ModelIdentity(model)
    identity.digest()
    other_parameter(model)
    gc.collect()
    assert identity.begin_look() is None


def test_holds_until_a_change_or_an_obstacle():
    model = llama()
    identity = ModelIdentity(model)
    digest = identity.digest()
    assert identity.holds(digest)
    assert not identity.holds(b"of another thread")
    handle = hook_a_module(model)
    assert not identity.holds(digest)
    handle.remove()
    assert identity.holds(digest)
    add_in_place(model)
    assert not identity.holds(digest)
