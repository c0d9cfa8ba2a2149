"""One attention layer on a block manager, checked against dense attention in float64 in whatever it is asked."""

import random

import torch

from hf_paged.backends import AttentionCall, backend_for
from hf_paged.core.manager import BlockManager
from hf_paged.core.planner import plan_decode, plan_packed
from hf_paged.store import LayerStore

CPU = torch.device("cpu")
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


class OneLayer:
    """One attention layer over some rows: a paged store, and the dense K and V of each row beside it."""

    def __init__(self, shape, dtype, call, backend, fragmented=False, seed=0, block_size=8, num_blocks=200, device=CPU):
        self.heads, kv_heads, self.key_dim, self.value_dim = SHAPES[shape]
        self.query_dim = self.key_dim
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
        query = self.random(len(histories), self.heads, self.query_dim)
        shaped = [t.unsqueeze(2) if batched else t.transpose(0, 1).unsqueeze(0) for t in (query, keys, values)]
        self.backend.write(self.store, plan, *shaped[1:])
        out = self.attend(shaped[0], plan)
        assert out.is_contiguous()
        actual = out.squeeze(1 if batched else 0)
        expected = torch.stack([self.dense(q, history) for q, history in zip(query, histories, strict=True)])
        error = (actual.double() - expected).abs().max() / expected.abs().max()
        assert error <= TOLERANCE[self.dtype], f"differs by {error:.1g} of the largest value"

    def attend(self, query, plan):
        """`[batch, heads, tokens, dim]` over what a plan reads."""
        return self.backend.attend(query, self.store, plan, self.call)

    def of_heads(self, keys, values):
        """K and V of all heads, `[kv, heads, dim]`, of what is stored, `[kv, kv_heads, dim]`."""
        group = self.heads // self.store.keys.shape[0]
        return keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)

    def dense(self, query, history):
        """Attention of one query `[heads, dim]` over the tokens of its past, in float64."""
        past = [self.kv(history[: i + 1]) for i in range(len(history))]
        if self.call.window is not None:
            past = past[-self.call.window :]
        k, v = self.of_heads(*(torch.stack(each).double() for each in zip(*past, strict=True)))
        scores = torch.einsum("hd,khd->hk", query.double(), k) * self.call.scale
        if self.call.softcap is not None:
            scores = self.call.softcap * torch.tanh(scores / self.call.softcap)
        if self.call.sinks is not None:
            scores = torch.cat([scores, self.call.sinks.double().unsqueeze(1)], dim=1)
        weights = scores.softmax(dim=1)[:, : len(k)]
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
