"""Prompts on the native library: many queries over blocks anywhere, against float64."""

import random
from itertools import pairwise

import pytest
import torch
from tolerances import ATTENTION_OF_MANY

from hf_paged_kernels import FORMATS, KVRecords, NativeKernel, Part, Parts

pytestmark = pytest.mark.usefixtures("native_library")


class Prompt:
    """Random queries that go on where `past` tokens end, in memory that is NaN wherever none of them lies.

    Args:
        storage: a dtype, or the name of a format.
        multiple: of which dims are.
    """

    def __init__(
        self,
        rng: random.Random,
        storage: torch.dtype | str,
        multiple: int,
        queries: int,
        group: int,
        past: int | None = None,
    ):
        dims = [dim for dim in (16, 32, 64, 96, 128, 256) if dim % multiple == 0]
        self.key_dim, self.value_dim = rng.choice(dims), rng.choice(dims)
        self.queries, self.group, self.kv_heads = queries, group, rng.choice([1, 2])
        self.past = rng.choice([0, 1, 63, 64, 200]) if past is None else past
        self.window = rng.choice([None, None, 1, 20, 100])
        self.softcap, self.scale = rng.choice([None, None, 3.0]), self.key_dim**-0.5
        self.dtype = storage if isinstance(storage, torch.dtype) else torch.float32
        self.generator = torch.Generator().manual_seed(rng.randrange(2**30))
        heads, tokens = self.kv_heads * group, self.past + queries
        self.sinks = self.normal(heads) if rng.random() < 0.3 else None
        # A slice of a projection: queries are seldom contiguous.
        self.query = self.normal(queries, heads, self.key_dim + 16).to(self.dtype)[..., : self.key_dim]
        self.keys, self.values = (
            self.normal(self.kv_heads, tokens, dim).to(self.dtype) for dim in (self.key_dim, self.value_dim)
        )
        self.runs = self._runs(rng, tokens)
        self.records = None
        if isinstance(storage, str):
            self.records = KVRecords(FORMATS[storage], self.key_dim, self.value_dim)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def _runs(self, rng: random.Random, tokens: int) -> list[tuple[int, int]]:
        """The tokens in pieces, which lie in any order with gaps between them."""
        cuts = sorted({0, tokens, *(rng.randrange(tokens) for _ in range(rng.choice([0, 3, 20])))})
        pieces = [(begin, end - begin) for begin, end in pairwise(cuts)]
        at, slots = 1, {}
        for begin, count in rng.sample(pieces, len(pieces)):
            slots[begin] = at
            at += count + rng.choice([0, 5])
        self.num_slots = at + 7
        return [(slots[begin], count) for begin, count in pieces]

    def attend(self, kernel: NativeKernel, first: int = 0, stop: int | None = None) -> torch.Tensor:
        """Queries `[first, stop)` alone."""
        stop = self.queries if stop is None else stop
        memory = self._memory(self.keys, True), self._memory(self.values, False)
        window = () if self.window is None else (self.window,)
        part = Part(0, stop - first, 0, len(self.runs), self.past + first, *window)
        parts = Parts(stop - first, [part], self.runs)
        more = self.scale, self.softcap, self.sinks, self.records
        return kernel.attend(self.query[first:stop], *memory, parts, *more)

    def _memory(self, tokens: torch.Tensor, is_key: bool) -> torch.Tensor:
        if self.records is not None:
            side = self.records.kv_format.keys if is_key else self.records.kv_format.values
            tokens = side.encode(tokens)
        poison = torch.nan if tokens.is_floating_point() else 0xFF  # the scale of such a record is NaN
        memory = torch.full((self.kv_heads, self.num_slots, tokens.shape[2]), poison, dtype=tokens.dtype)
        at = 0
        for slot, count in self.runs:
            memory[:, slot : slot + count] = tokens[:, at : at + count]
            at += count
        return memory

    def expected(self) -> torch.Tensor:
        keys, values = self.keys, self.values
        if self.records is not None:
            sides = self.records.kv_format
            keys = self.records.decode_keys(sides.keys.encode(keys), torch.float32)
            values = self.records.decode_values(sides.values.encode(values), torch.float32)
        keys, values = (side.double().repeat_interleave(self.group, 0) for side in (keys, values))
        scores = torch.einsum("qhd,htd->hqt", self.query.double(), keys) * self.scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        last = self.past + torch.arange(self.queries).unsqueeze(1)
        token = torch.arange(self.past + self.queries)
        is_seen = (token <= last) & (token > last - (self.window or 2**40))
        scores = scores.masked_fill(~is_seen, -torch.inf)
        if self.sinks is not None:
            sinks = self.sinks.double().view(-1, 1, 1).expand(-1, self.queries, 1)
            scores = torch.cat([scores, sinks], dim=2)
        weights = scores.softmax(dim=2)[:, :, : token.numel()]
        return torch.einsum("hqt,htd->qhd", weights, values)


def assert_right(prompt: Prompt, actual: torch.Tensor, expected: torch.Tensor) -> None:
    error = ((actual.double() - expected).abs().max() / expected.abs().max()).item()
    assert error <= ATTENTION_OF_MANY[prompt.dtype], f"differs by {error:.1g} of the largest value"


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("queries", [9, 25, 64, 121, 300])
@pytest.mark.parametrize("storage", [*ATTENTION_OF_MANY, *FORMATS], ids=str)
def test_prompts_agree_with_float64(kernel, storage, queries, num_threads, threads):
    threads(num_threads)
    rng = random.Random(f"{kernel.name} {storage} {queries} {num_threads}")
    multiple = kernel.lanes if storage in ATTENTION_OF_MANY else max(16, 2 * kernel.lanes)
    for group in (1, 3, 8, 71):
        prompt = Prompt(rng, storage, multiple, queries, group)
        assert_right(prompt, prompt.attend(kernel), prompt.expected())


def test_a_chunk_over_a_long_past_is_cut_up(kernel, threads):
    """Few queries and many tokens: threads share the tokens, and results are merged."""
    threads(4)
    rng = random.Random(kernel.name)
    prompt = Prompt(rng, torch.float32, kernel.lanes, 3000, 2)
    prompt.window = None
    expected = prompt.expected()
    for first, stop in ((2960, 3000), (2000, 2015)):
        assert_right(prompt, prompt.attend(kernel, first, stop), expected[first:stop])


def test_queries_of_several_parts(kernel, threads):
    """What many queries share, and what each has besides, are merged."""
    threads(3)
    rng = random.Random(kernel.name)
    prompt = Prompt(rng, torch.float32, kernel.lanes, 200, 3, past=0)
    prompt.window, prompt.runs, prompt.num_slots = None, [(1, 200)], 210
    memory = prompt._memory(prompt.keys, True), prompt._memory(prompt.values, False)
    # The second half of the queries sees the first half's tokens as one part and its own as another.
    parts = [Part(0, 100, 0, 1, 0), Part(100, 200, 0, 1), Part(100, 200, 1, 2, 0)]
    runs = [(1, 100), (101, 100)]
    actual = kernel.attend(prompt.query, *memory, Parts(200, parts, runs), prompt.scale, prompt.softcap, prompt.sinks)
    assert_right(prompt, actual, prompt.expected())


@pytest.mark.parametrize("window", [2**63 - 1, 30])
def test_queries_that_come_before_the_tokens(kernel, window):
    """They see nothing, those behind them what there is by then; the widest window does not overflow."""
    rng = random.Random(kernel.name)
    prompt = Prompt(rng, torch.float32, kernel.lanes, 100, 3, past=0)
    prompt.window, prompt.sinks = window, None
    memory = prompt._memory(prompt.keys, True), prompt._memory(prompt.values, False)
    before = torch.randn(50, *prompt.query.shape[1:])
    parts = Parts(150, [Part(0, 150, 0, len(prompt.runs), -50, window)], prompt.runs)
    actual = kernel.attend(torch.cat([before, prompt.query]), *memory, parts, prompt.scale, prompt.softcap)
    assert (actual[:50] == 0).all()
    assert_right(prompt, actual[50:], prompt.expected())
