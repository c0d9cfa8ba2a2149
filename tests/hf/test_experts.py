"""Experts of mixtures by the native kernel and oneDNN: the same as transformers' groups, and who must not notice."""

import copy
import gc
import pickle
import weakref
from types import SimpleNamespace

import pytest
import torch
from compare import copy_of
from families import FAMILIES
from pair import Pair
from prompts import tokens
from taken import TOLERANCE, WATCHERS, Recording, conv1d, faster_pass, layer
from tolerances import assert_close
from torch import nn
from torch.nn import functional
from transformers.integrations import moe
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from versions import skip_if_older

from hf_paged import experts, faster_layers, matmul, patch_model, unpatch_model

COUNT, FEATURES, HIDDEN, CHOSEN = 6, 24, 40, 2
ROWS = [tokens(40, seed=1), tokens(23, seed=2), tokens(31, seed=3)]


class Experts(nn.Module):
    """Of any kind that `use_experts_implementation` knows."""

    def __init__(self, config, has_bias=False, has_gate=True, is_transposed=False):
        super().__init__()
        up = ("gate_up_proj", 2 * HIDDEN, FEATURES) if has_gate else ("up_proj", HIDDEN, FEATURES)
        for name, outputs, inputs in (up, ("down_proj", FEATURES, HIDDEN)):
            shape = (COUNT, inputs, outputs) if is_transposed else (COUNT, outputs, inputs)
            setattr(self, name, nn.Parameter(torch.randn(shape) / inputs**0.5, requires_grad=False))
            if has_bias:
                setattr(self, f"{name}_bias", nn.Parameter(torch.randn(COUNT, outputs), requires_grad=False))
        self.num_experts, self.act_fn = COUNT, nn.SiLU()


def of_kind(implementation: str = "grouped_mm", **kind: bool) -> nn.Module:
    """Some, not yet taken."""

    class Made(Experts):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            return hidden_states + 1  # "eager"

    moe.use_experts_implementation(Made, **kind)
    return Made(SimpleNamespace(_experts_implementation=implementation), **kind)


def taken(one: nn.Module) -> nn.Module:
    """The same, taken, alone in its model."""
    faster_layers.take_layers(nn.Sequential(one))
    assert faster_layers.is_taken(one)
    return one


def routed(rows: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, which experts they have chosen, and how much each counts. Nobody has chosen the third."""
    chosen = torch.rand(rows, COUNT - 1).argsort(1)[:, :CHOSEN]
    return torch.randn(rows, FEATURES).to(dtype), chosen + (chosen >= 2), torch.rand(rows, CHOSEN).to(dtype)


def stocks(one: nn.Module, *args: torch.Tensor) -> torch.Tensor:
    """What transformers' way for groups makes of it."""
    return moe.grouped_mm_experts_forward(one, *args)


KINDS = {"gated": {}, "plain": {"has_gate": False}, "biased": {"has_bias": True}}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_same_as_groups(kind, rows, dtype, native_products):
    one = taken(of_kind(**KINDS[kind]).to(dtype))
    args = routed(rows, dtype)
    with torch.no_grad(), faster_pass():
        found = one(*args)
    assert_close(found, stocks(one, *args), f"{kind}, {rows} rows")
    assert sum(native_products) == 2 * CHOSEN * rows, "each row by each expert it has chosen, up and down"
    assert 0 not in native_products


def test_routers_may_weigh_in_float32(native_products):
    one, (states, index, weights) = taken(of_kind().bfloat16()), routed(3, torch.bfloat16)
    with torch.no_grad(), faster_pass():
        found = one(states, index, weights.float())
    assert_close(found, stocks(one, states, index, weights.float()), "float32 weights")
    assert native_products


def test_by_onednn(products):
    one, args = taken(of_kind()), routed(5)
    with torch.no_grad(), faster_pass():
        assert torch.allclose(one(*args), stocks(one, *args), atol=TOLERANCE)
    assert sum(products) == 2 * CHOSEN * 5


def test_experts_of_many_rows_are_multiplied_by_who_is_fastest(native_products, monkeypatch):
    monkeypatch.setitem(matmul.NATIVE_ROWS, torch.float32, (1, 3, 2**17))
    one, (states, _, weights) = taken(of_kind()), routed(8)
    index = torch.tensor([[0, 1]] * 3 + [[0, 4]] * 5)
    with torch.no_grad(), faster_pass():
        assert torch.allclose(one(states, index, weights), stocks(one, states, index, weights), atol=TOLERANCE)
    assert native_products == [3, 3], "the second expert's rows; eight and five are torch's"
    monkeypatch.setattr(experts, "_by_expert", None)
    with torch.no_grad(), faster_pass():
        args = states[3:], index[3:], weights[3:]
        assert torch.equal(one(*args), stocks(one, *args)), "nobody is faster"


def test_norms_behind_experts(multiplied):
    if "has_post_expert_norm" not in moe.use_experts_implementation.__kwdefaults__:
        skip_if_older("this transformers knows no norms behind experts, and its groups have none to compare with")
    one, args = of_kind(), routed(3)
    one.has_post_expert_norm, one.post_expert_norm = True, nn.LayerNorm(FEATURES)
    with torch.no_grad(), faster_pass():
        assert torch.allclose(taken(one)(*args), stocks(one, *args), atol=TOLERANCE)
    assert multiplied


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_models(name, native_products, monkeypatch):
    answers, counted = experts._answer, []
    monkeypatch.setattr(experts, "_answer", lambda *args: counted.append(len(args[1])) or answers(*args))
    pair = Pair(name)
    pair.ask(ROWS, max_new_tokens=12)
    assert {3, sum(map(len, ROWS))} <= set(counted), "a step of three rows, their prompts"
    pair.ask(ROWS, num_beams=3)


def _with(name: str, values: torch.Tensor) -> nn.Module:
    one = taken(of_kind(has_bias=True))
    setattr(one, name, nn.Parameter(values, requires_grad=False))
    return one


OTHERS = {
    "transposed": lambda: of_kind(is_transposed=True),
    "eager": lambda: taken(of_kind("eager")),
    "batched": lambda: taken(of_kind("batched_mm")),
    "strides": lambda: _with("down_proj", torch.randn(COUNT, HIDDEN, FEATURES).mT),
    "bias of another shape": lambda: _with("down_proj_bias", torch.randn(COUNT, 1)),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_others_are_left_to_transformers(kind, multiplied):
    one, args = OTHERS[kind](), routed(3)
    faster_layers.take_layers(nn.Sequential(one))
    with torch.no_grad():
        expected = one(*args)
        with faster_pass():
            assert torch.equal(one(*args), expected)
    assert not multiplied


def test_experts_with_a_forward_of_their_own_are_left_alone(multiplied):
    one = of_kind()
    one.forward = one.forward  # as accelerate's hooks put one there
    faster_layers.take_layers(nn.Sequential(one))
    assert not faster_layers.is_taken(one)


def _with_input(place: int, change) -> tuple:
    args = list(routed(3))
    args[place] = change(args[place])
    return tuple(args)


OTHER_INPUTS = {
    "another dtype": lambda: _with_input(0, torch.Tensor.bfloat16),
    "another class": lambda: _with_input(0, lambda states: states.as_subclass(Recording)),
    "numbers of another class": lambda: _with_input(1, lambda numbers: numbers.as_subclass(Recording)),
    "weights of another class": lambda: _with_input(2, lambda weights: weights.as_subclass(Recording)),
    "nothing": lambda: routed(0),
    "none chosen": lambda: (torch.randn(3, FEATURES), torch.zeros(3, 0, dtype=torch.int64), torch.zeros(3, 0)),
    "numbers in float": lambda: _with_input(1, torch.Tensor.float),
    "fewer numbers": lambda: _with_input(1, lambda numbers: numbers[:2]),
    "fewer numbers and weights": lambda: (torch.randn(3, FEATURES), *(each[:2] for each in routed(3)[1:])),
    "weights in another shape": lambda: _with_input(2, lambda weights: weights.reshape(-1, 1)),
    "other features": lambda: (torch.randn(3, FEATURES + 1), *routed(3)[1:]),
}


def _answer_or_error(one: nn.Module, args: tuple) -> str:
    try:
        return str(one(*args))
    except Exception as error:
        return repr(error)


@pytest.mark.parametrize("kind", OTHER_INPUTS)
def test_other_inputs_are_left_to_transformers(kind, multiplied):
    """With what comes of them, an error or not."""
    one, args = taken(of_kind()), OTHER_INPUTS[kind]()
    with torch.no_grad():
        expected = _answer_or_error(one, args)
        with faster_pass():
            assert _answer_or_error(one, args) == expected
    assert not multiplied


def test_keywords_are_left_to_transformers(multiplied):
    one, (states, index, weights) = taken(of_kind()), routed(3)
    with torch.no_grad(), faster_pass():
        assert torch.equal(one(states, index, top_k_weights=weights), stocks(one, states, index, weights))
        with pytest.raises(TypeError):
            one(states, index, weights, unknown=True)
    assert not multiplied


def test_gates_that_do_not_fit_are_an_error(multiplied):
    one = taken(of_kind())
    one._apply_gate = lambda both: both
    with torch.no_grad(), faster_pass(), pytest.raises(RuntimeError, match="cannot be multiplied"):
        one(*routed(3))


@pytest.mark.parametrize("change", ["fewer experts than weights", "down is narrow", "up and down in other dtypes"])
def test_experts_that_do_not_fit_together_are_left_to_transformers(change, multiplied):
    one, args = taken(of_kind()), routed(3)
    args[1][:] = torch.tensor([0, 1])
    if change == "fewer experts than weights":
        one.num_experts = COUNT - 1
    elif change == "down is narrow":
        one.down_proj = nn.Parameter(one.down_proj.data[:, : FEATURES // 2].clone(), requires_grad=False)
    else:
        one.down_proj = nn.Parameter(one.down_proj.data.bfloat16(), requires_grad=False)
    with torch.no_grad():
        expected = _answer_or_error(one, args)
        with faster_pass():
            assert _answer_or_error(one, args) == expected
    assert not multiplied


@pytest.mark.parametrize("shift", [-1, 1, 2**40])
def test_numbers_that_are_no_experts_are_left_to_transformers(shift, multiplied):
    """Which answers whatever lay in memory."""
    one, (states, index, weights) = taken(of_kind()), routed(3)
    index[:] = torch.tensor([0, COUNT - 1])
    with torch.no_grad(), faster_pass():
        assert one(states, index + shift, weights).shape == states.shape
    assert not multiplied


def test_experts_on_other_machines_are_left_to_transformers(multiplied):
    """Rows that none here is to answer have numbers beyond the last."""
    one, (states, index, weights) = taken(of_kind()), routed(3)
    one._is_expert_parallel = True
    index[1, 0], weights[1, 0] = COUNT, 0
    with torch.no_grad():
        expected = one(states, index, weights)
        with faster_pass():
            assert torch.equal(one(states, index, weights), expected)
    assert not multiplied


@pytest.mark.parametrize("watcher", WATCHERS)
def test_who_looks_sees_what_transformers_does(watcher, multiplied):
    one, args = taken(of_kind()), routed(3)
    with torch.no_grad(), faster_pass(), WATCHERS[watcher]():
        one(*args)
    assert not multiplied


@pytest.mark.parametrize("where", ["transformers", "torch", "class"])
def test_who_replaces_the_function_is_asked(where, multiplied, monkeypatch):
    one, args, asked = taken(of_kind()), routed(3), []

    def noting(original):
        return lambda *args, **named: asked.append(1) or original(*args, **named)

    if where == "transformers":
        monkeypatch.setitem(moe.ALL_EXPERTS_FUNCTIONS, "grouped_mm", noting(stocks))
    elif where == "torch":
        monkeypatch.setattr(functional, "grouped_mm", noting(functional.grouped_mm))
    else:
        original = type(one).__base__
        monkeypatch.setattr(original, "forward", noting(original.forward))
    with torch.no_grad(), faster_pass():
        one(*args)
    assert asked
    assert not multiplied


def test_classes_that_nobody_has_are_forgotten(multiplied):
    one = taken(of_kind())
    classes = [weakref.ref(type(one)), weakref.ref(type(one).__base__)]
    del one
    for _ in range(2):  # what stands for a class goes first
        gc.collect()
    assert [each() for each in classes] == [None, None]


def test_classes_are_given_back(multiplied):
    pair = Pair("mixtral")
    names = {name for name, each in pair.model.named_modules() if isinstance(each, MixtralExperts)}
    before = {name: type(each) for name, each in pair.stock.named_modules()}
    assert names
    assert all(faster_layers.is_taken(pair.model.get_submodule(name)) for name in names)
    assert str(pair.model) == str(pair.stock)
    unpatch_model(pair.model)
    assert {name: type(each) for name, each in pair.model.named_modules()} == before
    patch_model(pair.model)
    pair.ask(ROWS)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_have_the_original_class(how, multiplied):
    one = taken(copy_of(FAMILIES["mixtral"]).model.layers[0].mlp.experts)
    assert type(one) is not MixtralExperts
    twin = copy.deepcopy(one) if how == "deepcopy" else pickle.loads(pickle.dumps(one))
    assert type(twin) is MixtralExperts
    assert torch.equal(twin.down_proj, one.down_proj)
    assert type(one).__name__ == "MixtralExperts"


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("make", [lambda: copy_of(FAMILIES["mixtral"]).model.layers[0].mlp.experts, layer, conv1d])
def test_copies_of_compiled_layers_have_weights_of_their_own(make, how, multiplied):
    one = make()
    faster_layers.take_layers(nn.Sequential(one))
    one.compile(backend="eager")
    twin = copy.deepcopy(one) if how == "deepcopy" else pickle.loads(pickle.dumps(one))
    assert twin._compiled_call_impl is None


def test_what_is_said(native_products):
    assert faster_layers.describe(nn.Sequential(taken(of_kind().bfloat16()))) == "native kernel"
    assert faster_layers.describe(nn.Sequential(of_kind(is_transposed=True))) == "torch's choice"
