"""Quantized KV on the Triton kernels: records as plain torch writes them, and whole calls of `generate`."""

import copy

import pytest
import torch
from families import FAMILIES
from prompts import batch, tokens
from quantized import RoundingCache, odd_numbers

from hf_paged import patch_model
from hf_paged_kernels import FORMATS, KVRecords
from hf_paged_kernels.launch import triton_obstacle

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
if triton_obstacle(DEVICE):
    pytest.skip(triton_obstacle(DEVICE), allow_module_level=True)  # says why these kernels cannot run here

from hf_paged_kernels.attend import takes  # noqa: E402 (behind the skip: imports triton)
from hf_paged_kernels.store import store_tokens, store_tokens_reference  # noqa: E402 (behind the skip)
from hf_paged_kernels.tuning import Tile  # noqa: E402 (behind the skip)

SHAPES = [(torch.float32, (64, 48)), (torch.bfloat16, (16, 256)), (torch.float16, (128, 80)), (torch.float32, (30, 64))]
CASES = [(name, *shape) for name in FORMATS for shape in SHAPES if name != "int4" or shape[1] != (30, 64)]  # 16 n only


def stored(key, value, records, left_out=()):
    """What the kernel and plain torch make of `key`, `value [1, heads, tokens, dim]`, from NaN; slots go backwards."""
    heads, count = key.shape[1:3]
    slots = torch.arange(count + 2, 2, -1, dtype=torch.int32, device=DEVICE)
    slots[list(left_out)] = -1
    pairs = []
    for store in (store_tokens, store_tokens_reference):
        sizes = records.key_bytes, records.value_bytes
        pairs.append([torch.full((heads, count + 9, size), 255).to(DEVICE, torch.uint8) for size in sizes])
        store(key.to(DEVICE), value.to(DEVICE), *pairs[-1], slots, records)
    return pairs


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, in the interpreter
@pytest.mark.parametrize(("name", "dtype", "dims"), CASES)
def test_records_are_those_of_plain_torch_bit_for_bit(name, dtype, dims):
    """Numbers of all sizes, what is not finite, and what float16 does not hold; nothing else is touched."""
    records = KVRecords(FORMATS[name], *dims)
    key, value = (odd_numbers(dtype, dim)[:1, :, :12] for dim in dims)
    value[0, 1, 5] *= 1e30
    for side, dim, actual, expected in zip(records.sides, dims, *stored(key, value, records, [3]), strict=True):
        is_nan = side.decode(expected, dim, torch.float32).isnan().any(dim=-1)  # whatever the NaN
        assert is_nan.any()
        assert not is_nan.all()
        assert torch.equal(actual[~is_nan], expected[~is_nan])
        assert side.decode(actual, dim, torch.float32)[is_nan].isnan().all()


@pytest.mark.parametrize("name", FORMATS)
def test_what_lies_between_two_codes_is_rounded_as_plain_torch_rounds_it(name):
    """All codes, all points halfway between two, and their neighbours."""
    if name == "int4":
        points = torch.arange(31) / 2
        row = [*points, *points.nextafter(torch.tensor(99.0))[:-1], 0, 0, 15]
        value = torch.tensor([row, [-x for x in row]])
        value = torch.cat([value, value * 1.4 * 2**-24])  # float16's smallest step: 16 of them do not reach the end
    else:
        codes = torch.arange(256, dtype=torch.uint8).view(torch.int8 if name == "int8" else torch.float8_e4m3fn)
        codes = codes.float()[codes.float().abs() <= FORMATS[name].values.largest].sort().values
        halfway = (codes[1:] + codes[:-1]) / 2
        above, below = (halfway.nextafter(torch.tensor(float(end))) for end in (999, -999))
        numbers = torch.cat([codes, halfway, above, below])
        rows = numbers[: len(numbers) // 63 * 63].unflatten(0, (-1, 63))
        value = torch.cat([rows, torch.full((len(rows), 1), codes[-1])], dim=1)  # the largest code: a scale of 1
    records = KVRecords(FORMATS[name], 16, 64)
    (_, actual), (_, expected) = stored(torch.ones(1, 1, len(value), 16), value[None, None], records)
    assert torch.equal(actual, expected)


def test_records_without_whole_words_are_left_to_plain_torch():
    query = torch.ones(1, 1, 30, device=DEVICE)
    for dims, are_taken in (((30, 64), False), ((64, 30), False), ((28, 64), True), ((64, 0), False)):
        records = KVRecords(FORMATS["int8"], *dims)
        memory = [
            torch.zeros(1, 16, size, dtype=torch.uint8, device=DEVICE)
            for size in (records.key_bytes, records.value_bytes)
        ]
        assert takes(query, *memory, records) == are_taken, dims


def logits_of(model, arguments, **kwargs):
    """`[rows, new tokens, vocabulary]`, and the tokens."""
    rows = [[*tokens(19, seed=1), 5, 6], [*tokens(19, seed=1), 7]]
    inputs = {name: each.to(DEVICE) for name, each in batch(rows).items()}
    made = model.generate(
        **inputs, max_new_tokens=3, **arguments, **kwargs, return_dict_in_generate=True, output_logits=True
    )
    return torch.stack(made.logits, dim=1), made.sequences


@pytest.mark.parametrize(("name", "beams"), [("int8", 1), ("fp8", 1), ("int4", 2)])
def test_generate_is_stock_on_rounded_kv(name, beams):
    """Rows that share a prefix of odd length, so that a block is copied; all of it through the kernels."""
    fewest = {"num_hidden_layers": 1, "num_key_value_heads": 1, "num_attention_heads": 2}
    stock = FAMILIES["llama"].build(**fewest).to(DEVICE)
    arguments = {"do_sample": False, "num_beams": beams}
    model = patch_model(
        copy.deepcopy(stock), attention_backend="triton", kv_cache_dtype=name, verify=False, block_size=16
    )
    actual, answer = logits_of(model, arguments)
    expected, wanted = logits_of(stock, arguments, past_key_values=RoundingCache(stock.config, name))
    plain, _ = logits_of(stock, arguments)
    assert torch.equal(answer, wanted)
    error, effect = ((each[:, :2] - expected[:, :2]).abs().max() for each in (actual, plain))
    assert error <= 1e-5 * expected.abs().max()
    assert effect > 100 * error, "the format makes no difference"
    assert model.paged.stats().fallbacks == {}
    assert model.paged.stats().copied_blocks
    assert "triton attention" in repr(model.paged)


@pytest.mark.parametrize(
    "feature", [{}, {"is_final": True, "has_sinks": True, "has_softcap": True}, {"has_window": True}]
)
@pytest.mark.parametrize("kv_format", ["int8", "fp8"])
def test_packed_codes_are_tried_before_they_are_trusted(kv_format, feature, monkeypatch):
    """Every row of a tile is held against the other way of reading records."""
    from hf_paged_kernels import attend as attend_module
    from hf_paged_kernels import trial

    nothing = dict.fromkeys(("is_final", "has_sinks", "has_softcap", "has_window"), False)
    shape = trial.Shape(kv_format, 64, 64, 8, Tile(16, 16, 4, 2), **(nothing | feature))
    trial.packs_right.cache_clear()
    asked, really = [], attend_module.attend
    assert trial.packs_right(shape, DEVICE)

    def miscompiled(*arguments):
        asked.append(arguments[-1])
        out = really(*arguments)
        if arguments[-1]:
            out[-1, -1, -1] *= 1.5  # the last number of the last row
            out[-1, -1, -1] += 0.1
        return out

    monkeypatch.setattr(attend_module, "attend", miscompiled)
    trial.packs_right.cache_clear()
    with pytest.warns(UserWarning, match="gives other numbers"):
        assert not trial.packs_right(shape, DEVICE)
    assert asked == [True, False]
    trial.packs_right.cache_clear()
