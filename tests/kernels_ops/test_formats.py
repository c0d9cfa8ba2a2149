"""Formats of quantized KV by themselves: bounds of their errors, bytes, and the native library against plain torch."""

import pytest
import torch
from hypothesis import given, strategies
from quantized import rounded

from hf_paged_kernels import FORMATS, NativeStore, Part, Parts, paged_attention_reference
from hf_paged_kernels.native import variants

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Half a step of the codes, as a part of the largest number beside; e4m3's largest step is an eighth at 256 of 448.
ERROR = {"int8": 0.5 / 127, "fp8": 16 / 448}
VARIANTS = variants()


def odd_numbers(dtype: torch.dtype, dim: int = 64) -> torch.Tensor:
    """`[2, 3, 40, dim]` of many sizes, with zeros, outliers, NaN and infinity among them."""
    generator = torch.Generator().manual_seed(dim)
    x = torch.randn(2, 3, 40, dim, generator=generator) * torch.randn(2, 3, 40, 1, generator=generator).exp()
    x[0, 0, 0], x[0, 0, 1, 5], x[0, 0, 2, 5] = 0, torch.nan, -torch.inf
    x[0, 0, 3] *= 1e-7
    x[0, 0, 4] *= 1e-42  # subnormal, or nothing
    x[1, :, :, 3] *= 100
    return x.to(dtype)


@pytest.mark.parametrize("name", FORMATS)
@given(
    numbers=strategies.lists(strategies.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=24),
    dtype=strategies.sampled_from(DTYPES),
)
def test_what_is_decoded_is_within_half_a_step(name, numbers, dtype):
    token_format = FORMATS[name]
    x = torch.tensor(numbers).to(dtype).nan_to_num(posinf=0, neginf=0)
    records = token_format.encode(x)
    assert records.shape == (token_format.record_bytes(len(numbers)),)
    decoded = token_format.decode(records, torch.float32)
    most = x.float().abs().max()
    assert ((decoded - x.float()).abs() <= ERROR[name] * most * (1 + 1e-5) + 1e-36).all()
    assert (decoded * x.float() >= 0).all(), "no sign changes"


@pytest.mark.parametrize("name", FORMATS)
def test_decoded_numbers_are_those_of_the_second_implementation(name):
    x = odd_numbers(torch.float32)
    finite = x[x.isfinite().all(dim=-1)]
    actual = FORMATS[name].decode(FORMATS[name].encode(finite), torch.float32)
    torch.testing.assert_close(actual, rounded(finite, name), rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_not_finite_is_nan_as_a_whole(name):
    x = odd_numbers(torch.float32)
    decoded = FORMATS[name].decode(FORMATS[name].encode(x), torch.float32)
    assert torch.equal(decoded.isnan().all(dim=-1), ~x.isfinite().all(dim=-1))
    assert torch.equal(decoded.isnan().any(dim=-1), ~x.isfinite().all(dim=-1))


@pytest.mark.parametrize("name", FORMATS)
def test_a_record_takes_little_more_than_half_of_bfloat16(name):
    assert FORMATS[name].record_bytes(64) <= 0.54 * 2 * 64


@pytest.mark.skipif(not VARIANTS, reason="the native kernel was not built")
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_native_store_encodes_bit_for_bit_as_torch(name, dtype):
    token_format, key, value = FORMATS[name], odd_numbers(dtype), odd_numbers(dtype, 24)
    memory = [torch.zeros(3, 90, token_format.record_bytes(dim), dtype=torch.uint8) for dim in (64, 24)]
    assert NativeStore(*memory, token_format).write_rows(key, value, 5, 1)
    for stored, new in zip(memory, (key, value), strict=True):
        expected = token_format.encode(new.transpose(0, 1).flatten(1, 2))
        is_nan = token_format.decode(expected, dtype).isnan().any(dim=-1)  # whatever the NaN
        assert torch.equal(stored[:, 5:85][~is_nan], expected[~is_nan])
        assert token_format.decode(stored[:, 5:85], dtype)[is_nan].isnan().all()
        assert not stored[:, :5].any()
        assert not stored[:, 85:].any()


@pytest.mark.parametrize("dims", [(30, 64), (4, 64), (264, 64)])
def test_what_the_native_store_does_not_encode_is_left_to_torch(dims):
    if not VARIANTS:
        pytest.skip("the native kernel was not built")
    token_format = FORMATS["int8"]
    memory = [torch.zeros(1, 9, token_format.record_bytes(dim), dtype=torch.uint8) for dim in dims]
    new = [torch.ones(1, 1, 2, dim) for dim in dims]
    assert not NativeStore(*memory, token_format).write_rows(*new, 3, 1)
    assert not any(each.any() for each in memory)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_every_variant_attends_to_what_the_codes_stand_for(name, variant, group):
    token_format, kernel = FORMATS[name], VARIANTS[variant]
    for dtype, tolerance in zip(DTYPES, (2e-6, 8e-3, 1e-3), strict=True):
        keys, values = (token_format.encode(torch.randn(2, 300, dim).to(dtype)) for dim in (64, 48))
        keys[:, :3], values[:, :3] = 255, 255  # memory that nobody owns
        query = torch.randn(5, 2 * group, 64).to(dtype)
        sinks = torch.randn(2 * group)
        parts = Parts(5, [Part(0, 5, 0, 2, 202, 150)], [(3, 77), (120, 130)])
        actual = kernel.attend(query, keys, values, parts, 0.2, 5.0, sinks, token_format)
        slots = torch.tensor([*range(3, 80), *range(120, 250)])
        segments = [(5, slots)]
        expected = paged_attention_reference(query.float(), keys, values, segments, 0.2, 5.0, 150, sinks, token_format)
        error = (actual.float() - expected).abs().max() / expected.abs().max()
        assert error <= tolerance, f"{dtype}: {error:.1g} of the largest"
