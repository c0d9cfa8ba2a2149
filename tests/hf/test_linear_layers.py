"""Single layers by the native kernel and oneDNN: what they take, who must not notice, on which machines; all forced."""

import math
from contextlib import ExitStack, nullcontext
from functools import partial

import pytest
import torch
from compare import copy_of
from families import FAMILIES
from taken import TOLERANCE, WATCHERS, Functions, Recording, conv1d, faster_pass, layer, same
from tolerances import assert_close
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers.pytorch_utils import Conv1D

from hf_paged import faster_layers, linear, matmul, patch_model, torch_compat
from hf_paged_kernels.native import variants
from hf_paged_kernels.processor import AMD

# -- inputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [layer, partial(layer, bias=False), conv1d], ids=["linear", "no bias", "conv1d"])
@pytest.mark.parametrize("sizes", [(1, 1), (7, 3), (24, 40), (257, 129), (576, 1000)])
def test_sizes(sizes, kind, products):
    one = kind(*sizes)
    shapes = [(1,), (5, 1), (3, 4), (9,), (2, 3, 5), (63,), (64,), (0,), (), (65,), (2, 128), (257,), (512,)]
    inputs = [torch.randn(*shape, sizes[0]) for shape in shapes]
    with torch.no_grad(), faster_pass():
        assert same(one, *inputs)
    assert products == [1, 5, 16, 16, 32, 64, 64, 0, 1, 72, 256, 288, 512]


@pytest.mark.parametrize("kind", [layer, conv1d])
@pytest.mark.parametrize(
    ("shape", "pieces"),
    [((513,), [512, 1]), ((1024,), [512, 512]), ((2, 300), [512, 88]), ((3, 7, 50), [512, 512, 32])],
)
def test_pieces(shape, pieces, kind, products):
    one = kind()
    with torch.no_grad(), faster_pass():
        assert one(torch.randn(*shape, 24)).is_contiguous()
        assert same(one, torch.randn(*shape, 24), torch.randn(*shape, 48)[..., ::2])
    assert products == pieces * 3


def test_rows_that_are_filled_up_make_nothing_of_others(products):
    one, input = layer(), torch.randn(70, 24)
    input[3], input[5] = torch.nan, torch.inf
    with torch.no_grad(), faster_pass():
        assert torch.equal(one(input).isfinite().all(1), input.isfinite().all(1))
    assert products == [72]


def test_strides(multiplied):
    one = layer()
    inputs = [
        torch.randn(4, 3, 24)[:, -1:],
        torch.randn(24, 4).T,
        torch.randn(4, 48)[:, ::2],
        torch.randn(24).expand(5, 24),
    ]
    with torch.no_grad(), faster_pass():
        assert same(one, *inputs)
    assert len(multiplied) == len(inputs)


def test_small_layers_are_left_to_torch(products, monkeypatch):
    small = layer()
    monkeypatch.setattr(matmul, "LEAST", ((math.inf, 24 * 40 + 1, 1),))
    with torch.no_grad(), faster_pass():
        assert same(small, torch.randn(2, 24))
        assert not products
        assert same(layer(24, 41), torch.randn(2, 24))
    assert products == [2]
    model = nn.Sequential(nn.Linear(24, 40), nn.Linear(24, 41))
    faster_layers.take_layers(model)
    assert [type(each) for each in model] == [nn.Linear, linear._TakenLinear]


def test_how_large_a_layer_must_be_depends_on_the_rows(products, monkeypatch):
    wide, narrow = layer(24, 50), layer(50, 24)
    monkeypatch.setattr(matmul, "LEAST", ((4, 1200, 24), (8, 1200, 25), (20, 1201, 1)))
    for one in (wide, narrow):
        with torch.no_grad(), faster_pass():
            assert same(one, *(torch.randn(rows, one.in_features) for rows in (4, 5, 8, 9, 21)))
    assert products == [4, 5, 8, 4]


@pytest.mark.parametrize("dtype", matmul.NATIVE_ROWS, ids=str)
def test_sizes_natively(dtype, native_products):
    """A row is the same whatever other rows there are."""
    for sizes, bias in [((8, 1), True), ((24, 40), False), ((576, 1001), True), ((1032, 7), False)]:
        one = layer(*sizes, bias=bias).to(dtype)
        inputs = torch.randn(4, 3, sizes[0]).to(dtype)
        with torch.no_grad(), faster_pass():
            found = one(inputs)
            assert_close(found, nn.functional.linear(inputs, one.weight, one.bias), f"{sizes}")
            assert torch.equal(one(inputs[3, 2]), found[3, 2])
    assert native_products == [12, 1] * 4


def test_nothing_in_odd_sizes_and_transposed_weights_are_left_to_torch(native_products):
    one, odd = layer(), layer(23)
    with torch.no_grad(), faster_pass():
        assert one(torch.randn(0, 24)).shape == (0, 40)
        assert same(odd, torch.randn(2, 23))
        assert same(conv1d(), torch.randn(2, 24))
    assert not native_products


def test_a_bias_of_another_dtype_is_refused_as_by_torch(multiplied):
    one = layer()
    one.bias = nn.Parameter(one.bias.data.bfloat16(), requires_grad=False)
    with torch.no_grad(), faster_pass(), pytest.raises(RuntimeError) as found:
        one(torch.randn(2, 24))
    with torch.no_grad(), pytest.raises(RuntimeError) as expected:
        nn.Linear.forward(one, torch.randn(2, 24))
    assert str(found.value) == str(expected.value)
    assert not multiplied


@pytest.mark.parametrize(
    ("dtype", "rows"), [(torch.float32, (1, 2**7)), (torch.bfloat16, (1, 24)), (torch.float16, (2, 2**14))], ids=str
)
def test_other_numbers_of_rows_are_left_to_others(dtype, rows, native_library, monkeypatch):
    monkeypatch.setattr(matmul, "native_linear", lambda: variants()["portable"].linear)
    wide, (least, most) = torch.empty(1024, 1024, dtype=dtype), rows
    won = [matmul.is_natively_won(each, wide) for each in (0, least - 1, least, most, most + 1)]
    assert won == [False, False, True, True, False]
    assert not matmul.is_natively_won(2, torch.empty(40, 24, dtype=dtype)), "small weights"


def of_another_class(one: nn.Linear) -> None:
    one.weight = nn.Parameter(one.weight.data.as_subclass(Recording), requires_grad=False)


OTHER_WEIGHTS = {
    "another class": of_another_class,
    "float64": lambda one: one.double(),
    "strides": lambda one: setattr(one, "weight", nn.Parameter(torch.randn(24, 40).T, requires_grad=False)),
    "meta": lambda one: one.to("meta"),
    "parametrized": parametrizations.weight_norm,
    "no parameter": lambda one: (delattr(one, "weight"), setattr(one, "weight", torch.randn(40, 24))),
}


@pytest.mark.parametrize("kind", OTHER_WEIGHTS)
def test_other_weights_are_left_to_torch(kind, multiplied):
    one = layer()
    OTHER_WEIGHTS[kind](one)
    inputs = torch.randn(2, 24).to(one.weight.device, one.weight.dtype)
    with torch.no_grad(), faster_pass():
        found, expected = one(inputs), nn.functional.linear(inputs, one.weight, one.bias)
    assert not multiplied
    assert found.shape == expected.shape
    assert kind == "meta" or torch.equal(found, expected)


def test_other_dtypes_than_float32_are_not_onednns(products):
    one, inputs = layer().bfloat16(), torch.randn(2, 24).bfloat16()
    with torch.no_grad(), faster_pass():
        assert torch.equal(one(inputs), nn.functional.linear(inputs, one.weight, one.bias))
    assert not products


def test_a_row_of_weights_is_left_to_torch(multiplied):
    one = layer(bias=False)
    one.weight = nn.Parameter(torch.randn(24), requires_grad=False)
    with torch.no_grad(), faster_pass():
        assert one(torch.ones(3, 24)).shape == (3,)
    assert not multiplied


OTHER_BIASES = {
    "strides": torch.randn(80)[::2],
    "one number": torch.zeros(1).expand(40),
    "one element": torch.randn(1),
    "a row": torch.randn(1, 40),
    "rows": torch.randn(2, 40),
}


@pytest.mark.parametrize("kind", OTHER_BIASES)
def test_other_biases_are_left_to_torch(kind, multiplied):
    one, inputs = layer(), torch.randn(2, 24)
    one.bias = nn.Parameter(OTHER_BIASES[kind], requires_grad=False)
    with torch.no_grad(), faster_pass():
        assert torch.equal(one(inputs), nn.functional.linear(inputs, one.weight, OTHER_BIASES[kind]))
    assert not multiplied


@pytest.mark.parametrize("how", ["pruned", "parametrized", "buffer", "attribute"])
def test_biases_that_are_no_parameters(how, multiplied):
    one, inputs = layer(), torch.randn(2, 24)
    if how == "pruned":
        prune.l1_unstructured(one, "bias", 0.5)
    elif how == "parametrized":
        nn.utils.parametrize.register_parametrization(one, "bias", nn.Identity())
    else:
        bias = one.bias.data
        del one.bias
        one.register_buffer("bias", bias) if how == "buffer" else setattr(one, "bias", bias)
    with torch.no_grad(), faster_pass():
        assert torch.equal(one(inputs), nn.functional.linear(inputs, one.weight, one.bias))
    assert not multiplied


@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_coo])
def test_sparse_weights_are_left_to_torch(layout, multiplied):
    one, inputs = layer(bias=False), torch.randn(2, 24)
    one.weight = nn.Parameter(one.weight.data.to_sparse(layout=layout), requires_grad=False)
    with torch.no_grad(), faster_pass():
        assert torch.allclose(one(inputs), inputs @ one.weight.to_dense().T, atol=TOLERANCE)
    assert not multiplied


@pytest.mark.parametrize("kind", ["sparse", "mkldnn", "meta"])
def test_other_inputs_are_left_to_torch(kind, multiplied):
    """What torch does with them, an error or not."""
    one, inputs = layer(bias=False), torch.randn(2, 24)
    inputs = {"sparse": inputs.to_sparse, "mkldnn": inputs.to_mkldnn, "meta": lambda: inputs.to("meta")}[kind]()

    def answer(ask) -> str:
        try:
            return str(ask(inputs))
        except Exception as error:
            return repr(error)

    with torch.no_grad(), faster_pass():
        assert answer(one) == answer(partial(nn.Linear.forward, one))
    assert not multiplied


def test_tensors_of_other_classes_see_what_torch_does(multiplied):
    one = layer()
    with torch.no_grad(), faster_pass():
        one(torch.ones(2, 24).as_subclass(Recording))
    assert "linear" in Recording.names
    assert not multiplied


def test_wrong_inputs_are_refused_as_by_torch(multiplied):
    one, wrong = layer(), [torch.randn(2, 23), torch.randn(2, 24).double(), torch.randn(48), torch.tensor(1.0)]
    for each in wrong:
        with torch.no_grad(), faster_pass(), pytest.raises(RuntimeError) as found:
            one(each)
        with torch.no_grad(), pytest.raises(RuntimeError) as expected:
            nn.Linear(24, 40)(each)
        assert str(found.value) == str(expected.value)
    assert not multiplied


# -- who looks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before the pass", "in the midst"])
@pytest.mark.parametrize("watcher", WATCHERS)
def test_who_looks_sees_what_torch_does(watcher, when, multiplied):
    one, inputs = layer(), torch.randn(2, 24)
    contexts = [faster_pass(), looks := WATCHERS[watcher]()]
    with torch.no_grad(), ExitStack() as stack:
        for context in contexts if when == "in the midst" else contexts[::-1]:
            stack.enter_context(context)
        found = one(inputs)
        assert torch.equal(found, nn.functional.linear(inputs, one.weight, one.bias))
    assert not multiplied
    if isinstance(looks, Functions):
        assert looks.names.count("linear") == 2
    with torch.no_grad(), faster_pass():
        one(inputs)
    assert multiplied == [2], "without it"


def test_it_can_be_switched_off(multiplied):
    with torch.backends.mkldnn.flags(enabled=False):
        with torch.no_grad(), faster_pass():
            layer()(torch.randn(2, 24))
        assert faster_layers.describe(layer()) == "torch's choice"
    assert not multiplied


def test_a_default_device_is_nobody_who_looks(multiplied):
    one = layer()
    with torch.device("cpu"), torch.no_grad(), faster_pass():
        one(torch.randn(2, 24))
        with torch.device("cpu"):
            one(torch.randn(2, 24))
    assert multiplied == [2], "who comes later may be anybody"


@pytest.mark.parametrize("when", ["before the pass", "in the midst"])
def test_transforms_see_what_torch_does(when, multiplied):
    one, rows = layer(), torch.randn(3, 24)

    def inside(row):
        with faster_pass():
            return one(row)

    with torch.no_grad(), nullcontext() if when == "before the pass" else faster_pass():
        found = torch.vmap(inside if when == "before the pass" else one)(rows)
    assert torch.allclose(found, one(rows), atol=TOLERANCE)
    assert not multiplied


REPLACED = {"functional": (nn.functional, "linear"), "class": (nn.Linear, "forward"), "addmm": (torch, "addmm")}


@pytest.mark.parametrize("where", REPLACED)
def test_who_replaces_torchs_function_is_asked(where, multiplied, monkeypatch):
    one, asked = layer(), []

    def other(*args):
        asked.append(args)
        return torch.zeros(2, 40)

    if where == "addmm":
        one = conv1d()
    owner, name = REPLACED[where]
    monkeypatch.setattr(owner, name, other)
    with torch.no_grad(), faster_pass():
        assert not one(torch.randn(2, 24)).any()
    assert len(asked) == 1
    assert not multiplied


def test_traces_have_what_torch_does(multiplied):
    one, rows = layer(), torch.randn(3, 24)

    def inside(rows):
        with faster_pass():
            return one(rows)

    with torch.no_grad():
        traced = torch.jit.trace(inside, rows, check_trace=False)
        assert torch.allclose(traced(rows + 1), one(rows + 1), atol=TOLERANCE)
    assert not multiplied


@pytest.mark.parametrize("what", ["input", "weight"])
def test_negated_views_are_left_to_torch(what, multiplied):
    """Whose memory has the numbers of the other sign."""
    one, inputs = layer(bias=False), torch.randn(2, 24)
    if what == "weight":
        one.weight = nn.Parameter(torch._neg_view(one.weight.data), requires_grad=False)
    else:
        inputs = torch._neg_view(inputs)
    with torch.no_grad(), faster_pass():
        assert torch.allclose(one(inputs), inputs.resolve_neg() @ one.weight.resolve_neg().T, atol=TOLERANCE)
    assert not multiplied


def test_a_pass_that_fails_leaves_nothing_switched_on(multiplied):
    one = layer()
    with torch.no_grad():
        with pytest.raises(KeyError), faster_pass():
            raise KeyError
        one(torch.randn(2, 24))
    assert not multiplied


# -- machines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vendor", [AMD, "GenuineIntel", ""])
def test_machines(vendor, monkeypatch):
    monkeypatch.setattr("hf_paged_kernels.processor.vendor", lambda: vendor)
    monkeypatch.setattr(matmul, "_CAPABILITIES", (torch.backends.cpu.get_cpu_capability(),))
    is_there = torch.backends.mkl.is_available() and torch_compat.can_multiply()
    assert matmul.has_onednn.__wrapped__() == (is_there and vendor == AMD)
    monkeypatch.setattr(matmul, "_CAPABILITIES", ())
    assert not matmul.has_onednn.__wrapped__(), "not measured"


def test_a_torch_without_the_operator_or_with_another(monkeypatch):
    monkeypatch.setattr(torch_compat, "_schemas_of", lambda name: [])
    assert not torch_compat.can_multiply()
    monkeypatch.undo()
    monkeypatch.setattr(torch_compat, "_LINEAR_ARGUMENTS", ["X", "W", "B"])
    assert not torch_compat.can_multiply()


def test_other_machines_classes_are_left_alone(monkeypatch):
    monkeypatch.setattr(matmul, "is_faster", lambda: False)
    model = patch_model(copy_of(FAMILIES["llama"]))
    assert type(model.lm_head) is nn.Linear
    assert "linear layers: torch's choice" in str(model.paged)


def test_what_is_said(products, native_library, monkeypatch):
    model = patch_model(copy_of(FAMILIES["llama"]))
    assert "linear layers: oneDNN)" in str(model.paged)
    monkeypatch.setattr(matmul, "LEAST_WEIGHTS", 1)
    monkeypatch.setattr(matmul, "native_linear", lambda: variants()["portable"].linear)
    assert "linear layers: native kernel, oneDNN)" in str(model.paged)
    assert faster_layers.describe(model.bfloat16()) == "native kernel"
    monkeypatch.setattr(matmul, "native_linear", lambda: None)
    assert faster_layers.describe(model) == "torch's choice"


@pytest.mark.parametrize(
    ("made", "dtype", "is_taken"),
    [
        (lambda: nn.Linear(24, 40), torch.bfloat16, True),
        (lambda: nn.Linear(23, 40), torch.bfloat16, False),
        (lambda: Conv1D(40, 24), torch.float32, True),
        (lambda: Conv1D(40, 24), torch.bfloat16, False),
    ],
    ids=["linear", "odd", "conv1d", "conv1d in half precision"],
)
def test_only_what_somebody_multiplies_is_taken(made, dtype, is_taken, native_products):
    model = nn.Sequential(made()).to(dtype)
    faster_layers.take_layers(model)
    assert faster_layers.is_taken(model[0]) is is_taken
    assert (faster_layers.describe(model) != "torch's choice") is is_taken
