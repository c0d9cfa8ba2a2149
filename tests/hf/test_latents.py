"""Models that keep latents in the place of K and V: packed, and never expanded in a decode step."""

import copy
import functools
import pickle
import threading

import pytest
import torch
from compare import copy_of
from families import FAMILIES, randomize
from pair import Pair
from prompts import batch, tokens
from tolerances import TIE
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StoppingCriteria
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention
from versions import skip_if_older

from hf_paged import latent, patch_model, unpatch_model
from hf_paged.backends import Expansion
from hf_paged.backends.gathered import Gathered

ROWS = [tokens(40, seed=1), tokens(23, seed=2), tokens(31, seed=3)]
SYSTEM = tokens(150, seed=4)
NOT_PLAIN = "K and V are read outside the attention function"

pytestmark = pytest.mark.usefixtures("expands_after_its_cache")


@pytest.fixture
def expands_after_its_cache():
    if not latent.may_keep(DeepseekV3Attention):
        skip_if_older("its models hand K and V to their cache")
        pytest.fail("there is nothing to test in this version")


@pytest.fixture
def expanded(monkeypatch):
    """Whether each plan's latents were expanded, by the number of its queries."""
    found = []
    reads_of = Expansion.reads_of

    def noted(self, plan):
        gathered = reads_of(self, plan)
        found.append((plan.num_queries, gathered is not None))
        return gathered

    monkeypatch.setattr(Expansion, "reads_of", noted)
    return found


@pytest.fixture(params=["deepseek_v3", "deepseek_v2"])
def pair(request):
    return Pair(request.param)


def test_nothing_falls_back_and_prompts_are_shared(pair):
    pair.ask([[*SYSTEM, 5, 6, 7], [*SYSTEM, 8, 9]])
    stats = pair.paged.stats()
    assert stats.fallbacks == {}
    assert stats.shared_tokens == len(SYSTEM)
    pair.ask([[*SYSTEM, 5, 6, 7, 20, 21]])
    assert pair.paged.stats().reused_tokens == len(SYSTEM) + 3
    assert pair.paged.stats().fallbacks == {}


def test_a_prompt_expands_latents_and_a_step_does_not(pair, expanded):
    pair.ask([SYSTEM * 2], max_new_tokens=3)
    assert {queries: is_expanded for queries, is_expanded in expanded if queries in (1, 300)} == {1: False, 300: True}


@pytest.mark.parametrize("ways", [True, False])
def test_either_way_gives_stocks_logits(pair, ways, monkeypatch):
    """Of a prompt in chunks, with a past, on a pool in pieces, beside rows that share some of it."""
    monkeypatch.setattr(Expansion, "reads_of", lambda self, plan: Gathered.of(plan) if ways else None)
    monkeypatch.setattr("hf_paged.packed.PACKED_CHUNK_TOKENS", 64)
    pair.ask([tokens(9, seed=9)])
    pair.ask([[*SYSTEM, 5, 6, 7], [*SYSTEM[:60], 8, 9], tokens(70, seed=5)])
    given = {**batch([[*SYSTEM, 5, 6, 7, 20], tokens(77, seed=6)]), "max_new_tokens": 9, "do_sample": False}
    outputs = [
        model.generate(**given, output_logits=True, return_dict_in_generate=True) for model in (pair.stock, pair.model)
    ]
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    for expected, actual in zip(*(each.logits for each in outputs), strict=True):
        assert (actual - expected).abs().max() <= TIE * max(1.0, float(expected.abs().max()))
    assert pair.paged.stats().fallbacks == {}


def without_experts():
    """A model whose layers all have MLPs."""
    usual = copy_of(FAMILIES["deepseek_v3"])
    usual.config.first_k_dense_replace = usual.config.num_hidden_layers
    made = type(usual)(usual.config).eval()
    randomize(made, 3, FAMILIES["deepseek_v3"].scale)
    made.generation_config = usual.generation_config
    return made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_errors_of_lower_precision_are_those_of_stock(dtype):
    """Against float32 on the same, rounded, weights, whose tokens both are given, one after the other.

    Without experts: of two that are tied but for rounding, either may be chosen.
    """
    stock = without_experts().to(dtype)
    exact = copy.deepcopy(stock).float()
    patched = patch_model(copy.deepcopy(stock), block_size=8)
    given = {**batch([SYSTEM, tokens(90, seed=7)]), "max_new_tokens": 12, "do_sample": False}
    sequences = exact.generate(**given)
    forced = {**given, "logits_processor": [_Forced(sequences)], "output_logits": True, "return_dict_in_generate": True}
    logits = [torch.stack(model.generate(**forced).logits).float() for model in (exact, stock, patched)]
    expected, *actual = logits
    theirs, ours = ((each - expected).abs().mean() for each in actual)
    assert patched.paged.stats().fallbacks == {}
    assert ours <= 1.2 * theirs


class _Forced:
    """Every step's tokens are those of `sequences`."""

    def __init__(self, sequences):
        self.sequences = sequences

    def __call__(self, input_ids, scores):
        only = torch.full_like(scores, -torch.inf)
        return only.scatter_(1, self.sequences[:, input_ids.shape[1], None], 0.0)


def hook(model):
    for each in model.modules():
        if latent.keeps_latents(each):
            each.kv_b_proj.register_forward_hook(_doubled)


def _doubled(module, args, output):
    return 2 * output


def pre_hook(model):
    for each in model.modules():
        if latent.keeps_latents(each):
            each.kv_b_proj.register_forward_pre_hook(_doubled_input)


def _doubled_input(module, args):
    return tuple(2 * each for each in args)


_doubled.__module__ = _doubled_input.__module__ = "accelerate.hooks"  # of those that tell no rows apart


def bias(model):
    for each in model.modules():
        if latent.keeps_latents(each):
            each.kv_b_proj.bias = nn.Parameter(torch.randn(each.kv_b_proj.out_features), requires_grad=False)


class Twice(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def other_class(model):
    for each in model.modules():
        if latent.keeps_latents(each):
            each.kv_b_proj.__class__ = Twice


def own_forward(model):
    for each in model.modules():
        if latent.keeps_latents(each):
            each.kv_b_proj.forward = lambda input, layer=each.kv_b_proj: 2 * nn.functional.linear(input, layer.weight)


def own_expansion(model):
    for each in model.modules():
        if latent.keeps_latents(each):
            each.expand_kv = lambda *args, kind=DeepseekV3Attention, layer=each: tuple(
                2 * made for made in kind.expand_kv(layer, *args)
            )


def other_layout(model):
    for each in model.modules():
        if latent.keeps_latents(each):
            weight = each.kv_b_proj.weight
            each.kv_b_proj.weight = nn.Parameter(weight.detach().T.contiguous().T, requires_grad=False)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", [hook, pre_hook, bias, other_class, own_forward, own_expansion, other_layout])
def test_what_a_layer_does_otherwise_it_does_itself(change, when):
    """Whatever comes between latents and K and V, or hides the weights, before the first call or between two."""
    pair = Pair("deepseek_v3")
    if when == "after":
        pair.ask(ROWS)
    pair.both(change)
    pair.paged.clear()  # not every one of these changes is of those that are seen
    pair.ask(ROWS)
    assert NOT_PLAIN in str(pair.paged.stats().fallbacks)
    pair.ask(ROWS, num_beams=2)


@pytest.mark.parametrize("change", [hook, own_expansion])
def test_what_changes_in_the_middle_of_a_call_is_asked_from_then_on(change):
    """Rows are of unequal length: what is dense has gaps then."""

    class Changing(StoppingCriteria):
        def __init__(self, model):
            self.model, self.steps = model, 0

        def __call__(self, ids, scores, **kwargs):
            self.steps += 1
            if self.steps == 3:
                change(self.model)
            return torch.zeros(len(ids), dtype=torch.bool)

    pair = Pair("deepseek_v3")
    pair.ask(ROWS, max_new_tokens=8, stopping_criteria=lambda model: [Changing(model)])
    assert NOT_PLAIN in str(pair.paged.stats().fallbacks)


def test_a_replaced_method_is_asked(monkeypatch):
    pair = Pair("deepseek_v3")
    expand = DeepseekV3Attention.expand_kv
    monkeypatch.setattr(DeepseekV3Attention, "expand_kv", lambda *args: tuple(2 * each for each in expand(*args)))
    pair.ask(ROWS)
    assert pair.paged.stats().fallbacks != {}


def test_who_replaces_torchs_function_is_asked(monkeypatch):
    pair = Pair("deepseek_v3")
    pair.ask(ROWS)
    pair.paged.clear()
    linear = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda input, *args: linear(input, *args) * 1.1)
    pair.ask(ROWS)


def test_autocast_has_its_own_products():
    pair = Pair("deepseek_v3")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pair.ask(ROWS)
    assert pair.paged.stats().fallbacks != {}
    pair.ask(ROWS)
    assert pair.paged.stats().fallbacks == {}


def test_adapters_of_the_weights():
    peft = pytest.importorskip("peft")

    def wrap(model):
        torch.manual_seed(5)
        return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["kv_b_proj"], init_lora_weights=False))

    pair = Pair("deepseek_v3", wrap=wrap)
    pair.ask(ROWS)
    assert NOT_PLAIN in str(pair.paged.stats().fallbacks)


def test_weights_that_change_are_looked_at_anew(pair):
    pair.ask(ROWS)

    def change(model):
        for each in model.modules():
            if latent.keeps_latents(each):
                each.kv_b_proj.weight.data.mul_(1.3)

    pair.both(change)
    pair.ask(ROWS)
    assert pair.paged.stats().fallbacks == {}


def test_classes_are_given_back(pair):
    before = {name: type(each) for name, each in pair.stock.named_modules()}
    assert type(pair.model.model.layers[0].self_attn) not in before.values()
    assert str(pair.model) == str(pair.stock)
    unpatch_model(pair.model)
    assert {name: type(each) for name, each in pair.model.named_modules()} == before
    patch_model(pair.model, block_size=8)
    pair.ask(ROWS)
    assert pair.paged.stats().fallbacks == {}


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_have_the_original_class(how, pair):
    one = pair.model.model.layers[0].self_attn
    twin = copy.deepcopy(one) if how == "deepcopy" else pickle.loads(pickle.dumps(one))
    assert type(twin) is type(pair.stock.model.layers[0].self_attn)
    assert torch.equal(twin.kv_b_proj.weight, one.kv_b_proj.weight)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_of_compiled_layers_have_weights_of_their_own(how, pair):
    one = pair.model.model.layers[0].self_attn
    one.compile(backend="eager")
    twin = copy.deepcopy(one) if how == "deepcopy" else pickle.loads(pickle.dumps(one))
    assert twin._compiled_call_impl is None


class Locked(DeepseekV3Attention):
    """Says itself what of it is copied."""

    def __getstate__(self):
        return {name: value for name, value in super().__getstate__().items() if name != "lock"}


def of_class(kind, **attributes):
    """A model with attention of another class."""
    model = copy_of(FAMILIES["deepseek_v3"])
    for each in model.modules():
        if isinstance(each, DeepseekV3Attention):
            each.__class__ = kind
            vars(each).update(attributes)
    return model


def test_who_says_what_of_it_is_copied_is_asked():
    model = patch_model(of_class(Locked, lock=threading.Lock()))
    twin = copy.deepcopy(model.model.layers[0].self_attn)
    assert type(twin) is Locked
    assert "lock" not in vars(twin)


class Registered(DeepseekV3Attention):
    """Wants to be told of its subclasses."""

    def __init_subclass__(cls, *, name, **kwargs):
        super().__init_subclass__(**kwargs)


class Meta(type):
    """Who makes a class may do anything."""


class Made(DeepseekV3Attention, metaclass=Meta):
    pass


@pytest.mark.parametrize("kind", [Registered, Made])
def test_classes_that_are_told_of_subclasses_get_none(kind):
    pair = Pair.of(of_class(kind))
    pair.ask(ROWS)
    assert type(pair.model.model.layers[0].self_attn) is kind
    assert NOT_PLAIN in str(pair.paged.stats().fallbacks)


def test_a_method_of_transformers_name_is_not_its_own():
    class Wrapped(DeepseekV3Attention):
        """Does something else with many tokens, which a trial of some does not show."""

        @functools.wraps(DeepseekV3Attention.expand_kv)
        def expand_kv(self, *args):
            keys, values = super().expand_kv(*args)
            return keys, values * 3 if values.shape[2] > 32 else values

    pair = Pair.of(of_class(Wrapped))
    pair.ask([tokens(60, seed=1)], max_new_tokens=12)
    assert NOT_PLAIN in str(pair.paged.stats().fallbacks)


class Functions(TorchFunctionMode):
    """Changes products of latents."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        return made * 1.2 if function is nn.functional.linear and args[0].shape[-1] == 16 else made


class Dispatched(TorchDispatchMode):
    """The same, of what torch dispatches."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        return made * 1.2 if function is torch.ops.aten.mm.default and args[0].shape[-1] == 16 else made


@pytest.mark.parametrize("mode", [Functions, Dispatched])
def test_modes_see_products(mode):
    pair = Pair("deepseek_v3")
    pair.ask(ROWS)
    usual = pair.ask(ROWS)
    pair.paged.clear()
    with mode():
        assert not torch.equal(pair.ask(ROWS), usual)
    assert NOT_PLAIN in str(pair.paged.stats().fallbacks)
    pair.paged.clear()
    pair.ask(ROWS)
    assert pair.paged.stats().fallbacks == {}


def test_a_default_device_sees_nothing():
    pair = Pair("deepseek_v3")
    with torch.device("cpu"):
        pair.ask(ROWS)
    assert pair.paged.stats().fallbacks == {}


def test_without_onednn():
    pair = Pair("deepseek_v3")
    with torch.backends.mkldnn.flags(enabled=False):
        pair.ask(ROWS)
    assert pair.paged.stats().fallbacks == {}


def test_double_precision():
    pair = Pair.of(without_experts().double())
    pair.ask([[*SYSTEM, 5, 6], [*SYSTEM, 7], tokens(30, seed=8)])
    assert pair.paged.stats().fallbacks == {}


def test_losses_and_gradients_are_those_of_stock(pair):
    ids = torch.tensor([ROWS[0]])
    pair.ask(ROWS)
    losses = []
    for model in (pair.stock, pair.model):
        model.train().requires_grad_(True)
        loss = model(ids, labels=ids).loss
        loss.backward()
        losses.append((loss, model.model.layers[0].self_attn.kv_b_proj.weight.grad))
    assert torch.equal(losses[0][0], losses[1][0])
    assert torch.equal(losses[0][1], losses[1][1])


@pytest.mark.parametrize("part", [[], ["model"], ["model", "layers", "0", "self_attn"]], ids=".".join)
def test_compiled_models(part):
    pair = Pair("deepseek_v3")
    torch.compiler.reset()
    pair.both(lambda model: model.get_submodule(".".join(part)).compile(backend="eager"))
    pair.ask(ROWS)
    torch.compiler.reset()
    assert pair.paged.stats().fallbacks == {}


def test_reference_attention():
    pair = Pair("deepseek_v3", attention_backend="reference")
    pair.ask([[*SYSTEM, 5], [*SYSTEM, 6, 7], tokens(30, seed=8)])
    assert pair.paged.stats().fallbacks == {}


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_quantized_latents_are_packed(kind):
    """What comes out is test_quantized's; here, that it is not in stock's shapes."""
    model = patch_model(copy_of(FAMILIES["deepseek_v3"]), kv_cache_dtype=kind, verify=False)
    model.generate(**batch(ROWS), max_new_tokens=4)
    assert model.paged.stats().fallbacks == {}
