"""The native look at a tree of modules: whatever stands elsewhere or under another name is noticed, nothing else is."""

import collections
import sys

import pytest
import torch
from torch import nn

from hf_paged_kernels import ModuleEntries

pytestmark = pytest.mark.usefixtures("native_library")


class Scaled(nn.Module):
    """A module with attributes of its own, and submodules three levels deep."""

    def __init__(self):
        super().__init__()
        self.scale, self.names = 0.5, ["a"]
        self.first, self.second = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4, bias=False), nn.LayerNorm(4))
        self.nothing = None
        self.register_module("missing", None)
        self.register_buffer("table", torch.zeros(3))

    def forward(self, x):
        return self.second(self.first(x)) * self.scale + self.table.sum()


class Other(Scaled):
    """The same with another class."""


def deepest(model: Scaled) -> nn.Module:
    return model.second[1]


def delete_and_add(model):
    del model.nothing
    model.another = None


def swap_submodules(model):
    model.first, model.second[0] = model.second[0], model.first


def move_to_end(model):
    model._modules["first"] = model._modules.pop("first")


def from_one_dict_to_the_next(model):
    model._buffers["weight"] = model.first._parameters.pop("weight")


def wrap_forward(model):
    model.first.forward = model.first.forward


def replace_dict_by_one_with_more(model):
    model._buffers = {**model._buffers, "more": None}


CHANGES = {
    "attribute": lambda model: setattr(model, "scale", 0.25),
    "attribute_of_the_deepest": lambda model: setattr(deepest(model), "eps", 1e-3),
    "new_attribute": lambda model: setattr(deepest(model), "later", None),
    "deleted_attribute": lambda model: delattr(model, "nothing"),
    "another_name": delete_and_add,
    "training": lambda model: deepest(model).train(),
    "class": lambda model: setattr(model, "__class__", Other),
    "submodule": lambda model: setattr(model, "first", nn.Linear(4, 4)),
    "submodule_for_none": lambda model: setattr(model, "missing", nn.Linear(4, 4)),
    "none_for_submodule": lambda model: setattr(model, "first", None),
    "one_more_submodule": lambda model: model.second.append(nn.Identity()),
    "swapped_submodules": swap_submodules,
    "order_of_submodules": move_to_end,
    "parameter": lambda model: setattr(model.first, "weight", nn.Parameter(torch.zeros(4, 4))),
    "no_parameter": lambda model: setattr(deepest(model), "bias", None),
    "buffer": lambda model: setattr(model, "table", torch.zeros(3)),
    "new_buffer": lambda model: deepest(model).register_buffer("more", None),
    "parameter_among_buffers": from_one_dict_to_the_next,
    "hook": lambda model: deepest(model).register_forward_hook(print),
    "pre_hook": lambda model: deepest(model).register_forward_pre_hook(print),
    "forward": wrap_forward,
    "dict": replace_dict_by_one_with_more,
}


@pytest.mark.parametrize("name", CHANGES)
def test_change_is_noticed(name):
    model = Scaled().eval()
    entries = ModuleEntries(model, len(list(model.modules())) + 1)
    assert entries.same(model)
    CHANGES[name](model)
    assert not entries.same(model)
    assert not entries.same(model), "a look that finds a change leaves what is kept as it is"


def test_what_is_in_the_objects_is_not_looked_at():
    model = Scaled().eval()
    entries = ModuleEntries(model, len(list(model.modules())))
    model.table += 1
    model.names.append("b")
    model(torch.ones(1, 4)).sum().backward()
    model.zero_grad()
    assert entries.same(model)


def test_another_model_is_another():
    model, other = Scaled().eval(), Scaled().eval()
    entries = ModuleEntries(model, len(list(model.modules())))
    assert not entries.same(other)
    assert entries.same(model)


def test_a_change_undone_is_none():
    model = Scaled().eval()
    entries, first = ModuleEntries(model, len(list(model.modules()))), model.first
    model.first = nn.Linear(4, 4)
    assert not entries.same(model)
    model.first = first
    assert entries.same(model)


def test_a_module_under_two_names_counts_twice():
    model = nn.Sequential(nn.Linear(2, 2))
    model.append(model[0])
    with pytest.raises(ValueError, match="not made as modules are"):
        ModuleEntries(model, 2)
    entries = ModuleEntries(model, 3)
    model[0].extra = 1
    assert not entries.same(model)


def within_itself(model):
    model._modules["whole"] = model


def without_dict(model):
    model._modules["first"] = object()


def not_a_module(model):
    model._modules["first"] = collections.UserDict()


def other_kind_of_dict(model):
    model.first._parameters = collections.defaultdict(None, model.first._parameters)


def no_dict(model):
    del model.first.__dict__["_buffers"]


@pytest.mark.parametrize(
    "spoil", [within_itself, without_dict, not_a_module, other_kind_of_dict, no_dict], ids=lambda spoil: spoil.__name__
)
def test_what_is_not_made_as_modules_are(spoil):
    model = Scaled().eval()
    count = len(list(model.modules())) + 1
    entries = ModuleEntries(model, count)
    spoil(model)
    assert not entries.same(model)
    with pytest.raises(ValueError, match="not made as modules are"):
        ModuleEntries(model, count)


def test_holds_nothing_and_counts_no_reference():
    model = Scaled().eval()
    objects = [model, *model.modules(), *model.parameters(), Scaled, model.__dict__, model._modules, model._parameters]
    counts = list(map(sys.getrefcount, objects))
    entries = ModuleEntries(model, len(list(model.modules())))
    for _ in range(100):
        assert entries.same(model)
    assert list(map(sys.getrefcount, objects)) == counts
