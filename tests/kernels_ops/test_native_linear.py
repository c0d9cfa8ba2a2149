"""Linear layers of few rows on the native library, against float64."""

import pytest
import torch
from tolerances import ATTENTION, assert_close

from hf_paged_kernels import NativeError

pytestmark = pytest.mark.usefixtures("native_library")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6, 7, 12, 17, 64, 500])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_and_outputs(kernel, dtype, rows):
    for outputs, inputs in [(1, 32), (3, 64), (4, 96), (37, 576), (258, 1056)]:
        given, weight, bias = numbers(rows, inputs, dtype=dtype), numbers(outputs, inputs, dtype=dtype), None
        for bias in (None, numbers(outputs, dtype=dtype)):
            expected = given.double() @ weight.double().T + (0 if bias is None else bias.double())
            found = kernel.linear.multiply(given, weight, bias)
            assert_close(found, expected.to(dtype), f"{rows} x {inputs} x {outputs}", ATTENTION)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_the_same_whatever_other_rows_there_are(kernel, dtype):
    given, weight = numbers(13, 96, dtype=dtype), numbers(50, 96, dtype=dtype)
    whole = kernel.linear.multiply(given, weight, None)
    for first, stop in [(0, 1), (3, 5), (7, 13)]:
        assert torch.equal(kernel.linear.multiply(given[first:stop], weight, None), whole[first:stop])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_threads_come_to_the_same(kernel, dtype, count, threads):
    """In pieces of the weights that several of them take."""
    given, weight = numbers(3, 576, dtype=dtype), numbers(700, 576, dtype=dtype)
    expected = kernel.linear.multiply(given, weight, None)
    threads(count)
    assert torch.equal(kernel.linear.multiply(given, weight, None), expected)


def test_strides_and_shapes_of_inputs(kernel):
    weight = numbers(20, 32)
    for given in (
        numbers(4, 3, 32)[:, -1:],
        numbers(32, 5).T,
        numbers(4, 64)[:, ::2],
        numbers(32).expand(6, 32),
        numbers(32),
    ):
        found = kernel.linear.multiply(given, weight, None)
        assert found.is_contiguous()
        assert_close(found, (given.double() @ weight.double().T).float(), f"{tuple(given.shape)}", ATTENTION)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_not_finite_make_nothing_of_others(kernel, dtype):
    given, weight = numbers(7, 64, dtype=dtype), numbers(20, 64, dtype=dtype)
    given[2], given[4, 5] = torch.nan, torch.inf
    finite = kernel.linear.multiply(given, weight, None).isfinite().all(1)
    assert finite.tolist() == [True, True, False, True, False, True, True]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_what_is_taken(kernel, dtype):
    """And nothing else."""
    for inputs in (1, 7, 8, 12, 16, 24, 48, 63, 64):
        given, weight = numbers(2, inputs, dtype=dtype), numbers(3, inputs, dtype=dtype)
        if kernel.linear.takes(dtype, inputs):
            assert dtype is not torch.float64
            assert kernel.linear.multiply(given, weight, None).shape == (2, 3)
        else:
            with pytest.raises(NativeError):
                kernel.linear.multiply(given, weight, None)
    assert kernel.linear.takes(dtype, 64) is (dtype is not torch.float64)


GOOD = {"input": (3, 64), "weight": (20, 64), "bias": (20,)}


@pytest.mark.parametrize(
    "damage",
    [
        {"input": numbers(3, 63)},
        {"input": numbers(3, 64).double()},
        {"input": numbers(3, 64).bfloat16()},
        {"input": torch.empty(0, 64)},
        {"input": torch.empty(3, 64, device="meta")},
        {"weight": numbers(64, 20).T},
        {"weight": torch.empty(20, 64, device="meta")},
        {"weight": torch.empty(0, 64), "bias": torch.empty(0)},
        {"bias": numbers(19)},
        {"bias": numbers(40)[::2]},
        {"bias": numbers(20).half()},
        {"input": numbers(3, 7), "weight": numbers(20, 7)},
    ],
    ids=lambda damage: ", ".join(f"{name} {tuple(each.shape)} {each.dtype}" for name, each in damage.items()),
)
def test_bad_calls_are_refused(kernel, damage):
    good = {name: numbers(*shape) for name, shape in GOOD.items()}
    kernel.linear.multiply(**good)
    with pytest.raises(NativeError):
        kernel.linear.multiply(**{**good, **damage})
