"""Attention over latents, both ways, against attention in float64 to the K and V that these stand for."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from one_layer import CALLS, SHAPES, OneLayer, story
from tolerances import ATTENTION_OF_MANY

import hf_paged_kernels.latent
from hf_paged.backends import Expansion, LatentBackend
from hf_paged.backends.gathered import Gathered
from hf_paged.core.chain import Run
from hf_paged.core.plan import Piece, StepPlan
from hf_paged_kernels import attend_latents

LATENT_SHAPES = {  # heads, dim of K that is not rotated, dim of V
    "few": (2, 16, 12),
    "many": (16, 24, 16),
    "odd": (5, 7, 9),
}
STORED = {"few": (2, 1, 24, 8), "many": (16, 1, 32, 16), "odd": (5, 1, 13, 6)}  # as in SHAPES, of what is stored
WAYS = ("absorbed", "expanded")


@pytest.fixture(autouse=True)
def stored_shapes(monkeypatch):
    for name, shape in STORED.items():
        monkeypatch.setitem(SHAPES, name, shape)


@pytest.fixture
def way(request, monkeypatch):
    """Whichever would be cheaper, every plan goes one way; both are counted."""
    taken = []

    def reads_of(self, plan):
        taken.append(request.param)
        return None if request.param == "absorbed" else Gathered.of(plan)

    monkeypatch.setattr(Expansion, "reads_of", reads_of)
    yield request.param
    assert taken


class LatentLayer(OneLayer):
    """A layer that keeps latents and rotated parts in the place of K and V."""

    def __init__(self, shape, dtype, call, backend, **kwargs):
        super().__init__(shape, dtype, call, backend, **kwargs)
        _, self.dim, self.expanded_dim = LATENT_SHAPES[shape]
        self.query_dim = self.dim + self.value_dim
        self.call = self.call._replace(scale=call.get("scale", self.query_dim**-0.5))
        weights = self.random(self.heads, self.dim + self.expanded_dim, self.key_dim) * self.key_dim**-0.5
        self.weights = weights.split([self.dim, self.expanded_dim], dim=1)
        self.backend = LatentBackend(self.backend)

    def expand(self, latents, rotated):
        keys, values = (torch.einsum("btr,hdr->bhtd", latents[:, 0], each.to(latents)) for each in self.weights)
        return torch.cat([keys, rotated.expand(-1, self.heads, -1, -1)], dim=-1), values

    def attend(self, query, plan):
        expansion = Expansion(*self.weights, self.expand)
        return self.backend.attend_expanded(query, self.store, plan, self.call, expansion)

    def of_heads(self, keys, values):
        expanded = self.expand(keys.transpose(0, 1).unsqueeze(0), values.transpose(0, 1).unsqueeze(0))
        keys, values = (each.squeeze(0).transpose(0, 1) for each in expanded)
        return keys, values


@pytest.mark.parametrize("backend", ["cpu", "cpu avx512_bf16", "reference"], indirect=True)
@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("shape", LATENT_SHAPES)
def test_shapes_and_arguments(shape, call, way, backend):
    story(LatentLayer(shape, torch.float32, CALLS[call], backend))


@pytest.mark.parametrize("backend", ["cpu", "cpu avx2"], indirect=True)
@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", LATENT_SHAPES)
def test_dtypes(shape, dtype, way, backend):
    story(LatentLayer(shape, dtype, {}, backend))


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("seed", range(5))
def test_blocks_in_any_order(seed, way, backend):
    story(LatentLayer("few", torch.float32, CALLS["all"], backend, fragmented=True, seed=seed))


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_long_prompts_in_chunks(way, backend):
    layer = LatentLayer("few", torch.float32, {}, backend, block_size=16)
    layer.packed([list(range(300)), [*range(150), -1], [-2] * 40], chunk_tokens=100)
    for step in range(3):
        layer.decode([step] * 3)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_latents_are_expanded_where_many_queries_meet_them(backend, monkeypatch):
    """By products: a prompt's are, but not those of a step, nor of a short chunk, nor of more than may be held."""
    found = []
    reads_of = Expansion.reads_of
    monkeypatch.setattr(Expansion, "reads_of", lambda *args: found.append(reads_of(*args)) or found[-1])
    layer = LatentLayer("many", torch.float32, {}, backend)
    least = math.ceil(32 * 40 / (2 * 32 - 40))  # queries: each latent makes 40 numbers a head of 32, or meets queries

    def expands():
        ways = {each is not None for each in found}
        found.clear()
        assert len(ways) == 1
        return ways.pop()

    layer.packed([list(range(2 * least - 8))])  # half of the pairs are of a token and a query before it
    assert not expands()
    layer.packed([list(range(2 * least))])
    assert expands()
    layer.decode([1])
    assert not expands()
    layer.packed([list(range(least - 20))])
    assert not expands()
    monkeypatch.setattr("hf_paged.backends.latent.MAX_EXPANDED", 1000)
    layer.packed([list(range(3 * least))])
    assert not expands()


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)), min_size=1, max_size=30))
def test_runs_that_are_put_together_hold_the_same(runs):
    """Also where they overlap, and where they are too many to be copied one by one."""
    runs = [Run(*each) for each in runs]
    piece = Piece(0, 2, tuple(runs), False)
    found = Gathered.of(StepPlan(2, [], [], [piece], [], [], 0))
    memory = torch.arange(80).view(1, 80, 1)
    together = found.view(memory).flatten().tolist()
    assert len(together) == found.tokens == len(set(together))
    for before, after in zip(runs, found.plan.own[0].runs, strict=True):
        assert together[after.slot : after.slot + after.tokens] == list(range(before.slot, before.slot + before.tokens))


@pytest.mark.parametrize("at_once", [2**24, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("visible", "batch", "heads", "queries", "tokens"),
    [
        *[("all", *sizes) for sizes in ((1, 1, 1, 1), (3, 4, 1, 19), (2, 3, 6, 11))],
        ("causal", 1, 5, 7, 7),
        ("mask", 1, 2, 9, 23),
    ],
)
def test_queries_meet_latents(visible, batch, heads, queries, tokens, dtype, at_once, monkeypatch):
    """However many scores are held at a time."""
    monkeypatch.setattr(hf_paged_kernels.latent, "_MAX_SCORES", at_once)
    generator = torch.Generator().manual_seed(0)
    query, latents, rotated = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((batch, heads, queries, 29), (batch, 1, tokens, 21), (batch, 1, tokens, 8))
    )
    mask = torch.rand(queries, tokens, generator=generator) < 0.5
    mask[:, 0] = True
    kept = {"all": torch.ones_like(mask), "causal": torch.ones_like(mask).tril(), "mask": mask}[visible]
    scores = query.double() @ torch.cat([latents, rotated], dim=-1).double().transpose(2, 3) * 0.2
    scores = (3 * torch.tanh(scores / 3)).masked_fill(~kept, -torch.inf)
    out, lse = attend_latents(
        query, latents, rotated, 0.2, visible == "causal", 3.0, mask if visible == "mask" else None
    )
    assert out.dtype == dtype
    expected = scores.softmax(dim=-1) @ latents.double()
    assert (out.double() - expected).abs().max() <= ATTENTION_OF_MANY[dtype] * expected.abs().max()
    torch.testing.assert_close(lse.double(), scores.logsumexp(dim=-1), atol=1e-5, rtol=1e-5)
