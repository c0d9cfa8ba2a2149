"""Every backend against dense attention in float64, over prompts, decode steps and fragmented pools."""

import random

import pytest
import torch

from hf_paged.backends import AttentionCall, backend_for
from hf_paged.core.manager import BlockManager
from hf_paged.core.planner import plan_decode, plan_packed
from hf_paged.store import LayerStore
from hf_paged_kernels import NativeKernel
from hf_paged_kernels.launch import triton_obstacle
from hf_paged_kernels.native import kernel_for, native_kernels, variants

CPU = torch.device("cpu")
# Backends as tests name them: `cpu` alone is torch's own attention, the others force a variant of the native kernel.
CPU_BACKENDS = ("cpu", "cpu avx2", "cpu avx512_bf16")
BACKENDS = (*CPU_BACKENDS, "reference")
OTHER_VARIANTS = ("cpu portable", "cpu avx512", "cpu neon")
# Largest difference to float64, relative to the largest value: rounding of the result and of the sums before it.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}

SHAPES = {  # heads, KV heads, dim of K, dim of V
    "mha": (2, 2, 16, 16),
    "gqa 3": (9, 3, 64, 64),
    "gqa 4": (8, 2, 32, 32),
    "mqa": (5, 1, 40, 40),
    "gqa 16": (16, 1, 64, 64),
    "mla": (4, 4, 24, 16),
    "wide": (2, 1, 256, 256),
}
CALLS = {
    "plain": {},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 5.0},
    "window": {"window": 7},
    "wide window": {"window": 33},
    "sinks": {"sinks": True},
    "all": {"window": 12, "softcap": 4.0, "sinks": True, "scale": 0.2},
}


# What the Triton kernels run through. Their interpreter takes some 20 ms a program; test_triton.py has more shapes.
TRITON_CASES = {
    "plain": ("gqa 4", torch.float32, "plain", {"fragmented": True}),
    "all": ("mqa", torch.float32, "all", {"block_size": 32}),
}
TRITON_DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else CPU


@pytest.fixture
def backend(request, monkeypatch):
    """The backend of a test's parameter, the native kernel switched accordingly."""
    name, _, variant = request.param.partition(" ")
    if variant and variant not in variants():
        pytest.skip("this CPU or build does not have the variant")
    monkeypatch.setenv("HF_PAGED_NATIVE", variant or "off")
    for cached in (native_kernels, kernel_for):
        cached.cache_clear()
    yield name
    for cached in (native_kernels, kernel_for):
        cached.cache_clear()


class Model:
    """One attention layer over some rows: a paged store, and the dense K and V of each row beside it."""

    def __init__(self, shape, dtype, call, backend, fragmented=False, seed=0, block_size=8, num_blocks=200, device=CPU):
        self.heads, kv_heads, self.key_dim, self.value_dim = SHAPES[shape]
        self.generator = torch.Generator().manual_seed(seed)
        self.rng = random.Random(seed)
        self.dtype, self.device, self.backend = dtype, device, backend_for(backend, device)
        sinks = torch.randn(self.heads, generator=self.generator).to(device) if "sinks" in call else None
        scale = call.get("scale", self.key_dim**-0.5)
        self.call = AttentionCall(scale, call.get("softcap"), call.get("window"), sinks)
        self.manager = BlockManager(num_blocks, block_size)
        if fragmented:
            tables = [self.manager.new_table() for _ in range(num_blocks - 1)]
            self.manager.append(tables, 1)
            for table in self.rng.sample(tables, len(tables) * 2 // 3):
                self.manager.free(table)
        like = [torch.empty(1, kv_heads, 1, dim, dtype=dtype, device=device) for dim in (self.key_dim, self.value_dim)]
        self.store = LayerStore(num_blocks * block_size + 1, block_size, *like)
        self.memory_of_token: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.tables, self.rows = [], []

    def random(self, *shape):
        return torch.randn(*shape, generator=self.generator).to(self.device, self.dtype)

    def kv(self, key):
        """K and V `[kv_heads, dim]` that belong to a token with this past: equal keys, equal K and V."""
        if key not in self.memory_of_token:
            kv_heads = self.store.keys.shape[0]
            self.memory_of_token[key] = self.random(kv_heads, self.key_dim), self.random(kv_heads, self.value_dim)
        return self.memory_of_token[key]

    def packed(self, prompts, chunk_tokens=1000):
        while len(self.tables) < len(prompts):
            self.tables.append(self.manager.new_table())
            self.rows.append([])
        pasts = [tuple(row) for row in self.rows]
        plan = plan_packed(self.manager, self.tables, prompts, chunk_tokens)
        tokens = [(row, i) for row, start, stop in plan.sources for i in range(start, stop)]
        for row, prompt in enumerate(prompts):
            self.rows[row] += prompt
        for (chunk,) in plan.chunks:
            here, tokens = tokens[: chunk.num_queries], tokens[chunk.num_queries :]
            histories = [pasts[row] + tuple(prompts[row][: i + 1]) for row, i in here]
            self.check(chunk, histories, batched=False)
        self.manager.unpin(plan.pins)

    def decode(self, tokens):
        (plan,), pins = plan_decode(self.manager, self.tables)
        for row, token in zip(self.rows, tokens, strict=True):
            row.append(token)
        self.check(plan, [tuple(row) for row in self.rows], batched=True)
        self.manager.unpin(pins)

    def check(self, plan, histories, batched):
        """Run a plan for queries whose pasts, themselves included, are `histories`."""
        keys = torch.stack([self.kv(history)[0] for history in histories])  # [tokens, kv_heads, dim]
        values = torch.stack([self.kv(history)[1] for history in histories])
        query = self.random(len(histories), self.heads, self.key_dim)
        shaped = [t.unsqueeze(2) if batched else t.transpose(0, 1).unsqueeze(0) for t in (query, keys, values)]
        self.backend.write(self.store, plan, *shaped[1:])
        out = self.backend.attend(shaped[0], self.store, plan, self.call)
        assert out.is_contiguous()
        actual = out.squeeze(1 if batched else 0)
        expected = torch.stack([self.dense(q, history) for q, history in zip(query, histories, strict=True)])
        error = (actual.double() - expected).abs().max() / expected.abs().max()
        assert error <= TOLERANCE[self.dtype], f"differs by {error:.1g} of the largest value"

    def dense(self, query, history):
        """Attention of one query `[heads, dim]` over the tokens of its past, in float64."""
        past = [self.kv(history[: i + 1]) for i in range(len(history))]
        if self.call.window is not None:
            past = past[-self.call.window :]
        group = self.heads // self.store.keys.shape[0]
        k = torch.stack([k for k, _ in past]).double().repeat_interleave(group, 1)  # [kv, heads, dim]
        v = torch.stack([v for _, v in past]).double().repeat_interleave(group, 1)
        scores = torch.einsum("hd,khd->hk", query.double(), k) * self.call.scale
        if self.call.softcap is not None:
            scores = self.call.softcap * torch.tanh(scores / self.call.softcap)
        if self.call.sinks is not None:
            scores = torch.cat([scores, self.call.sinks.double().unsqueeze(1)], dim=1)
        weights = scores.softmax(dim=1)[:, : len(past)]
        return torch.einsum("hk,khd->hd", weights, v)


def short_story(model):
    """As `story`, in a few passes: shared prefixes of odd lengths, a fork, a second turn cut into chunks."""
    shared = list(range(100, 119))
    model.packed([[*shared, 1, 2, 3], shared[:11], [*shared, 1, 2]])
    model.decode([200] * 3)
    new = [model.manager.fork(model.tables[row]) for row in (2, 0, 0)]
    for table in model.tables:
        model.manager.free(table)
    model.tables, model.rows = new, [list(model.rows[row]) for row in (2, 0, 0)]
    model.decode([300, 400, 300])
    model.packed([[5, 6, 7, 8, 9], [5, 6, 7], [5]], chunk_tokens=6)


def story(model):
    """Rows that share prefixes of odd lengths, two turns of prompts, decode steps, a reorder in between."""
    shared = list(range(100, 119))
    model.packed([[*shared, 1, 2, 3], shared[:11], [7] * 17 + shared, [*shared, 1, 2]])
    for step in range(3):
        model.decode([200 + step] * 4)
    order = [0, 0, 3, 1]
    new = [model.manager.fork(model.tables[row]) for row in order]
    for table in model.tables:
        model.manager.free(table)
    model.tables, model.rows = new, [list(model.rows[row]) for row in order]
    for step in range(9):
        model.decode([300 + step, 400 + step, 300, 300])
    model.packed([[5, 6, 7, 8, 9], [5, 6, 7], [5, 6, 7, 8, 9, 10], [1]], chunk_tokens=6)
    model.decode([1, 1, 2, 2])


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_arguments(shape, call, backend):
    story(Model(shape, torch.float32, CALLS[call], backend))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_dtypes(shape, dtype, backend):
    story(Model(shape, dtype, {}, backend))


@pytest.mark.parametrize("backend", OTHER_VARIANTS, indirect=True)
@pytest.mark.parametrize("call", ["plain", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_variants(dtype, call, backend):
    story(Model("gqa 3", dtype, CALLS[call], backend))


@pytest.mark.parametrize("backend", CPU_BACKENDS, indirect=True)
@pytest.mark.parametrize("call", ["plain", "all"])
@pytest.mark.parametrize("seed", range(5))
def test_blocks_in_any_order(seed, call, backend):
    story(Model("gqa 3", torch.float32, CALLS[call], backend, fragmented=True, seed=seed))


@pytest.mark.parametrize("backend", CPU_BACKENDS, indirect=True)
@pytest.mark.parametrize("call", ["plain", "window", "all"])
@pytest.mark.parametrize("fragmented", [False, True])
def test_short_chunks(fragmented, call, backend):
    """As many tokens a row as a draft has, on top of what rows share."""
    model = Model("gqa 3", torch.float32, CALLS[call], backend, fragmented=fragmented)
    model.packed([[*range(40), 1], [*range(40), 2], [3]])
    for tokens in (1, 2, 5, 16, 3):
        model.packed([[100 * row + i for i in range(tokens - row % 2 or 1)] for row in range(3)])
        model.decode([7, 8, 9])


@pytest.mark.parametrize("backend", CPU_BACKENDS, indirect=True)
@pytest.mark.parametrize("rows", [12, 40, 50])
def test_many_rows_share_a_prompt(rows, backend):
    """Few enough for one pass of the native kernel, for two, and more than it takes."""
    model = Model("gqa 3", torch.float32, CALLS["plain"], backend, block_size=16)
    model.packed([[*range(35), row] for row in range(rows)])
    for step in range(2):
        model.decode([step] * rows)


@pytest.mark.parametrize("backend", CPU_BACKENDS, indirect=True)
@pytest.mark.parametrize("length", [1, 63, 300, 1000])
def test_long_prompts(length, backend):
    model = Model("gqa 4", torch.float32, {}, backend, block_size=16)
    model.packed([list(range(length)), [*range(length // 2), -1]], chunk_tokens=256)
    for step in range(20):
        model.decode([step, step])


@pytest.mark.parametrize("call", ["plain", "softcap"])
@pytest.mark.parametrize("is_measured", [True, False])
def test_where_nobody_has_measured_it_torch_takes_prompts(is_measured, call, all_variants, monkeypatch):
    """But with a softcap, which torch's own flash attention does not do."""
    available, taken = all_variants._replace(multiplies=is_measured), []
    monkeypatch.setattr("hf_paged.backends.native.native_kernels", lambda: available)
    attend = NativeKernel.attend
    monkeypatch.setattr(NativeKernel, "attend", lambda self, *args: taken.append(args) or attend(self, *args))
    model = Model("gqa 3", torch.float32, CALLS[call], "cpu")
    model.packed([list(range(50))])
    assert len(taken) == (is_measured or call == "softcap")
    model.decode([1])
    assert len(taken) == 1 + (is_measured or call == "softcap")


@pytest.mark.parametrize("name", TRITON_CASES)
def test_triton(name):
    obstacle = triton_obstacle(TRITON_DEVICE)
    if obstacle:
        pytest.skip(obstacle)
    shape, dtype, call, pool = TRITON_CASES[name]
    short_story(Model(shape, dtype, CALLS[call], "triton", device=TRITON_DEVICE, **pool))
