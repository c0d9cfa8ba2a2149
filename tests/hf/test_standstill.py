"""Looks that need no walk of the model: when there are any, and that none is right by chance of an address."""

import copy
import gc
import sys
import weakref

import pytest
from families import FAMILIES, stock_model
from identity_changes import CHANGES, INVISIBLE, attention, by_name, generate, llama, weight
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from hf_paged import paged
from hf_paged.identity import ModelIdentity
from hf_paged.standstill import Standstill
from hf_paged.weights import Tree

pytestmark = pytest.mark.usefixtures("native_library")


@pytest.fixture
def walks(monkeypatch) -> list[type]:
    """The classes of the models that identities have walked, one for each time."""
    walked = []

    class Counted(Tree):
        @classmethod
        def of(cls, model):
            walked.append(type(model))
            return Tree.of(model)

    monkeypatch.setattr("hf_paged.identity.Tree", Counted)
    return walked


def looked_at(model) -> tuple[ModelIdentity, bytes]:
    identity = ModelIdentity(model)
    return identity, identity.digest()


@by_name("ask", [ModelIdentity.look, ModelIdentity.digest])
def test_one_walk_at_first_and_none_later(ask, walks):
    identity = ModelIdentity(model := llama())
    ask(identity)
    ask(identity)
    assert identity.holds(identity.digest())
    assert walks == [type(model)]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_walk_where_calls_follow_one_another(family, walks):
    with paged(copy.deepcopy(stock_model(family))) as model:
        for _ in range(3):
            generate(model)
        walked = len(walks)
        for _ in range(3):
            generate(model)
        assert len(walks) == walked


@by_name("change", [change for change in CHANGES if change not in INVISIBLE])
def test_change_takes_a_walk(change, walks):
    model = llama()
    identity, digest = looked_at(model)
    walks.clear()
    change(model)
    assert identity.digest() != digest
    assert len(walks) == 1


# Addresses that others have taken over


def test_names_and_numbers_stay_alive():
    """Else the next one may come to lie where they did, and be taken for them."""
    model = llama()
    own, name, number = vars(attention(model)), "".join(["some", "thing"]), float("0.3")
    own[name] = number
    before = sys.getrefcount(name), sys.getrefcount(number)
    standstill = Standstill(Tree.of(model))
    own.pop(name)
    assert (sys.getrefcount(name), sys.getrefcount(number)) == before
    assert not standstill.holds(model)


def test_none_with_hooks():
    """A hook that is removed leaves its place in memory to the next, and so does its number."""
    model = llama()
    handle = attention(model).register_forward_pre_hook(lambda *args: None)
    with pytest.raises(ValueError, match="hook"):
        Standstill(Tree.of(model))
    handle.remove()
    attention(model).register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="hook"):
        Standstill(Tree.of(model))


def test_parameter_at_the_address_of_another():
    model = llama()
    identity, digest = looked_at(model)
    own = attention(model).k_proj._parameters
    data, address = weight(model).data, id(weight(model))
    own["weight"] = None
    gc.collect()
    taken = [nn.Parameter(data) for _ in range(100)]
    own["weight"] = next((each for each in taken if id(each) == address), taken[0])
    assert identity.digest() != digest


def test_class_whose_forward_is_another():
    model = llama()
    kind = type("Own", (nn.Identity,), {"forward": lambda self, x: x})
    model.model.norm.extra = kind()
    identity, digest = looked_at(model)
    kind.forward = lambda self, x: x + 1
    assert identity.digest() != digest


def test_kinds_of_rope_by_layer_type():
    model = llama()
    model.model.rotary_emb.rope_type = {"full_attention": "default"}
    identity = ModelIdentity(model)
    assert identity.look()[1] is None
    model.model.rotary_emb.rope_type["full_attention"] = "dynamic"
    assert "rotary" in identity.look()[1]


def test_global_hooks():
    identity = ModelIdentity(model := llama())
    assert identity.look()[1] is None
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert "global" in identity.look()[1]
    finally:
        handle.remove()
    assert identity.look()[1] is None
    assert model is not None


# What addresses do not tell


def test_weights_inside_others_take_a_walk(walks):
    model = llama()
    attention(model).k_proj.weight = nn.Parameter(TwoTensor(weight(model).data, weight(model).data + 1))
    identity, digest = looked_at(model)
    walks.clear()
    assert identity.digest() == digest
    weight(model).a, weight(model).b = weight(model).b, weight(model).a
    assert identity.digest() != digest
    assert len(walks) == 2


def test_a_restless_model_is_walked_without_more(walks, monkeypatch):
    model, made = llama(), []
    init = Standstill.__init__
    monkeypatch.setattr(Standstill, "__init__", lambda self, tree: made.append(self) or init(self, tree))
    identity, digest = looked_at(model)
    for seen in [[step] for step in range(10)]:
        attention(model).seen = seen
        assert identity.digest() == digest
    assert len(walks) == 11
    assert len(made) == 4, "one of the first look, and three tries"
    weight(model).data = weight(model).data.clone()
    after = identity.digest()
    assert after != digest
    walks.clear()
    assert identity.digest() == after
    assert not walks


def test_a_model_that_rests_in_between_is_not_restless(walks):
    """An attribute that is set costs one walk, however often in the life of a model."""
    model = llama()
    identity, digest = looked_at(model)
    for seen in [[step] for step in range(10)]:
        attention(model).seen = seen
        assert identity.digest() == digest
        walks.clear()
        assert identity.digest() == digest
        assert not walks


def test_an_obstacle_is_met_again(walks):
    model = llama()
    attention(model).train()
    identity, digest = looked_at(model)
    for _ in range(3):
        assert "training" in identity.look()[1]
        assert not identity.holds(digest)


def test_looks_in_training_do_not_make_it_restless(walks):
    model = llama()
    identity, digest = looked_at(model)
    attention(model).train()
    for _ in range(10):
        assert identity.look()[1] is not None
    attention(model).eval()
    assert identity.digest() == digest
    walks.clear()
    assert identity.digest() == digest
    assert not walks


def test_holds_none_of_the_model():
    model = llama()
    identity, _ = looked_at(model)
    gone = []
    for each in (attention(model), weight(model), model.model.rotary_emb):
        weakref.finalize(each, gone.append, None)
    del model, each
    gc.collect()
    assert len(gone) == 3
    assert identity is not None
