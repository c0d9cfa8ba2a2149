"""A torch that has dropped private names: nothing is computed but by calling its functions, and that is said."""

import importlib
import pkgutil
import subprocess
import sys

import pytest
import torch
from compare import copy_of
from families import FAMILIES, stock_model
from pair import Pair
from prompts import tokens
from test_unmasked import ask, layer, tensors

from hf_paged import patch_model, torch_compat
from hf_paged.watched import is_unwatched, one_pass
from hf_paged_kernels import attend_partial, partial

resolve_name = pkgutil.resolve_name


def reload_with(resolve) -> None:
    """Has a torch whose names `resolve` finds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pkgutil, "resolve_name", resolve)
        importlib.reload(torch_compat)


def names_looked_for() -> list[str]:
    names = []

    def noting(name):
        names.append(name)
        return resolve_name(name)

    reload_with(noting)
    return names


NAMES = names_looked_for()
ASKED = [name for name in NAMES if "_stack" in name]


@pytest.fixture
def other_torch():
    """Has a torch with something else by a name, nothing if it is `None`."""

    def other(changed: str, by=None) -> None:
        def resolve(name):
            if name != changed:
                return resolve_name(name)
            if by is None:
                raise AttributeError(name)
            return by

        reload_with(resolve)

    yield other
    importlib.reload(torch_compat)


def test_what_is_looked_for():
    assert len(NAMES) == 9
    assert len(ASKED) == 4
    assert torch_compat.OBSTACLE is None


def check_goes_on_as_stock(name: str, products: list[int], other_torch, by=None) -> None:
    pair, rows = Pair("llama"), [tokens(40, seed=1), tokens(23, seed=2)]
    pair.ask(rows)
    assert products
    with torch.no_grad(), one_pass():
        assert is_unwatched()
        assert ask(layer(3), *tensors()) is not None
    other_torch(name, by)
    products.clear()
    pair.ask(rows)
    assert not products
    with torch.no_grad(), one_pass():
        assert not is_unwatched()
        assert ask(layer(3), *tensors()) is None
    assert f"no usable {name.replace(':', '.')}" in str(pair.paged)
    assert "linear layers: torch's choice" in str(pair.paged)


@pytest.mark.parametrize("name", NAMES)
def test_without_a_name(name, products, all_variants, other_torch):
    check_goes_on_as_stock(name, products, other_torch)


@pytest.mark.parametrize("name", ASKED)
def test_a_function_that_wants_arguments(name, products, all_variants, other_torch):
    check_goes_on_as_stock(name, products, other_torch, by=lambda argument: 0)


def test_without_the_list_of_operators(other_torch):
    other_torch("torch:_C._jit_get_schemas_for_operator")
    assert not torch_compat.can_multiply()
    assert patch_model(copy_of(FAMILIES["llama"])).paged is not None


def test_a_process_that_never_had_any(tmp_path):
    stock_model("llama").save_pretrained(tmp_path)
    script = """
import sys, torch, transformers
import torch.utils._python_dispatch, torch.utils._device, torch.overrides
from transformers import AutoModelForCausalLM
stock, model = (AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval() for _ in range(2))
for owner, names in {
    torch._C: "_len_torch_dispatch_stack _len_torch_function_stack _jit_get_schemas_for_operator",
    torch._C._functorch: "peek_interpreter_stack",
    torch._C._nn: "linear scaled_dot_product_attention",
    torch.overrides: "_get_current_function_mode_stack",
    torch.utils._device: "DeviceContext",
}.items():
    for name in names.split():
        delattr(owner, name)
del torch._C.DisableTorchFunctionSubclass
from hf_paged import patch_model
inputs = torch.arange(3, 40).expand(2, -1)
patch_model(model)
for kwargs in ({}, {"num_beams": 2}):
    given = {"do_sample": False, "max_new_tokens": 8, **kwargs}
    assert torch.equal(model.generate(inputs, **given), stock.generate(inputs, **given))
assert model.paged.stats().shared_tokens > 0
print(model.paged)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert "no usable torch._C._functorch.peek_interpreter_stack, torch._C._len_torch_dispatch_stack" in done.stdout


def test_without_flash_attention(monkeypatch):
    query, key, value = torch.randn(2, 6, 5, 16), torch.randn(2, 2, 40, 16), torch.randn(2, 2, 40, 16)
    expected = attend_partial(query, key, value, 0.25)
    monkeypatch.setattr(partial, "_FLASH_CPU", None)
    for one, other in zip(attend_partial(query, key, value, 0.25), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
