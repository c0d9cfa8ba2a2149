"""Dense K and V without a mask on the native kernel: what transformers returns, or it is left to that."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from families import stock_model
from media_prompts import prompt
from more_models import SCALE, build, randomize
from pair import Pair
from prompts import tokens
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from versions import skip_if_older

from hf_paged.backends import cpu
from hf_paged.unmasked import attend_unmasked
from hf_paged.watched import one_pass

pytestmark = pytest.mark.usefixtures("all_variants")

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def layer(group: int = 1, **attributes) -> torch.nn.Module:
    """What an attention layer says of itself."""
    module = torch.nn.Module()
    module.num_key_value_groups = group
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


RUNTIME = SimpleNamespace(config=SimpleNamespace(attention_backend="auto"))


def ask(module, *tensors, function=sdpa_attention_forward, runtime=RUNTIME, scaling=None, dropout=0.0, **kwargs):
    return attend_unmasked(function, module, *tensors, runtime, scaling, dropout, kwargs)


def tensors(heads=6, kv_heads=2, queries=40, kv_tokens=40, dim=32, value_dim=32, rows=2, dtype=torch.float32):
    """Query, key and value, as projections leave them: heads side by side in each token."""
    shapes = (heads, queries, dim), (kv_heads, kv_tokens, dim), (kv_heads, kv_tokens, value_dim)
    return [torch.randn(rows, count, h, d).to(dtype).transpose(1, 2) for h, count, d in shapes]


SHAPES = {
    "plain": {},
    "one row": {"rows": 1},
    "long": {"queries": 300, "kv_tokens": 300},
    "latent": {"dim": 48, "value_dim": 32, "kv_heads": 6},
    "wide": {"dim": 128, "value_dim": 128},
    "odd dim": {"dim": 72, "value_dim": 72},
}


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_as_transformers(shape, causal, dtype, contiguous):
    given = tensors(**SHAPES[shape], dtype=dtype)
    if contiguous:
        given = [each.contiguous() for each in given]
    module = layer(given[0].shape[1] // given[1].shape[1], is_causal=causal)
    for scaling in (None, 0.3):
        with torch.no_grad(), one_pass():
            actual = ask(module, *given, scaling=scaling)
        expected, _ = sdpa_attention_forward(module, *given, None, scaling=scaling)
        assert actual.shape == expected.shape
        assert actual.is_contiguous()
        assert (actual - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


def test_a_query_may_have_other_tokens_than_keys():
    given = tensors(queries=30, kv_tokens=77)
    with torch.no_grad(), one_pass():
        actual = ask(layer(3), *given, is_causal=False)
    assert (actual - sdpa_attention_forward(layer(3), *given, None, is_causal=False)[0]).abs().max() < 1e-5


def test_a_single_key():
    """Its tokens' stride says nothing, as there is one token only."""
    given = tensors(queries=30, kv_tokens=1)
    with torch.no_grad(), one_pass():
        actual = ask(layer(3), *given, is_causal=False)
    assert (actual - sdpa_attention_forward(layer(3), *given, None, is_causal=False)[0]).abs().max() < 1e-5


class Mode(TorchFunctionMode):
    """Somebody who looks on."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def wrapped(*args, **kwargs):
    """Somebody's attention."""
    return sdpa_attention_forward(*args, **kwargs)


PLAIN = layer(3)
REFUSED = {
    "gradients": lambda given: (torch.enable_grad(), lambda: ask(PLAIN, *given)),
    "autocast": lambda given: (torch.autocast("cpu"), lambda: ask(PLAIN, *given)),
    "a mode": lambda given: (Mode(), lambda: ask(PLAIN, *given)),
    "the plain kernel wanted": lambda given: (sdpa_kernel(SDPBackend.MATH), lambda: ask(PLAIN, *given)),
    "dropout": lambda given: (nullcontext(), lambda: ask(PLAIN, *given, dropout=0.1)),
    "a bias": lambda given: (nullcontext(), lambda: ask(PLAIN, *given, position_bias=torch.zeros(1, 6, 40, 40))),
    "a softcap": lambda given: (nullcontext(), lambda: ask(PLAIN, *given, softcap=3.0)),
    "weights wanted": lambda given: (nullcontext(), lambda: ask(PLAIN, *given, output_attentions=True)),
    "another function": lambda given: (nullcontext(), lambda: ask(PLAIN, *given, function=wrapped)),
    "no runtime": lambda given: (nullcontext(), lambda: ask(PLAIN, *given, runtime=None)),
    "plain torch wanted": lambda given: (
        nullcontext(),
        lambda: ask(PLAIN, *given, runtime=SimpleNamespace(config=SimpleNamespace(attention_backend="reference"))),
    ),
    "attention for another device": lambda given: (
        nullcontext(),
        lambda: ask(
            PLAIN,
            *[each.to("meta") for each in given],
            runtime=SimpleNamespace(config=SimpleNamespace(attention_backend="cpu")),
        ),
    ),
    "a parameter": lambda given: (
        nullcontext(),
        lambda: ask(PLAIN, torch.nn.Parameter(given[0], requires_grad=False), *given[1:]),
    ),
    "another number of heads": lambda given: (nullcontext(), lambda: ask(layer(2), *given)),
    "a row for all": lambda given: (nullcontext(), lambda: ask(PLAIN, given[0][:1], *given[1:])),
    "no tokens": lambda given: (
        nullcontext(),
        lambda: ask(PLAIN, given[0], given[1][:, :, :0], given[2][:, :, :0], is_causal=False),
    ),
    "causal with a past": lambda given: (nullcontext(), lambda: ask(PLAIN, given[0][:, :, 5:], *given[1:])),
    "few queries": lambda given: (nullcontext(), lambda: ask(PLAIN, given[0][:, :, :16], *given[1:], is_causal=False)),
    "other dtypes": lambda given: (nullcontext(), lambda: ask(PLAIN, given[0].half(), *given[1:])),
}


@pytest.mark.parametrize("what", REFUSED)
def test_left_to_transformers(what):
    given = tensors()
    context, call = REFUSED[what](given)
    with torch.no_grad(), one_pass():
        assert ask(PLAIN, *given) is not None
        with context:
            assert call() is None


def test_outside_of_a_pass_it_is_left_to_transformers():
    given = tensors()
    with torch.no_grad():
        assert ask(PLAIN, *given) is None
        with one_pass():
            assert ask(PLAIN, *given) is not None
        assert ask(PLAIN, *given) is None


def test_a_function_of_torch_that_somebody_has_replaced_is_called(monkeypatch):
    given = tensors()
    with torch.no_grad(), one_pass(), monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *args, **kwargs: None)
        assert ask(PLAIN, *given) is None


def test_where_prompts_were_not_measured_torch_takes_what_its_flash_attention_does(all_variants, monkeypatch):
    available = all_variants._replace(multiplies=False)
    monkeypatch.setattr("hf_paged.backends.native.native_kernels", lambda: available)
    with torch.no_grad(), one_pass():
        assert ask(PLAIN, *tensors()) is None
        assert ask(layer(), *tensors(**SHAPES["latent"])) is not None


@pytest.fixture
def taken(monkeypatch) -> list:
    """Shapes of the queries that the backend attends with."""
    shapes = []
    attend = cpu.attend_dense

    def counting(query, *args):
        out = attend(query, *args)
        if out is not None:
            shapes.append(tuple(query.shape))
        return out

    monkeypatch.setattr(cpu, "attend_dense", counting)
    return shapes


def with_even_dims(name: str) -> torch.nn.Module:
    """The model of a family, its V of a dim that vectors divide."""
    stock = stock_model(name)
    config = copy.deepcopy(stock.config)
    if hasattr(config, "v_head_dim"):
        config.v_head_dim = 16
    model = type(stock)(config).eval()
    randomize(model, 5, SCALE)
    model.generation_config = stock.generation_config
    return model


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2", "lfm2"])
def test_prompts_in_stocks_shapes(name, taken, monkeypatch):
    monkeypatch.setattr("hf_paged.latent.may_keep", lambda kind: False)  # as on GPUs, where nobody reads latents
    pair = Pair.of(with_even_dims(name))
    pair.ask([tokens(60, seed=3)])
    if not taken:
        skip_if_older("the model's prompts are packed")
    assert 60 in {queries for _, _, queries, _ in taken}
    pair.ask([tokens(60, seed=3) + tokens(30, seed=4)])
    pair.ask([tokens(60, seed=5), tokens(47, seed=6)])
    taken.clear()
    with torch.no_grad():
        pair.model(torch.tensor([tokens(60, seed=3)]))
    assert not taken, "scoring is stock's"


def test_encoders_of_images(taken, monkeypatch):
    monkeypatch.setattr("hf_paged.backends.native.MAX_CHUNK_TOKENS", 3)  # the images are tiny
    pair = Pair.of(build("llava"))
    pair.ask(prompt("llava"))
    assert pair.model.config.vision_config.num_attention_heads in {heads for _, heads, _, _ in taken}
