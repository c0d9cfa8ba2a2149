"""The Triton kernels against plain torch: compiled where there is a GPU, else under Triton's interpreter."""

import random

import pytest
import torch

from hf_paged_kernels import FORMATS, KVRecords
from hf_paged_kernels import work as work_module
from hf_paged_kernels.launch import triton_obstacle
from hf_paged_kernels.tuning import PAGE_TOKENS, Tile, part_tokens, tiles_for
from hf_paged_kernels.work import PageTables, cut, send

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
if triton_obstacle(DEVICE):
    pytest.skip(triton_obstacle(DEVICE), allow_module_level=True)  # says why these kernels cannot run here

from hf_paged_kernels.attend import (  # noqa: E402 (behind the skip: imports triton)
    attend,
    attend_parts,
    attend_parts_reference,
    merge_reference,
    takes,
)
from hf_paged_kernels.copy import (  # noqa: E402 (behind the skip)
    copy_slots,
    copy_slots_reference,
    copy_waves,
    pack_copies,
)
from hf_paged_kernels.store import store_tokens, store_tokens_reference  # noqa: E402 (behind the skip)

# Largest difference to float64, relative to the largest value: rounding of the result and of the weights before it.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
# Tiles of few rows and tokens, so that small cases have many.
SMALL_TILES = (Tile(16, 16, 4, 2), Tile(32, 16, 4, 2))


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(DEVICE, dtype)


def poisoned(*shape, dtype=torch.float32):
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


# -- store and copy ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "heads", "key_dim", "value_dim"),
    [(torch.float32, 3, 24, 16), (torch.bfloat16, 1, 80, 80), (torch.float16, 40, 256, 128)],
)
def test_store(dtype, heads, key_dim, value_dim):
    """Any strides of what comes, tokens that are not stored, and nothing else is touched."""
    key, value = randn(2, 3, heads, key_dim, dtype=dtype).transpose(1, 2), randn(3, 2, heads, value_dim, dtype=dtype)
    value = value.permute(1, 2, 0, 3)
    slots = torch.tensor([33, 5, -1, 70, 6, 12], dtype=torch.int32, device=DEVICE)
    memories = [[poisoned(heads, 77, dim, dtype=dtype) for dim in (key_dim, value_dim)] for _ in range(2)]
    store_tokens(key, value, *memories[0], slots)
    store_tokens_reference(key, value, *memories[1], slots)
    for name, actual, expected in zip(("K", "V"), *memories, strict=True):
        assert expected.isfinite().any()
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize(("dtype", "key_dim", "value_dim"), [(torch.float32, 24, 16), (torch.bfloat16, 128, 128)])
def test_copy_to_another_memory(dtype, key_dim, value_dim):
    """Many blocks and parts of blocks in one launch, to other slots and strides."""
    keys, values = randn(2, 200, key_dim, dtype=dtype), randn(2, 200, value_dim, dtype=dtype)
    copies = pack_copies([(16, 0, 16), (150, 16, 1), (3, 40, 37), (160, 100, 40)], DEVICE)
    memories = [[poisoned(150, 2, dim, dtype=dtype).transpose(0, 1) for dim in (key_dim, value_dim)] for _ in range(2)]
    copy_slots(keys, values, *memories[0], copies)
    copy_slots_reference(keys, values, *memories[1], copies)
    for name, actual, expected in zip(("K", "V"), *memories, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("seed", range(20))
def test_copies_that_depend_on_each_other_are_done_in_order(seed):
    """The copies of a launch may run in any order, and at the same time."""
    rng = random.Random(seed)
    copies = [(rng.randrange(40), rng.randrange(40), rng.randint(1, 8)) for _ in range(10)]
    copies = [(source, target, tokens) for source, target, tokens in copies if abs(source - target) >= tokens]
    expected, backwards, at_once = (list(range(48)) for _ in range(3))
    for source, target, tokens in copies:
        expected[target : target + tokens] = expected[source : source + tokens]
    for wave in copy_waves(copies, torch.device("cpu")):
        before = list(at_once)
        for source, target, tokens, _ in wave.tolist():
            at_once[target : target + tokens] = before[source : source + tokens]
        for source, target, tokens, _ in reversed(wave.tolist()):
            backwards[target : target + tokens] = backwards[source : source + tokens]
    assert at_once == expected
    assert backwards == expected
    assert copy_waves([(0, 16, 8), (32, 48, 8), (0, 64, 8)], torch.device("cpu"))[0].shape[0] == 3


# -- attention ---------------------------------------------------------------------------------------------------------


# Queries and tokens of the rows of a case.
LENGTHS = ((1, 37), (5, 5), (3, 40), (1, 1))


class Case:
    """Ragged queries over runs of random blocks: prompts with a past, single queries, and a past that some share."""

    def __init__(
        self,
        dtype,
        heads,
        kv_heads,
        key_dim,
        value_dim,
        window=None,
        softcap=None,
        sinks=False,
        kv_format=None,
        lengths=LENGTHS,
    ):
        rng = random.Random(0)
        self.group, self.kv_heads, self.window, self.dims = heads // kv_heads, kv_heads, window, (key_dim, value_dim)
        self.records = None if kv_format is None else KVRecords(FORMATS[kv_format], key_dim, value_dim)
        shape = (kv_heads, 40 * PAGE_TOKENS)
        self.keys, self.values = (poisoned(*shape, dim, dtype=dtype) for dim in (key_dim, value_dim))
        if self.records:
            sizes = self.records.key_bytes, self.records.value_bytes
            self.keys, self.values = (torch.full((*shape, size), 255).to(DEVICE, torch.uint8) for size in sizes)
        self.free = rng.sample(range(1, 40), 39)
        self.tables, queries = PageTables(), 0
        self.seen: dict[int, list[int]] = {}  # slots that each query sees
        for length, kv_len in lengths:
            runs = self.runs(kv_len)
            is_causal = window is not None or length > 1
            self.tables.add(queries, queries + length, runs, kv_len - length if is_causal else None)
            slots = [slot + i for slot, tokens in runs for i in range(tokens)]
            for i in range(length):
                last = kv_len - length + i + 1
                self.seen[queries + i] = slots[max(0, last - window) if window else 0 : last]
            queries += length
        if window is None and lengths == LENGTHS:
            # Runs that begin and end within a page, as behind a seam.
            blocks = [self.free.pop() * PAGE_TOKENS for _ in range(3)]
            runs = self.fill([(blocks[0] + 5, 11), (blocks[1], 13), (blocks[2], 7)])
            self.tables.add(0, 6, runs)
            for query in range(6):
                self.seen[query] += [slot + i for slot, tokens in runs for i in range(tokens)]
        self.rows = rng.sample(range(queries), queries)
        self.query = randn(queries, heads, key_dim, dtype=dtype)
        self.scale, self.softcap = 0.9 * key_dim**-0.5, softcap
        self.sinks = randn(heads) if sinks else None

    def runs(self, tokens):
        blocks = [self.free.pop() * PAGE_TOKENS for _ in range(-(-tokens // PAGE_TOKENS))]
        return self.fill([(slot, min(PAGE_TOKENS, tokens - i * PAGE_TOKENS)) for i, slot in enumerate(blocks)])

    def fill(self, runs):
        for slot, tokens in runs:
            key, value = (randn(self.kv_heads, tokens, dim) for dim in self.dims)
            if self.records:
                key, value = self.records.encode_keys(key), self.records.encode_values(value)
            self.keys[:, slot : slot + tokens], self.values[:, slot : slot + tokens] = key, value
        return runs

    def work(self, tiles=SMALL_TILES):
        return send(cut(self.tables, self.rows, tiles, self.group, self.kv_heads, 1, self.window), DEVICE)

    def attend(self, work):
        assert takes(self.query, self.keys, self.values, self.records)
        return attend(self.query, self.keys, self.values, work, self.scale, self.softcap, self.sinks, self.records)

    def expected(self):
        """Dense attention of each query, in float64."""
        out = torch.empty(*self.query.shape[:2], self.dims[1], dtype=torch.float64, device=DEVICE)
        keys, values = self.keys, self.values
        if self.records:
            keys = self.records.decode_keys(keys, torch.float32)
            values = self.records.decode_values(values, torch.float32)
        for query, slots in self.seen.items():
            q = self.query[self.rows[query]].double()  # [heads, dim]
            k, v = (m[:, slots].double().repeat_interleave(self.group, 0) for m in (keys, values))
            scores = torch.einsum("hd,hkd->hk", q, k) * self.scale
            if self.softcap is not None:
                scores = self.softcap * torch.tanh(scores / self.softcap)
            if self.sinks is not None:
                scores = torch.cat([scores, self.sinks.double().unsqueeze(1)], 1)
            out[self.rows[query]] = torch.einsum("hk,hkd->hd", scores.softmax(1)[:, : len(slots)], v)
        return out


def assert_near(actual, expected, what):
    tolerance = TOLERANCE[actual.dtype]
    error = (actual.double() - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"{what}: {error:.1g} of the largest value off, allowed {tolerance:.1g}"


CASES = {
    "gqa 3": (torch.float32, 6, 2, 64, 64, {}),
    "mla": (torch.float32, 2, 2, 24, 16, {"softcap": 5.0, "sinks": True}),
    "window": (torch.float32, 4, 1, 80, 80, {"window": 7, "sinks": True}),
    "half": (torch.float16, 8, 1, 96, 64, {"window": 20, "softcap": 3.0}),
    "gqa 16": (torch.bfloat16, 16, 1, 64, 128, {"sinks": True}),
    "wide": (torch.bfloat16, 2, 1, 256, 192, {"softcap": 20.0}),
    "int8": (torch.float32, 6, 2, 64, 48, {"kv_format": "int8"}),
    "int8, wide": (torch.bfloat16, 2, 1, 256, 192, {"kv_format": "int8", "softcap": 20.0}),
    "fp8": (torch.float32, 2, 2, 24, 16, {"kv_format": "fp8", "softcap": 5.0, "sinks": True}),
    "fp8, half": (torch.float16, 8, 1, 96, 64, {"kv_format": "fp8", "window": 20, "softcap": 3.0}),
    "int4": (torch.float32, 4, 1, 80, 48, {"kv_format": "int4", "window": 7, "sinks": True}),
    "int4, gqa 16": (torch.bfloat16, 16, 1, 64, 128, {"kv_format": "int4", "sinks": True}),
    "int4, half": (torch.float16, 3, 1, 16, 256, {"kv_format": "int4"}),
    "int8, packed": (torch.bfloat16, 4, 2, 96, 64, {"kv_format": "int8", "window": 20, "sinks": True}),
    "fp8, packed": (torch.bfloat16, 8, 1, 80, 128, {"kv_format": "fp8", "window": 7}),
    "int4, packed": (torch.bfloat16, 4, 2, 128, 128, {"kv_format": "int4", "softcap": 5.0}),
}
WHOLE = ("mla", "window", "half", "fp8, half", "int4")


@pytest.mark.parametrize(("name", "split"), [*((name, True) for name in CASES), *((name, False) for name in WHOLE)])
def test_attend(name, split, monkeypatch):
    """In parts of about 8 tokens, or as few parts as there can be."""
    *shape, arguments = CASES[name]
    some = min(8, arguments.get("window", 16) - 2)
    monkeypatch.setattr(work_module, "part_tokens", lambda *_: some if split else 10**6)
    case = Case(*shape, **arguments)
    work = case.work()
    assert (work.num_parts > 0) == (split or "window" not in arguments)
    assert_near(case.attend(work), case.expected(), name)


@pytest.mark.parametrize("window", [None, 17])
def test_tiles_of_many_queries(window):
    """Queries of one tile that see up to two tiles of tokens more, or less, than others."""
    case = Case(torch.float32, 1, 1, 16, 16, window=window, lengths=((30, 73),))
    assert_near(case.attend(case.work()), case.expected(), "a chunk of a prompt")


@pytest.mark.parametrize("name", ["int8, packed", "fp8, packed", "int4, packed"])
def test_what_is_not_finite_shows(name):
    """A query that sees a record of K, or of V, that is NaN as a whole is NaN; another is what it was."""
    *shape, arguments = CASES[name]
    case = Case(*shape, **arguments, lengths=((1, 20), (1, 3)))
    expected = case.attend(case.work())
    slot, (row, other) = case.seen[0][-1], case.rows
    sides = (case.keys, case.records.encode_keys), (case.values, case.records.encode_values)
    for (memory, encode), dim in zip(sides, case.dims, strict=True):
        kept = memory[:, slot].clone()
        memory[:, slot] = encode(poisoned(case.kv_heads, dim))
        actual = case.attend(case.work())
        memory[:, slot] = kept
        assert actual[row].isnan().all()
        assert torch.equal(actual[other], expected[other])


def test_real_tiles():
    """The shapes that are used on a GPU, where they leave most of a tile empty."""
    case = Case(torch.bfloat16, 4, 2, 64, 64)
    assert_near(case.attend(case.work(tiles_for(torch.bfloat16, 64, 64, 2))), case.expected(), "real tiles")


@pytest.mark.parametrize("scale", [-40.0, 0.0, 40.0])
def test_any_scale(scale):
    """Also such as make the largest of the products the least of the scores."""
    case = Case(torch.float32, 4, 2, 32, 16)
    case.scale = scale
    assert_near(case.attend(case.work()), case.expected(), f"scale {scale}")


def test_parts_and_empty_parts(monkeypatch):
    """Each part by itself, also those in which a query sees nothing; the merge leaves them out."""
    monkeypatch.setattr(work_module, "part_tokens", lambda *_: 16)
    case = Case(torch.float32, 2, 1, 32, 16)
    work = case.work()
    (launch, *_) = work.launches
    doubled = next(item for item in launch.items if int((work.part_starts.diff() > 1)[item[0]]))
    doubled[4] = doubled[3]  # hi = lo
    actual = attend_parts(case.query, case.keys, case.values, work, case.scale)
    expected = attend_parts_reference(case.query, case.keys, case.values, work, case.scale)
    assert expected[1].isneginf().any()
    assert not expected[1].isneginf().all()
    assert_near(actual[0], expected[0], "parts")
    torch.testing.assert_close(actual[1].double(), expected[1], rtol=1e-5, atol=1e-5)
    assert_near(case.attend(work), merge_reference(*expected, work), "merged")


@pytest.mark.parametrize("parts", [1, 2])
def test_a_query_that_sees_nothing_gets_zeros(parts):
    tables = PageTables()
    for _ in range(parts):
        tables.add(0, 1, [(16, 3)])
    work = send(cut(tables, [0], SMALL_TILES, 1, 1, 1), DEVICE)
    work.launches[0].items[:, 4] = work.launches[0].items[:, 3]
    memory = poisoned(1, 32, 16)
    assert attend(randn(1, 1, 16), memory, memory, work, 1.0).eq(0).all()


def test_offsets_beyond_32_bits():
    """Slots whose elements lie beyond 2^31, with the kernels' own addresses; pages that nobody touches cost nothing."""
    dim, far = 16, 2**27 + 64
    memory = torch.empty(1, far + 64, dim, dtype=torch.float16, device=DEVICE)
    key, value = randn(1, 1, 20, dim, dtype=torch.float16), randn(1, 1, 20, dim, dtype=torch.float16)
    here = torch.arange(far, far + 20, dtype=torch.int32, device=DEVICE)
    store_tokens(key, value, memory, memory[:, 32:], here)
    copy_slots(memory, memory, memory, memory[:, 32:], pack_copies([(far, 16, 20), (far + 32, 16, 20)], DEVICE)[:1])
    assert torch.equal(memory[:, far : far + 20], key[0])
    assert torch.equal(memory[:, far + 32 : far + 52], value[0])
    assert torch.equal(memory[:, 16:36], key[0])
    tables = PageTables()
    tables.add(0, 1, [(far, 20)])
    work = send(cut(tables, [0], SMALL_TILES, 1, 1, 1), DEVICE)
    query = randn(1, 1, dim, dtype=torch.float16)
    weights = (query[0].double() @ key[0, 0].double().T * 0.25).softmax(-1)
    assert_near(attend(query, memory, memory[:, 32:], work, 0.25), (weights @ value[0, 0].double())[None], "far slots")


# -- layout ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_items_show_each_query_what_it_sees_once(seed):
    """Random stretches, windows, tiles and numbers of processors: items against a plain count."""
    rng = random.Random(seed)
    window = rng.choice([None, None, rng.randint(1, 60)])
    tables, expected, queries = PageTables(), {}, 0
    for _ in range(rng.randint(1, 5)):
        length, past = rng.choice([1, 1, rng.randint(2, 70)]), rng.randint(0, 500)
        causal = window is not None or rng.random() < 0.5
        slot, runs, slots = 1000 * (queries + 1), [], []
        while len(slots) < past + length:
            tokens = min(rng.choice([16, 32, 5, 300]), past + length - len(slots))
            slot += rng.choice([0, 16, 7])
            runs.append((slot, tokens))
            slots += range(slot, slot + tokens)
            slot += tokens
        tables.add(queries, queries + length, runs, past if causal else None)
        for i in range(length):
            stop = past + i + 1 if causal else len(slots)
            expected[queries + i] = sorted(slots[max(0, stop - window) if window else 0 : stop])
        queries += length
    kv_heads, processors = rng.choice([1, 8]), rng.choice([1, 4, 132])
    tiles = tiles_for(torch.bfloat16, 128, 128, 4)
    work = send(cut(tables, range(queries), tiles, 4, kv_heads, processors, window), torch.device("cpu"))
    seen = {query: [] for query in range(queries)}
    rows = {query: [] for query in range(queries)}
    for launch in work.launches:
        for start, count, table, lo, hi, first, part, _ in launch.items.tolist():
            assert 1 <= count <= launch.tile.rows // 4
            assert lo < hi
            for i in range(count):
                rows[start + i].append(part + i)
                stop = min(hi, first + i + 1)
                for n in range(max(lo, first + i - window + 1) if window else lo, stop):
                    page = int(work.pages[table + n // PAGE_TOKENS])
                    seen[start + i].append(page * PAGE_TOKENS + n % PAGE_TOKENS)
    assert {query: sorted(slots) for query, slots in seen.items()} == expected
    starts = work.part_starts.tolist()
    parts = {query: work.parts[starts[query] : starts[query + 1]].tolist() for query in range(queries)}
    assert {query: sorted(mine) for query, mine in parts.items()} == {q: sorted(mine) for q, mine in rows.items()}
    assert (work.num_parts == 0) == all(len(mine) == 1 for mine in rows.values())
    assert work.num_parts in (0, sum(map(len, rows.values())))


def test_pages_far_behind():
    """Numbers that nobody has counted, and what is no page of the device."""
    tables = PageTables()
    tables.add(0, 1, [(16 * 2**23, 40)])
    assert tables.pages.tolist() == [2**23, 2**23 + 1, 2**23 + 2]
    with pytest.raises(OverflowError):
        tables.add(0, 1, [(16 * 2**40, 16)])


def test_long_sequences_are_split_and_full_tiles_are_not():
    assert part_tokens([128 * 1024], 16, 8, 132) <= 128 * 1024 * 8 // 132
    assert part_tokens([4096] * 16, 16, 8, 132) < 4096
    prompt = [128 * (i + 1) for i in range(64)]
    assert part_tokens(prompt, 128, 8, 132) == prompt[-1]
