"""The native library by itself: every dtype, dim and group against float64, odd lengths, bad calls, many threads."""

import random
import subprocess
import sys
import threading

import pytest
import torch
from tolerances import ATTENTION, ATTENTION_OF_MANY

from hf_paged_kernels import NativeError, NativeKernel, NativeStore, Part, Parts, Writes
from hf_paged_kernels.native import _look, variants
from hf_paged_kernels.processor import AMD, vendor

pytestmark = pytest.mark.usefixtures("native_library")

MANY_ROWS = 24  # of a part that is done as a product of matrices


class Case:
    """A random call: memory that is NaN wherever no run lies, parts over runs in any order."""

    def __init__(self, rng: random.Random, dtype: torch.dtype, lanes: int = 4):
        dims = [dim for dim in (8, 16, 24, 40, 64, 128, 256) if dim % lanes == 0]
        self.key_dim, self.value_dim = rng.choice(dims), rng.choice(dims)
        self.kv_heads, self.group = rng.choice([1, 2, 3]), rng.choice([1, 2, 3, 4, 5, 8, 16])
        self.queries = rng.choice([1, 2, 7, 16])
        self.generator = torch.Generator().manual_seed(rng.randrange(2**30))
        slots, heads = 3000, self.kv_heads * self.group
        self.keys = torch.full((self.kv_heads, slots, self.key_dim), torch.nan, dtype=dtype)
        self.values = torch.full((self.kv_heads, slots, self.value_dim), torch.nan, dtype=dtype)
        self.query = self.normal(self.queries, heads, self.key_dim).to(dtype)
        self.free = list(range(slots))
        self.parts: list[Part] = []
        self.runs: list[tuple[int, int]] = []
        self.add(0, self.queries, [rng.choice([1, 3, 17])], rng)
        for _ in range(rng.randrange(4)):
            start = rng.randrange(self.queries)
            stop = rng.randrange(start, self.queries) + 1
            lengths = [rng.choice([1, 2, 16, 63, 130, 300]) for _ in range(rng.choice([1, 1, 2, 6]))]
            window = rng.choice(
                [[], [max(0, sum(lengths) - stop + start)], [sum(lengths) // 2, rng.choice([1, 7, 40])]]
            )
            self.add(start, stop, lengths, rng, *window)
        self.softcap = rng.choice([None, 3.0])
        self.sinks = rng.choice([None, self.normal(heads)])
        self.scale = rng.choice([self.key_dim**-0.5, 0.3])

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def add(self, start: int, stop: int, lengths: list[int], rng: random.Random, *visible: int) -> None:
        first = len(self.runs)
        for length in lengths:
            slot = rng.randrange(1, 3000 - length)
            self.runs.append((slot, length))
            for memory in (self.keys, self.values):
                rows = memory[:, slot : slot + length]
                rows.copy_(torch.where(rows.isnan(), self.normal(*rows.shape).to(rows.dtype), rows))
        self.parts.append(Part(start, stop, first, len(self.runs), *visible))

    def attend(self, kernel: NativeKernel) -> torch.Tensor:
        parts = Parts(self.queries, self.parts, self.runs)
        return kernel.attend(self.query, self.keys, self.values, parts, self.scale, self.softcap, self.sinks)

    def tolerance(self) -> float:
        rows = max((part.query_stop - part.query) * self.group for part in self.parts)
        return (ATTENTION_OF_MANY if rows >= MANY_ROWS else ATTENTION)[self.query.dtype]

    def expected(self) -> torch.Tensor:
        """The same in float64, query by query."""
        results = []
        for i in range(self.queries):
            slots = []
            for part in self.parts:
                if part.query <= i < part.query_stop:
                    here = [s + n for s, count in self.runs[part.run : part.run_stop] for n in range(count)]
                    last = part.first + i - part.query
                    slots += [slot for t, slot in enumerate(here) if last - part.window < t <= last]
            k = self.keys[:, slots].double().repeat_interleave(self.group, 0)
            v = self.values[:, slots].double().repeat_interleave(self.group, 0)
            scores = torch.einsum("hd,htd->ht", self.query[i].double(), k) * self.scale
            if self.softcap is not None:
                scores = self.softcap * torch.tanh(scores / self.softcap)
            if self.sinks is not None:
                scores = torch.cat([scores, self.sinks.double().unsqueeze(1)], dim=1)
            weights = scores.softmax(dim=1)[:, : len(slots)]
            results.append(torch.einsum("ht,htd->hd", weights, v))
        return torch.stack(results)


def assert_right(case: Case, kernel: NativeKernel) -> None:
    actual, expected = case.attend(kernel), case.expected()
    assert actual.dtype == case.query.dtype
    assert actual.is_contiguous()
    error = ((actual.double() - expected).abs().max() / expected.abs().max()).item()
    assert error <= case.tolerance(), f"differs by {error:.1g} of the largest value"


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", ATTENTION, ids=str)
def test_random_calls_agree_with_float64(kernel, dtype, num_threads, threads):
    threads(num_threads)
    rng = random.Random(f"{kernel.name} {dtype} {num_threads}")
    for _ in range(25):
        assert_right(Case(rng, dtype, kernel.lanes), kernel)


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 63, 64, 65, 255, 1001, 5003])
def test_rows_of_a_span_agree_with_float64(kernel, tokens, threads):
    threads(2)
    memory = torch.randn(2, 3 * tokens + 40, 32)
    key = memory.as_strided((3, 2, tokens, 32), ((tokens + 5) * 32, memory.stride(0), 32, 1), 64)
    query = torch.randn(3, 6, 1, 32)
    actual = kernel.attend_rows(query, key, key, 0.2).squeeze(1)
    scores = torch.einsum("rhd,rhtd->rht", query.squeeze(2).double(), key.double().repeat_interleave(3, 1)) * 0.2
    expected = torch.einsum("rht,rhtd->rhd", scores.softmax(-1), key.double().repeat_interleave(3, 1))
    assert (actual - expected).abs().max() < 2e-6 * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_number_of_a_dtype_comes_through(kernel, dtype):
    """One visible token has weight 1: the result is its V, bit for bit, subnormal numbers and infinities included."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 1024, 64)
    keys, query = torch.ones(1, 1024, 64, dtype=dtype), torch.ones(1024, 1, 64, dtype=dtype)
    parts = Parts(1024, [Part(i, i + 1, i, i + 1) for i in range(1024)], [(i, 1) for i in range(1024)])
    actual = kernel.attend(query, keys, every, parts, 1.0).view(1, 1024, 64)
    same = actual.view(torch.int16) == every.view(torch.int16)
    # The instruction that multiplies bfloat16 takes subnormal numbers for 0.
    smallest = torch.finfo(dtype).smallest_normal if kernel.name == "avx512_bf16" else 0
    negative_zero = ((every == 0) | (every.abs() < smallest)) & (actual == 0)
    assert (same | negative_zero | (every.isnan() & actual.isnan())).all()


def test_float32_results_are_rounded_to_nearest(kernel):
    """Means of two V at every distance from a representable number, halfway included."""
    for dtype in (torch.float16, torch.bfloat16):
        values = torch.randn(1, 2000, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
        keys, query = torch.zeros(1, 2000, 64, dtype=dtype), torch.zeros(1000, 1, 64, dtype=dtype)
        parts = Parts(1000, [Part(i, i + 1, i, i + 1) for i in range(1000)], [(2 * i, 2) for i in range(1000)])
        actual = kernel.attend(query, keys, values, parts, 1.0).view(1000, 64)
        expected = ((values[0, ::2].float() + values[0, 1::2].float()) / 2).to(dtype)
        assert torch.equal(actual, expected)


# Query heads of a KV head: decode, and products of matrices.
WIDTHS = pytest.mark.parametrize("heads", [1, 31])


@WIDTHS
def test_scores_of_any_size(kernel, heads):
    keys = torch.tensor([1e4, -1e4, 9.99e3, 0.0]).view(1, 4, 1).expand(1, 4, 16).contiguous()
    values = torch.randn(1, 4, 16)
    query = torch.ones(1, heads, 16)
    actual = kernel.attend(query, keys, values, Parts(1, [Part(0, 1, 0, 1)], [(0, 4)]), 1.0)
    assert torch.allclose(actual[0], values[0, 0].expand(heads, 16), atol=1e-6)


@WIDTHS
def test_nan_comes_through(kernel, heads):
    query, memory = torch.randn(2, heads, 16), torch.randn(1, 40, 16)
    query[1] = torch.nan
    parts = Parts(2, [Part(0, 2, 0, 1)], [(0, 40)])
    actual = kernel.attend(query, memory, memory, parts, 1.0)
    assert actual[0].isfinite().all()
    assert actual[1].isnan().all()
    memory[0, 7] = torch.nan
    assert kernel.attend(query, memory, memory, parts, 1.0).isnan().all()


@WIDTHS
def test_queries_that_see_nothing_get_zeros(kernel, heads):
    query, memory = torch.randn(3, heads, 16), torch.randn(1, 40, 16)
    parts = Parts(3, [Part(1, 2, 0, 1), Part(2, 3, 0, 1, -1)], [(4, 9)])  # none, all, a part of which it sees nothing
    for sinks in (None, torch.zeros(heads)):
        actual = kernel.attend(query, memory, memory, parts, 1.0, sinks=sinks)
        assert (actual[0] == 0).all()
        assert (actual[2] == 0).all()
        assert (actual[1] != 0).any()


def test_addresses_beyond_32_bits(kernel):
    slots = 2**25 + 64  # times 64 elements: more than 2^31
    memory = torch.empty(1, slots, 64, dtype=torch.float16)
    memory[:, -32:] = torch.randn(32, 64).to(torch.float16)
    query = torch.randn(1, 1, 64).to(torch.float16)
    far = kernel.attend(query, memory, memory, Parts(1, [Part(0, 1, 0, 1)], [(slots - 32, 32)]), 0.1)
    near = memory[:, -32:].contiguous()
    assert torch.equal(far, kernel.attend(query, near, near, Parts(1, [Part(0, 1, 0, 1)], [(0, 32)]), 0.1))
    NativeStore(memory, memory).write_rows(query.view(1, 1, 1, 64), query.view(1, 1, 1, 64), slots - 1, 1)
    assert torch.equal(memory[0, -1], query[0, 0])


def test_many_python_threads_at_once(kernel, threads):
    threads(2)
    cases = [Case(random.Random(seed), torch.float32, kernel.lanes) for seed in range(8)]
    expected, wrong = [case.expected() for case in cases], []

    def work(case, right):
        for _ in range(30):
            if (case.attend(kernel) - right).abs().max() > case.tolerance() * right.abs().max():
                wrong.append(case)

    workers = [threading.Thread(target=work, args=pair) for pair in zip(cases, expected, strict=True)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


BAD_PARTS = {
    "slot behind the end": ([Part(0, 2, 0, 1)], [(95, 6)]),
    "negative slot": ([Part(0, 2, 0, 1)], [(-1, 6)]),
    "empty run": ([Part(0, 2, 0, 1)], [(1, 0)]),
    "length that overflows": ([Part(0, 2, 0, 1)], [(1, 2**63 - 1)]),
    "runs that do not exist": ([Part(0, 2, 0, 2)], [(1, 5)]),
    "runs backwards": ([Part(0, 2, 1, 0)], [(1, 5)]),
    "queries that do not exist": ([Part(0, 3, 0, 1)], [(1, 5)]),
    "queries backwards": ([Part(1, 1, 0, 1)], [(1, 5)]),
    "no window": ([Part(0, 2, 0, 1, 4, 0)], [(1, 5)]),
}


@pytest.mark.parametrize("what", BAD_PARTS)
def test_bad_parts_are_refused(kernel, what):
    query, memory = torch.randn(2, 2, 16), torch.randn(1, 100, 16)
    with pytest.raises(NativeError):
        kernel.attend(query, memory, memory, Parts(2, *BAD_PARTS[what]), 1.0)


def bad_tensors():
    q, k = torch.randn(2, 4, 16), torch.randn(2, 100, 16)
    yield "dtype of query", q.half(), k, k, {}
    yield "dtype of values", q, k, k.half(), {}
    yield "dtype that is not supported", q.double(), k.double(), k.double(), {}
    yield "heads", torch.randn(2, 3, 16), k, k, {}
    yield "number of queries", torch.randn(3, 4, 16), k, k, {}
    yield "dim of keys", q, torch.randn(2, 100, 8), k, {}
    yield "dim", torch.randn(2, 4, 12), torch.randn(2, 100, 12), k, {}
    yield "large dim", torch.randn(2, 4, 264), torch.randn(2, 100, 264), k, {}
    yield "slots of values", q, k, torch.randn(2, 99, 16), {}
    yield "heads of values", q, k, torch.randn(1, 100, 16), {}
    yield "order of keys", q, torch.randn(2, 16, 100).transpose(1, 2), k, {}
    yield "order of query", torch.randn(2, 16, 4).transpose(1, 2), k, k, {}
    yield "slots apart", q, torch.randn(2, 200, 16)[:, ::2], k, {}
    yield "number of sinks", q, k, k, {"sinks": torch.zeros(3)}
    yield "device", q.to("meta"), k, k, {}


@pytest.mark.parametrize(("query", "keys", "values", "more"), [pytest.param(*c[1:], id=c[0]) for c in bad_tensors()])
def test_bad_tensors_are_refused(kernel, query, keys, values, more):
    with pytest.raises(NativeError):
        kernel.attend(query, keys, values, Parts(2, [Part(0, 2, 0, 1)], [(1, 5)]), 1.0, **more)


def test_rows_that_are_no_span_are_refused(kernel):
    query, memory = torch.randn(2, 4, 1, 16), torch.randn(10000)
    good = memory.as_strided((2, 2, 5, 16), (320, 160, 16, 1))
    odd = memory.as_strided((2, 2, 5, 16), (321, 160, 16, 1))
    for key, value in ((odd, good), (good, odd), (odd, odd), (good[:, :, :4], good), (good[:1], good[:1])):
        with pytest.raises(NativeError):
            kernel.attend_rows(query, key, value, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_store_writes_what_torch_would(dtype):
    rng = random.Random(0)
    for _ in range(30):
        rows, heads, tokens, slots = rng.choice([1, 3]), rng.choice([1, 2]), rng.choice([1, 5]), 50
        dims = rng.choice([8, 16]), rng.choice([8, 24])
        memories = [torch.randn(heads, slots, dim).to(dtype) for dim in dims]
        new = [torch.randn(rows, tokens, heads, dim).to(dtype).transpose(1, 2) for dim in dims]
        total = rows * tokens
        cut = rng.randrange(total) + 1
        writes = [(0, cut, rng.randrange(5), rng.choice([1, 2]))]
        writes += [(cut, total - cut, 35, 1)] if cut < total else []
        copies = [(0, 20, 4), (rng.randrange(5), 2, 5)]
        expected = [memory.clone() for memory in memories]
        for memory, fresh in zip(expected, new, strict=True):
            flat = fresh.transpose(0, 1).flatten(1, 2)
            for source, count, slot, step in writes:
                for i in range(count):
                    memory[:, slot + i * step] = flat[:, source + i]
            for source, target, count in copies:
                memory[:, target : target + count] = memory[:, source : source + count].clone()
        NativeStore(*memories).write(*new, Writes(writes, copies))
        assert all(torch.equal(*pair) for pair in zip(memories, expected, strict=True))


BAD_WRITES = {
    "slot behind the end": ([(0, 3, 48, 1)], []),
    "step behind the end": ([(0, 3, 10, 20)], []),
    "negative slot": ([(0, 1, -1, 1)], []),
    "step that overflows": ([(0, 3, 0, 2**62)], []),
    "no step": ([(0, 3, 0, 0)], []),
    "tokens that do not exist": ([(1, 3, 0, 1)], []),
    "negative source": ([(-1, 1, 0, 1)], []),
    "copy from behind the end": ([(0, 3, 0, 1)], [(48, 0, 3)]),
    "copy to behind the end": ([(0, 3, 0, 1)], [(0, 48, 3)]),
    "copy of nothing": ([(0, 3, 0, 1)], [(0, 1, 0)]),
}


@pytest.mark.parametrize("what", BAD_WRITES)
def test_bad_writes_are_refused_and_change_nothing(what):
    memory, new = torch.zeros(2, 50, 8), torch.ones(1, 2, 3, 8)
    with pytest.raises(NativeError):
        NativeStore(memory, memory).write(new, new, Writes(*BAD_WRITES[what]))
    assert (memory == 0).all()


@pytest.mark.parametrize("new", [torch.ones(1, 2, 3, 9), torch.ones(1, 3, 3, 8), torch.ones(1, 2, 3, 8).half()])
def test_new_tokens_that_do_not_fit_are_refused(new):
    memory = torch.zeros(2, 50, 8)
    with pytest.raises(NativeError):
        NativeStore(memory, memory).write_rows(new, new, 0, 1)


def test_new_tokens_with_gaps_are_left_to_torch():
    memory, new = torch.zeros(2, 50, 8), torch.ones(1, 2, 8, 3).mT
    assert not NativeStore(memory, memory).write_rows(new, new, 0, 1)
    assert not NativeStore(memory, memory).write(new, new, Writes([(0, 3, 0, 1)], []))
    assert (memory == 0).all()


def test_the_switch():
    assert _look("off").kernels == ()
    assert _look("off").store_for(torch.zeros(1, 1, 8), torch.zeros(1, 1, 8)) is None
    assert "off" in _look("off").reason
    assert [kernel.name for kernel in _look("portable").kernels] == ["portable"]
    assert _look("no such variant").kernels == ()
    assert "no such variant" in _look("no such variant").reason


@pytest.mark.parametrize(("name", "multiplies"), [(AMD, True), ("GenuineIntel", False), ("", False)])
def test_prompts_are_left_to_torch_where_nobody_has_measured_them(name, multiplies, monkeypatch):
    monkeypatch.setattr("hf_paged_kernels.processor.vendor", lambda: name)
    monkeypatch.setattr("hf_paged_kernels.native._MEASURED", tuple(variants()))
    found = _look(None)
    assert found.multiplies is multiplies
    assert ("prompts by torch" in found.reason) is not multiplies
    assert _look(found.kernels[0].name).multiplies


@pytest.mark.parametrize("name", list(variants()))
@pytest.mark.parametrize("vendor", [AMD, "GenuineIntel"])
def test_linear_layers_are_left_to_torch_where_nobody_has_measured_them(name, vendor, monkeypatch):
    kernel = variants()[name]
    monkeypatch.setattr("hf_paged_kernels.native.variants", lambda: {name: kernel})
    monkeypatch.setattr("hf_paged_kernels.native._MEASURED", (name,))
    monkeypatch.setattr("hf_paged_kernels.processor.vendor", lambda: vendor)
    is_measured = vendor == AMD and name in ("avx512", "avx512_bf16")
    assert _look(None).linear is (kernel.linear if is_measured else None)
    assert _look(name).linear is kernel.linear, "asked for"


@pytest.mark.parametrize(
    ("info", "expected"),
    [(f"processor\t: 0\nvendor_id\t: {AMD}\nmodel\t: 1\n", AMD), ("processor\t: 0\nCPU implementer\t: 0x41\n", "")],
)
def test_the_vendor_is_what_linux_says(info, expected, monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text(info)
    monkeypatch.setattr("hf_paged_kernels.processor._CPU_INFO", tmp_path / "cpuinfo")
    assert vendor.__wrapped__() == expected


def test_the_vendor_elsewhere(monkeypatch, tmp_path):
    monkeypatch.setattr("hf_paged_kernels.processor._CPU_INFO", tmp_path / "missing")
    for said, expected in ((f"AMD64 Family 23 Model 113 Stepping 0, {AMD}", AMD), ("", "")):
        monkeypatch.setattr("platform.processor", lambda said=said: said)
        assert vendor.__wrapped__() == expected


OPENMP = """
import re
from hf_paged_kernels import native_kernels
from hf_paged_kernels.native_library import openmp_entry
native_kernels()
with open("/proc/self/maps") as maps:
    paths = {line.split()[-1] for line in maps if re.search(r"/lib(g|i)?omp[^/]*[.]so", line)}
print(len(paths), openmp_entry() is not None)
"""


def test_threads_are_those_of_torch():
    """No second OpenMP runtime is loaded, and the one that is there can be reached; other packages bring their own."""
    done = subprocess.run([sys.executable, "-c", OPENMP], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "True"]
