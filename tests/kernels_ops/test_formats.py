"""Formats of quantized KV by themselves: bounds of their errors, bytes, and the native library against plain torch."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, strategies
from quantized import hadamard, odd_numbers, rounded

from hf_paged_kernels import (
    FORMATS,
    KVRecords,
    NativeKernel,
    NativeStore,
    Part,
    Parts,
    TokenFormat,
    paged_attention_reference,
    rotated,
)
from hf_paged_kernels.formats import GroupedNibbles
from hf_paged_kernels.native import variants

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Half a step of the codes, as a part of the largest number beside; e4m3's largest step is an eighth at 256 of 448.
ERROR = {torch.int8: 0.5 / 127, torch.float8_e4m3fn: 16 / 448}
VARIANTS = variants()
SIDES = pytest.mark.parametrize(("name", "side"), [(name, side) for name in FORMATS for side in ("keys", "values")])


def side_of(name: str, side: str) -> TokenFormat:
    return getattr(FORMATS[name], side)


def step_of(token_format: TokenFormat, numbers: torch.Tensor) -> torch.Tensor:
    """The largest error of rounding numbers `[n, dim]` by the format."""
    if isinstance(token_format, GroupedNibbles):
        least, most = numbers.unflatten(-1, (-1, token_format.group_channels(numbers.shape[-1]))).aminmax(dim=-1)
        # Half a step, and what float16 leaves of step and minimum.
        return ((most - least) / 30 + (most.abs() + least.abs()) * 2**-10 + 15 * 2**-24).amax(dim=-1)
    return ERROR[token_format.codes] * numbers.abs().amax(dim=-1) + 1e-36


@SIDES
@given(
    seed=strategies.integers(0, 2**32),
    dim=strategies.sampled_from((16, 48, 64, 80, 128)),
    size=strategies.floats(-20, 7),
)
def test_what_is_decoded_is_within_half_a_step(name, side, seed, dim, size):
    token_format = side_of(name, side)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, dim, generator=generator) * torch.randn(3, dim, generator=generator).exp() * 2.0**size
    if seed % 3 == 0:
        x = x.abs()
    records = token_format.encode(x)
    assert records.shape == (3, token_format.record_bytes(dim))
    before, after = x, token_format.decode_codes(records, dim)
    if token_format.is_rotated:
        before = x @ hadamard(dim).float()
    assert ((after - before).abs().amax(dim=-1) <= step_of(token_format, before) * (1 + 1e-4)).all()
    if token_format.is_rotated:
        after = (after.double() @ hadamard(dim)).float()
    torch.testing.assert_close(
        token_format.decode(records, dim, torch.float32), after, rtol=0, atol=1e-5 * float(x.abs().max())
    )


@SIDES
@pytest.mark.parametrize("dim", [16, 48, 64, 96])
def test_decoded_numbers_are_those_of_the_second_implementation(name, side, dim):
    token_format, x = side_of(name, side), odd_numbers(torch.float32, dim)
    finite = x[x.isfinite().all(dim=-1)]
    records = token_format.encode(finite)
    actual, expected = token_format.decode(records, dim, torch.float32), rounded(finite, name, side == "keys")
    most = finite.abs().amax(dim=-1, keepdim=True)
    assert ((actual - expected).abs() <= 1e-6 * most + 1e-37).all()
    assert torch.equal(actual[0], torch.zeros(dim))


@SIDES
def test_what_is_not_finite_is_nan_as_a_whole(name, side):
    token_format, x = side_of(name, side), odd_numbers(torch.float32)
    decoded = token_format.decode(token_format.encode(x), 64, torch.float32)
    assert torch.equal(decoded.isnan().all(dim=-1), ~x.isfinite().all(dim=-1))
    assert torch.equal(decoded.isnan().any(dim=-1), ~x.isfinite().all(dim=-1))


def test_what_float16_does_not_hold_is_nan_as_a_whole_in_int4():
    x = torch.randn(2, 64)
    x[0, 5] = 1e6
    for side in ("keys", "values"):
        token_format = side_of("int4", side)
        decoded = token_format.decode(token_format.encode(x), 64, torch.float32)
        assert decoded.isnan().tolist() == [[True] * 64, [False] * 64]


@pytest.mark.parametrize("dim", [64, 128])
def test_the_bytes_of_a_token(dim):
    of_bfloat16 = {
        name: (each.keys.record_bytes(dim) + each.values.record_bytes(dim)) / (4 * dim)
        for name, each in FORMATS.items()
    }
    assert of_bfloat16["int4"] <= 0.30
    assert max(of_bfloat16["int8"], of_bfloat16["fp8"]) <= 0.54


def test_a_rotation_is_its_own_inverse_and_keeps_products():
    for rows, dim in ((7, 1), (7, 2), (1, 24), (7, 64), (1, 64), (7, 80), (0, 16)):
        x, y = torch.randn(2, rows, dim)
        given = x.clone()
        torch.testing.assert_close(rotated(rotated(x)), x)
        torch.testing.assert_close((rotated(x) * rotated(y)).sum(-1), (x * y).sum(-1), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(rotated(x).double(), x.double() @ hadamard(dim), atol=1e-5, rtol=1e-5)
        assert torch.equal(x, given)


@pytest.mark.parametrize("dims", [(8, 64), (64, 24)])
def test_int4_is_there_for_multiples_of_16_channels(dims):
    with pytest.raises(
        ValueError, match=f"kv_cache_dtype='int4': .* multiples of 16, but K has {dims[0]} and V {dims[1]}"
    ):
        FORMATS["int4"].check(*dims)
    FORMATS["int8"].check(*dims)
    FORMATS["int4"].check(48, 80)


def memory_of(records: KVRecords, heads: int, slots: int) -> list[torch.Tensor]:
    return [torch.zeros(heads, slots, size, dtype=torch.uint8) for size in (records.key_bytes, records.value_bytes)]


@pytest.mark.usefixtures("native_library")
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [(64, 48), (16, 256), (96, 80)])
def test_the_native_store_encodes_bit_for_bit_as_torch(name, dtype, dims):
    records = KVRecords(FORMATS[name], *dims)
    fresh, memory = [odd_numbers(dtype, dim) for dim in dims], memory_of(records, 3, 90)
    assert NativeStore(*memory, records).write_rows(*fresh, 5, 1)
    sides = (FORMATS[name].keys, FORMATS[name].values)
    for stored, new, token_format, dim in zip(memory, fresh, sides, dims, strict=True):
        expected = token_format.encode(new.transpose(0, 1).flatten(1, 2))
        is_nan = token_format.decode(expected, dim, dtype).isnan().any(dim=-1)  # whatever the NaN
        assert torch.equal(stored[:, 5:85][~is_nan], expected[~is_nan])
        assert token_format.decode(stored[:, 5:85], dim, dtype)[is_nan].isnan().all()
        assert not stored[:, :5].any()
        assert not stored[:, 85:].any()


@pytest.mark.parametrize(
    ("name", "dims"), [("int8", (30, 64)), ("int8", (4, 64)), ("int8", (264, 64)), ("int4", (272, 64))]
)
@pytest.mark.usefixtures("native_library")
def test_what_the_native_store_does_not_encode_is_left_to_torch(name, dims):
    records = KVRecords(FORMATS[name], *dims)
    memory = memory_of(records, 1, 9)
    new = [torch.ones(1, 1, 2, dim) for dim in dims]
    assert not NativeStore(*memory, records).write_rows(*new, 3, 1)
    assert not any(each.any() for each in memory)


# What each variant takes of these: vectors of four-bit codes lie in one half of a dim.
TAKEN = [
    (name, variant, dims)
    for variant, name, dims in itertools.product(VARIANTS, FORMATS, [(64, 48), (16, 128), (256, 96), (64, 64)])
    if VARIANTS[variant].takes(torch.float32, *dims, FORMATS[name])
]


def test_every_variant_takes_every_format():
    assert {case[:2] for case in TAKEN} == set(itertools.product(FORMATS, VARIANTS))


@pytest.mark.parametrize(("name", "variant", "dims"), TAKEN)
@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_every_variant_attends_to_what_the_codes_stand_for(name, variant, group, dims):
    records, kernel = KVRecords(FORMATS[name], *dims), VARIANTS[variant]
    for dtype, tolerance in zip(DTYPES, (2e-6, 8e-3, 1e-3), strict=True):
        sides = (FORMATS[name].keys, FORMATS[name].values)
        keys, values = (side.encode(torch.randn(2, 300, dim).to(dtype)) for side, dim in zip(sides, dims, strict=True))
        keys[:, :3], values[:, :3] = 255, 255  # memory that nobody owns
        query = torch.randn(5, 2 * group, dims[0]).to(dtype)
        sinks = torch.randn(2 * group)
        parts = Parts(5, [Part(0, 5, 0, 2, 202, 150)], [(3, 77), (120, 130)])
        actual = kernel.attend(query, keys, values, parts, 0.2, 5.0, sinks, records)
        slots = torch.tensor([*range(3, 80), *range(120, 250)])
        segments = [(5, slots)]
        expected = paged_attention_reference(query.float(), keys, values, segments, 0.2, 5.0, 150, sinks, records)
        error = (actual.float() - expected).abs().max() / expected.abs().max()
        assert error <= tolerance, f"{dtype}: {error:.1g} of the largest"


def test_a_vector_of_codes_lies_in_one_half_of_a_record():
    wide = SimpleNamespace(lanes=16)  # whatever this CPU has
    assert NativeKernel.takes(wide, torch.float32, 64, 96, FORMATS["int4"])
    assert NativeKernel.takes(wide, torch.float32, 48, 80, FORMATS["int8"])
    assert not NativeKernel.takes(wide, torch.float32, 48, 64, FORMATS["int4"])
    assert NativeKernel.takes(SimpleNamespace(lanes=8), torch.float32, 48, 80, FORMATS["int4"])
