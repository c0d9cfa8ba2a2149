"""Linear layers by oneDNN: where they are, and where nobody must notice. Forced, whatever machine this is."""

import copy
import io
import pickle
import threading
from contextlib import ExitStack, nullcontext
from functools import partial

import accelerate
import pytest
import torch
from compare import copy_of
from families import FAMILIES
from pair import Pair
from prompts import tokens
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from hf_paged import linear, patch_model, unpatch_model

ROWS = [tokens(40, seed=1), tokens(23, seed=2), tokens(31, seed=3)]
TOLERANCE = 1e-5  # of two ways to add up some dozens of numbers around 1


@pytest.fixture
def products(monkeypatch):
    """Rows of each product that goes to oneDNN, which all layers do that may."""
    if not linear._is_there():
        pytest.skip("this torch has no linear layers of oneDNN's")
    monkeypatch.setattr(linear, "is_faster", lambda: True)
    monkeypatch.setattr(linear, "MIN_WEIGHTS", 1)
    rows, multiply = [], linear.multiply

    def counted(input, weight, bias):
        rows.append(input.numel() // weight.shape[1])
        return multiply(input, weight, bias)

    monkeypatch.setattr(linear, "multiply", counted)
    return rows


def layer(inputs: int = 24, outputs: int = 40, **kwargs) -> nn.Linear:
    """One that has been taken, alone in its model."""
    made = nn.Sequential(nn.Linear(inputs, outputs, **kwargs)).requires_grad_(False)
    linear.take_layers(made)
    assert type(made[0]) is linear._TakenLinear
    return made[0]


def conv1d(inputs: int = 24, outputs: int = 40) -> nn.Module:
    """The linear layer of gpt2, taken."""
    made = nn.Sequential(Conv1D(outputs, inputs)).requires_grad_(False)
    nn.init.normal_(made[0].bias)
    linear.take_layers(made)
    assert type(made[0]) is linear._TakenConv1D
    return made[0]


def same(one: nn.Module, *inputs: torch.Tensor) -> bool:
    """Whether a layer gives what `nn.Linear.forward` gives."""
    return all(torch.allclose(one(each), type(one).__base__.forward(one, each), atol=TOLERANCE) for each in inputs)


# -- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2", "gpt2", "t5", "mixtral", "lfm2"])
def test_same_as_stock(name, products):
    pair = Pair(name)
    pair.ask(ROWS, max_new_tokens=12)
    assert 3 in products, "a step of three rows"
    assert all(rows <= linear.MAX_ROWS for rows in products)
    pair.ask(ROWS, num_beams=3)
    pair.ask(ROWS[:1], do_sample=True, num_return_sequences=4)


def test_logits(products):
    pair = Pair("llama")
    kwargs = {"max_new_tokens": 8, "output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    inputs = torch.tensor([ROWS[0]])
    expected, actual = (model.generate(inputs, **kwargs).logits for model in (pair.stock, pair.model))
    assert products
    torch.testing.assert_close(torch.stack(actual), torch.stack(expected), atol=1e-4, rtol=0)


def test_prompts_of_many_rows_are_left_to_torch(products):
    pair = Pair("llama")
    pair.ask([tokens(linear.MAX_ROWS + 1)], max_new_tokens=1)
    assert set(products) == {1}, "the last token's logits alone"
    pair.ask([tokens(linear.MAX_ROWS, seed=2)], max_new_tokens=1)
    assert linear.MAX_ROWS in products


def test_what_is_not_paged_is_stocks(products):
    pair = Pair("llama")
    with torch.no_grad():
        pair.model(torch.tensor([ROWS[0]]))
        pair.model.generate(torch.tensor([ROWS[0]]), max_new_tokens=3, cache_implementation="static")
    assert not products
    unpatch_model(pair.model)
    pair.model.generate(torch.tensor([ROWS[0]]), max_new_tokens=3)
    assert not products


def test_adapters(products):
    peft = pytest.importorskip("peft")
    pair = Pair("llama")
    config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False, r=4)
    pair.stock, pair.model = (_with_adapter(peft, model, config) for model in (pair.stock, pair.model))
    pair.ask(ROWS)
    assert products
    pair.both(lambda model: model.merge_adapter())
    pair.ask(ROWS)
    pair.both(lambda model: model.unmerge_adapter())
    pair.ask(ROWS)
    unpatch_model(pair.model)
    assert not any(type(each) is linear._TakenLinear for each in pair.model.modules())
    inputs = torch.tensor([ROWS[0]])
    assert torch.equal(*(model.generate(inputs, max_new_tokens=9) for model in (pair.stock, pair.model)))


def _with_adapter(peft, model, config):
    torch.manual_seed(5)
    return peft.get_peft_model(model, config)


def test_a_new_vocabulary_is_stocks_until_patched_again(products):
    pair = Pair("llama")
    pair.ask(ROWS)
    pair.both(lambda model: model.resize_token_embeddings(model.config.vocab_size + 8))
    pair.ask(ROWS)
    assert type(pair.model.lm_head) is nn.Linear
    patch_model(pair.model, pair.paged.config)
    assert type(pair.model.lm_head) is linear._TakenLinear
    pair.ask(ROWS)


def test_layers_are_taken_as_soon_as_they_are_in_float32(products):
    model = patch_model(copy_of(FAMILIES["llama"]).bfloat16())
    model.generate(torch.tensor([ROWS[0]]), max_new_tokens=3)
    assert type(model.lm_head) is nn.Linear
    model.float().generate(torch.tensor([ROWS[0]]), max_new_tokens=3)
    assert type(model.lm_head) is linear._TakenLinear
    assert products


def test_threads_that_do_not_generate_are_left_alone(products):
    one, answers = layer(), []
    with torch.no_grad(), linear.few_rows():
        inside = threading.Thread(target=lambda: answers.append(one(torch.ones(2, 24))))
        inside.start()
        inside.join()
        assert not products
        assert torch.allclose(one(torch.ones(2, 24)), answers[0], atol=TOLERANCE)
    assert products == [2]


# -- classes ---------------------------------------------------------------------------------------------------------


def test_classes_are_given_back(products):
    model = copy_of(FAMILIES["llama"])
    before, shown = {name: type(each) for name, each in model.named_modules()}, str(model)
    patch_model(model)
    assert type(model.lm_head) is linear._TakenLinear
    assert isinstance(model.lm_head, nn.Linear)
    assert str(model) == shown
    unpatch_model(model)
    assert {name: type(each) for name, each in model.named_modules()} == before


@pytest.mark.parametrize("how", ["hook", "removed hook", "wrapped", "compiled"])
def test_a_forward_that_was_kept_outlives_the_patch(how, products):
    pair, add = Pair("llama"), accelerate.hooks.add_hook_to_module
    head = pair.model.lm_head
    forward = head.forward
    if "hook" in how:
        add(head, accelerate.hooks.ModelHook())
    if how == "removed hook":
        accelerate.hooks.remove_hook_from_module(head)
    if how == "wrapped":
        head.forward = lambda input: forward(input)
    if how == "compiled":
        head.forward = torch.compile(forward, backend="eager")
    pair.ask(ROWS)
    unpatch_model(pair.model)
    assert type(head) is nn.Linear
    inputs = torch.tensor([ROWS[0]])
    assert torch.equal(*(model.generate(inputs, max_new_tokens=9) for model in (pair.stock, pair.model)))


def test_layers_of_two_models(products):
    """Who gives them back first takes them from nobody."""
    one, other = (copy_of(FAMILIES["llama"]) for _ in range(2))
    other.model = one.model
    patch_model(one)
    patch_model(other)
    unpatch_model(one)
    shared = other.model.layers[0].mlp.up_proj
    assert type(shared) is linear._TakenLinear
    assert type(one.lm_head) is nn.Linear
    unpatch_model(other)
    assert type(shared) is nn.Linear


def test_layers_that_have_left_the_model_are_given_back(products):
    model = patch_model(copy_of(FAMILIES["llama"]))
    head, model.lm_head = model.lm_head, nn.Linear(64, 8)
    unpatch_model(model)
    assert type(head) is nn.Linear


def test_a_parametrization_that_outlives_the_patch(products):
    model = patch_model(copy_of(FAMILIES["llama"]))
    parametrizations.weight_norm(model.lm_head)
    unpatch_model(model)
    nn.utils.parametrize.remove_parametrizations(model.lm_head, "weight")
    model.generate(torch.tensor([ROWS[0]]), max_new_tokens=3)
    assert isinstance(model.lm_head, nn.Linear)
    assert not products


def test_a_layer_without_weights(products):
    model = copy_of(FAMILIES["llama"])
    model.unused = nn.Linear(4, 4)
    model.unused.weight = None
    patch_model(model).generate(torch.tensor([ROWS[0]]), max_new_tokens=3)
    assert products


def test_layers_with_a_forward_of_their_own_are_left_alone(products):
    model = copy_of(FAMILIES["llama"])
    model.lm_head.forward = nn.Linear.forward.__get__(model.lm_head)  # as accelerate's hooks put one there
    patch_model(model)
    assert type(model.lm_head) is nn.Linear


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("kind", [layer, conv1d])
def test_copies_and_files_have_the_original_class(kind, how, products):
    one = kind()
    if how == "deepcopy":
        twin = copy.deepcopy(one)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(one, protocol=2))
    else:
        file = io.BytesIO()
        torch.save(one, file)
        assert b"hf_paged" not in file.getvalue()
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert type(twin) is type(one).__base__
    assert torch.equal(twin.weight, one.weight)
    assert str(twin) == str(one)


def test_copies_draw_no_numbers(products):
    one = layer()
    torch.manual_seed(1)
    copy.deepcopy(one)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1))


def test_files_load_without_trust(products):
    file = io.BytesIO()
    torch.save(layer(), file)
    file.seek(0)
    with torch.serialization.safe_globals([nn.Linear]):
        assert type(torch.load(file, weights_only=True)) is nn.Linear


def test_compiles_in_one_graph(products):
    one = layer()
    compiled = torch.compile(one, backend="eager", fullgraph=True)
    with torch.no_grad(), linear.few_rows():
        compiled(torch.ones(2, 24))
    assert not products


# -- inputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [layer, partial(layer, bias=False), conv1d], ids=["linear", "no bias", "conv1d"])
@pytest.mark.parametrize("sizes", [(1, 1), (7, 3), (24, 40), (257, 129), (576, 1000)])
def test_sizes(sizes, kind, products):
    one = kind(*sizes)
    shapes = [(1,), (5, 1), (3, 4), (9,), (2, 3, 5), (linear.MAX_ROWS - 1,), (linear.MAX_ROWS,), (0,), ()]
    inputs = [torch.randn(*shape, sizes[0]) for shape in shapes]
    with torch.no_grad(), linear.few_rows():
        assert same(one, *inputs)
        assert products == [1, 5, 16, 16, 32, 64, 64, 0, 1]
        assert same(one, torch.randn(linear.MAX_ROWS + 1, sizes[0]))
    assert len(products) == len(inputs)


def test_strides(products):
    one = layer()
    inputs = [
        torch.randn(4, 3, 24)[:, -1:],
        torch.randn(24, 4).T,
        torch.randn(4, 48)[:, ::2],
        torch.randn(24).expand(5, 24),
    ]
    with torch.no_grad(), linear.few_rows():
        assert same(one, *inputs)
    assert len(products) == len(inputs)


def test_small_layers_are_left_to_torch(products, monkeypatch):
    small = layer()
    monkeypatch.setattr(linear, "MIN_WEIGHTS", 24 * 40 + 1)
    with torch.no_grad(), linear.few_rows():
        assert same(small, torch.randn(2, 24))
        assert not products
        assert same(layer(24, 41), torch.randn(2, 24))
    assert products == [2]
    model = nn.Sequential(nn.Linear(24, 40), nn.Linear(24, 41))
    linear.take_layers(model)
    assert [type(each) for each in model] == [nn.Linear, linear._TakenLinear]


class Recording(torch.Tensor):
    """Notes what is done with it."""

    names = ()

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.names += (function.__name__,)
        return super().__torch_function__(function, types, args, kwargs)


def of_another_class(one: nn.Linear) -> None:
    one.weight = nn.Parameter(one.weight.data.as_subclass(Recording), requires_grad=False)


OTHER_WEIGHTS = {
    "another class": of_another_class,
    "float64": lambda one: one.double(),
    "bfloat16": lambda one: one.bfloat16(),
    "strides": lambda one: setattr(one, "weight", nn.Parameter(torch.randn(24, 40).T, requires_grad=False)),
    "meta": lambda one: one.to("meta"),
    "parametrized": parametrizations.weight_norm,
    "no parameter": lambda one: (delattr(one, "weight"), setattr(one, "weight", torch.randn(40, 24))),
}


@pytest.mark.parametrize("kind", OTHER_WEIGHTS)
def test_other_weights_are_left_to_torch(kind, products):
    one = layer()
    OTHER_WEIGHTS[kind](one)
    inputs = torch.randn(2, 24).to(one.weight.device, one.weight.dtype)
    with torch.no_grad(), linear.few_rows():
        found, expected = one(inputs), nn.functional.linear(inputs, one.weight, one.bias)
    assert not products
    assert found.shape == expected.shape
    assert kind == "meta" or torch.equal(found, expected)


OTHER_BIASES = {
    "strides": torch.randn(80)[::2],
    "one number": torch.zeros(1).expand(40),
    "one element": torch.randn(1),
    "a row": torch.randn(1, 40),
    "rows": torch.randn(2, 40),
}


@pytest.mark.parametrize("kind", OTHER_BIASES)
def test_other_biases_are_left_to_torch(kind, products):
    one, inputs = layer(), torch.randn(2, 24)
    one.bias = nn.Parameter(OTHER_BIASES[kind], requires_grad=False)
    with torch.no_grad(), linear.few_rows():
        assert torch.equal(one(inputs), nn.functional.linear(inputs, one.weight, OTHER_BIASES[kind]))
    assert not products


@pytest.mark.parametrize("how", ["pruned", "parametrized", "buffer", "attribute"])
def test_biases_that_are_no_parameters(how, products):
    one, inputs = layer(), torch.randn(2, 24)
    if how == "pruned":
        prune.l1_unstructured(one, "bias", 0.5)
    elif how == "parametrized":
        nn.utils.parametrize.register_parametrization(one, "bias", nn.Identity())
    else:
        bias = one.bias.data
        del one.bias
        one.register_buffer("bias", bias) if how == "buffer" else setattr(one, "bias", bias)
    with torch.no_grad(), linear.few_rows():
        assert torch.equal(one(inputs), nn.functional.linear(inputs, one.weight, one.bias))
    assert not products


@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_coo])
def test_sparse_weights_are_left_to_torch(layout, products):
    one, inputs = layer(bias=False), torch.randn(2, 24)
    one.weight = nn.Parameter(one.weight.data.to_sparse(layout=layout), requires_grad=False)
    with torch.no_grad(), linear.few_rows():
        assert torch.allclose(one(inputs), inputs @ one.weight.to_dense().T, atol=TOLERANCE)
    assert not products


def test_tensors_of_other_classes_see_what_torch_does(products):
    one = layer()
    with torch.no_grad(), linear.few_rows():
        one(torch.ones(2, 24).as_subclass(Recording))
    assert "linear" in Recording.names
    assert not products


def test_wrong_inputs_are_refused_as_by_torch(products):
    one, wrong = layer(), [torch.randn(2, 23), torch.randn(2, 24).double(), torch.randn(48), torch.tensor(1.0)]
    for each in wrong:
        with torch.no_grad(), linear.few_rows(), pytest.raises(RuntimeError) as found:
            one(each)
        with torch.no_grad(), pytest.raises(RuntimeError) as expected:
            nn.Linear(24, 40)(each)
        assert str(found.value) == str(expected.value)
    assert not products


# -- who looks -------------------------------------------------------------------------------------------------------


class Functions(TorchFunctionMode):
    """Sees what is asked of torch."""

    def __init__(self):
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))


WATCHERS = {
    "gradients": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "dispatch mode": lambda: FlopCounterMode(display=False),
    "function mode": Functions,
}


@pytest.mark.parametrize("when", ["before the pass", "in the midst"])
@pytest.mark.parametrize("watcher", WATCHERS)
def test_who_looks_sees_what_torch_does(watcher, when, products):
    one, inputs = layer(), torch.randn(2, 24)
    contexts = [linear.few_rows(), looks := WATCHERS[watcher]()]
    with torch.no_grad(), ExitStack() as stack:
        for context in contexts if when == "in the midst" else contexts[::-1]:
            stack.enter_context(context)
        found = one(inputs)
        assert torch.equal(found, nn.functional.linear(inputs, one.weight, one.bias))
    assert not products
    if isinstance(looks, Functions):
        assert looks.names.count("linear") == 2
    with torch.no_grad(), linear.few_rows():
        one(inputs)
    assert products == [2], "without it"


def test_onednn_can_be_switched_off(products):
    with torch.backends.mkldnn.flags(enabled=False):
        with torch.no_grad(), linear.few_rows():
            layer()(torch.randn(2, 24))
        assert linear.describe(layer()) == "torch's choice"
    assert not products


def test_a_default_device_is_nobody_who_looks(products):
    one = layer()
    with torch.device("cpu"), torch.no_grad(), linear.few_rows():
        one(torch.randn(2, 24))
        with torch.device("cpu"):
            one(torch.randn(2, 24))
    assert products == [2], "who comes later may be anybody"


@pytest.mark.parametrize("when", ["before the pass", "in the midst"])
def test_transforms_see_what_torch_does(when, products):
    one, rows = layer(), torch.randn(3, 24)

    def inside(row):
        with linear.few_rows():
            return one(row)

    with torch.no_grad(), nullcontext() if when == "before the pass" else linear.few_rows():
        found = torch.vmap(inside if when == "before the pass" else one)(rows)
    assert torch.allclose(found, one(rows), atol=TOLERANCE)
    assert not products


REPLACED = {"functional": (nn.functional, "linear"), "class": (nn.Linear, "forward"), "addmm": (torch, "addmm")}


@pytest.mark.parametrize("where", REPLACED)
def test_who_replaces_torchs_function_is_asked(where, products, monkeypatch):
    one, asked = layer(), []

    def other(*args):
        asked.append(args)
        return torch.zeros(2, 40)

    if where == "addmm":
        one = conv1d()
    owner, name = REPLACED[where]
    monkeypatch.setattr(owner, name, other)
    with torch.no_grad(), linear.few_rows():
        assert not one(torch.randn(2, 24)).any()
    assert len(asked) == 1
    assert not products


def test_a_pass_that_fails_leaves_nothing_switched_on(products):
    one = layer()
    with torch.no_grad():
        with pytest.raises(KeyError), linear.few_rows():
            raise KeyError
        one(torch.randn(2, 24))
    assert not products


# -- machines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "vendor"),
    [
        ("processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC\n", "AuthenticAMD"),
        ("processor\t: 0\nvendor_id\t: GenuineIntel\n", "GenuineIntel"),
        ("processor\t: 0\nCPU implementer\t: 0x41\n", ""),
    ],
)
def test_vendors(text, vendor, tmp_path, monkeypatch):
    file = tmp_path / "cpuinfo"
    file.write_text(text)
    monkeypatch.setattr(linear, "_CPU_INFO", file)
    assert linear._vendor() == vendor
    monkeypatch.setattr(linear, "_CAPABILITIES", (torch.backends.cpu.get_cpu_capability(),))
    is_there = torch.backends.mkl.is_available() and linear._is_there()
    assert linear.is_faster.__wrapped__() == (is_there and vendor == "AuthenticAMD")
    monkeypatch.setattr(linear, "_CAPABILITIES", ())
    assert not linear.is_faster.__wrapped__(), "not measured"


def test_vendor_on_windows(tmp_path, monkeypatch):
    monkeypatch.setattr(linear, "_CPU_INFO", tmp_path / "missing")
    for name, vendor in (("AMD64 Family 25 Model 17 Stepping 1, AuthenticAMD", "AuthenticAMD"), ("", "")):
        monkeypatch.setattr("platform.processor", lambda name=name: name)
        assert linear._vendor() == vendor


def test_a_torch_without_the_operator_or_with_another(monkeypatch):
    monkeypatch.setattr(torch._C, "_jit_get_schemas_for_operator", lambda name: [])
    assert not linear._is_there()
    monkeypatch.undo()
    monkeypatch.setattr(linear, "_ARGUMENTS", ["X", "W", "B"])
    assert not linear._is_there()


def test_other_machines_classes_are_left_alone(monkeypatch):
    monkeypatch.setattr(linear, "is_faster", lambda: False)
    model = patch_model(copy_of(FAMILIES["llama"]))
    assert type(model.lm_head) is nn.Linear
    assert "linear layers: torch's choice" in str(model.paged)


def test_what_is_said(products):
    model = patch_model(copy_of(FAMILIES["llama"]))
    assert "linear layers: oneDNN, up to 64 rows" in str(model.paged)
    assert linear.describe(model.bfloat16()) == "torch's choice"
