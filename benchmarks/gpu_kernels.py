"""The Triton kernels on a GPU: right against plain torch, and as shares of memory bandwidth and of SDPA."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from benchmarks.measure import seconds_of_many, wait
from hf_paged_kernels import KVFormat, KVRecords
from hf_paged_kernels.attend import attend, attend_parts_reference, merge_reference
from hf_paged_kernels.copy import copy_slots, copy_slots_reference, pack_copies
from hf_paged_kernels.store import store_tokens, store_tokens_reference
from hf_paged_kernels.tuning import PAGE_TOKENS, Tile, processors, tiles_for
from hf_paged_kernels.work import PageTables, Work, cut, send

TOLERANCE = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
"""Largest difference to float64 that passes, relative to the largest value."""


@dataclass(frozen=True)
class Sizes:
    """What is measured. The small ones are for a try without a GPU."""

    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    contexts: tuple[int, ...] = (4096, 16384, 32768, 131072)
    batches: tuple[int, ...] = (1, 8, 64)
    prompts: tuple[int, ...] = (2048, 8192, 32768)
    shapes: tuple[tuple[int, int, int, int], ...] = (
        (32, 8, 128, 128), (9, 3, 64, 64), (4, 4, 80, 80), (16, 1, 96, 64), (8, 8, 192, 128), (4, 2, 256, 256),
    )  # fmt: skip
    """Heads, KV heads, dims of K and V of the kernels that are checked."""
    lengths: tuple[tuple[int, int], ...] = ((1, 1), (1, 1000), (63, 63), (130, 517), (1, 33))
    """Queries and tokens of the rows of a check."""
    working_bytes: float = 600e6
    """K and V that a round goes through, in as many layers as that takes: no cache holds them."""
    share_of_memory: float = 0.6
    records_context: int = 32768
    """Tokens of a row where formats of quantized KV are compared."""
    seconds: float = 0.3
    """Time for each figure."""
    decode_tiles: tuple[Tile, ...] = tuple(
        Tile(16, tokens, 4, stages) for tokens in (32, 64, 128) for stages in (3, 4, 5) if tokens * stages <= 384
    )
    prefill_tiles: tuple[Tile, ...] = (
        Tile(64, 64, 4, 3), Tile(128, 32, 4, 3), Tile(128, 64, 4, 3), Tile(128, 64, 8, 2), Tile(128, 64, 8, 3),
        Tile(128, 128, 8, 3),
    )  # fmt: skip


TINY = Sizes(
    heads=4, kv_heads=2, dim=32, contexts=(32,), batches=(1,), prompts=(40,), shapes=((4, 2, 32, 16),),
    lengths=((1, 1), (3, 21), (1, 33)), working_bytes=1, records_context=32, seconds=0,
    decode_tiles=(Tile(16, 16, 4, 2),), prefill_tiles=(Tile(32, 16, 4, 2),),
)  # fmt: skip


class Clock:
    """Times calls on a device."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds = device, seconds

    def run(self, call: Callable[[], object]) -> float:
        """Median seconds of ``call``, everything that it starts included, but for the first of several calls."""
        return seconds_of_many(call, 3 if self.seconds else 1, self.seconds, self.device)

    def replay(self, call: Callable[[], object]) -> float | None:
        """The same without the time that Python takes: recorded once as a CUDA graph. ``None`` where that fails."""
        if self.device.type != "cuda":
            return None
        call()
        wait(self.device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                call()
        except RuntimeError as error:
            print(f"  no graph: {error}")
            return None
        return self.run(graph.replay)


# -- checks ------------------------------------------------------------------------------------------------------------


def check(device: torch.device, sizes: Sizes) -> Iterator[dict[str, object]]:
    """Every kernel, dtype and shape against plain torch; one failure does not hide the others."""
    for dtype in TOLERANCE:
        for shape in sizes.shapes:
            for feature in ("plain", "window", "softcap", "sinks"):
                yield outcome(
                    f"attend {feature}", dtype, shape, lambda *a, f=feature: attend_error(*a, f), sizes, device
                )
            yield outcome("store", dtype, shape, store_error, sizes, device)
            yield outcome("copy", dtype, shape, _copy_error, sizes, device)


def outcome(
    kernel: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    error_of: Callable[..., float],
    sizes: Sizes,
    device: torch.device,
) -> dict[str, object]:
    made = {"kernel": kernel, "dtype": str(dtype).removeprefix("torch."), "shape": "/".join(map(str, shape))}
    try:
        error = error_of(dtype, shape, sizes, device)
    except Exception as failure:  # what does not compile is a result, too
        return made | {"passed": False, "error": f"{type(failure).__name__}: {str(failure)[:500]}"}
    allowed = TOLERANCE[dtype] if kernel.startswith("attend") else 0.0
    return made | {"passed": bool(error <= allowed), "error": error}


def _memories(
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    slots: int,
    device: torch.device,
    kv_format: KVFormat | None = None,
) -> tuple[torch.Tensor, torch.Tensor, KVRecords | None]:
    """K and V, ``[kv_heads, slots, dim or record bytes]``, all NaN, and what they hold where that is records."""
    _, kv_heads, *dims = shape
    if kv_format is None:
        keys, values = (torch.full((kv_heads, slots, dim), torch.nan, dtype=dtype, device=device) for dim in dims)
        return keys, values, None
    records = KVRecords(kv_format, *dims)
    sizes = records.key_bytes, records.value_bytes
    keys, values = (torch.full((kv_heads, slots, n), 255, dtype=torch.uint8, device=device) for n in sizes)
    return keys, values, records


def attend_error(
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    sizes: Sizes,
    device: torch.device,
    feature: str = "plain",
    kv_format: KVFormat | None = None,
) -> float:
    heads, kv_heads, key_dim, _ = shape
    window = 100 if feature == "window" else None
    pages = sum(-(-tokens // PAGE_TOKENS) for _, tokens in sizes.lengths) + 1
    keys, values, records = _memories(dtype, shape, pages * PAGE_TOKENS, device, kv_format)
    free = random.Random(0).sample(range(1, pages), pages - 1)
    tables, queries = PageTables(), 0
    for length, tokens in sizes.lengths:
        mine = [free.pop() * PAGE_TOKENS for _ in range(-(-tokens // PAGE_TOKENS))]
        runs = [(slot, min(PAGE_TOKENS, tokens - i * PAGE_TOKENS)) for i, slot in enumerate(mine)]
        for slot, count in runs:
            key, value = (torch.randn(kv_heads, count, dim, device=device) for dim in shape[2:])
            if records is not None:
                key, value = records.encode_keys(key), records.encode_values(value)
            keys[:, slot : slot + count], values[:, slot : slot + count] = key, value
        tables.add(queries, queries + length, runs, tokens - length)
        queries += length
    tiles = tiles_for(dtype, key_dim, shape[3], heads // kv_heads, kv_format and kv_format.name)
    work = send(cut(tables, range(queries), tiles, heads // kv_heads, kv_heads, processors(device), window), device)
    query = torch.randn(queries, heads, key_dim, device=device).to(dtype)
    sinks = torch.randn(heads, device=device) if feature == "sinks" else None
    softcap = 5.0 if feature == "softcap" else None
    actual = attend(query, keys, values, work, key_dim**-0.5, softcap, sinks, records)
    parts = attend_parts_reference(query, keys, values, work, key_dim**-0.5, softcap, records)
    expected = merge_reference(*parts, work, sinks)
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


def store_error(
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    sizes: Sizes,
    device: torch.device,
    kv_format: KVFormat | None = None,
) -> float:
    _, kv_heads, *dims = shape
    key, value = (torch.randn(3, 5, kv_heads, dim, device=device).to(dtype).transpose(1, 2) for dim in dims)
    slots = torch.randperm(200, device=device)[:15].int()
    slots[7] = -1
    *ours, records = _memories(dtype, shape, 200, device, kv_format)
    theirs = [memory.clone() for memory in ours]
    store_tokens(key, value, *ours, slots, records)
    store_tokens_reference(key, value, *theirs, slots, records)
    return _difference(ours, theirs)


def _copy_error(dtype: torch.dtype, shape: tuple[int, int, int, int], sizes: Sizes, device: torch.device) -> float:
    memories = [memory.normal_() for memory in _memories(dtype, shape, 300, device)[:2]]
    copies = pack_copies([(0, 100, 37), (50, 150, 16), (66, 200, 1)], device)
    ours, theirs = [m.clone() for m in memories], [m.clone() for m in memories]
    copy_slots(*ours, *ours, copies)
    copy_slots_reference(*theirs, *theirs, copies)
    return _difference(ours, theirs)


def _difference(ours: object, theirs: object) -> float:
    return float(not all(torch.equal(a.nan_to_num(9e3), b.nan_to_num(9e3)) for a, b in zip(ours, theirs, strict=True)))


# -- speed -------------------------------------------------------------------------------------------------------------


def copy_bandwidth(device: torch.device, sizes: Sizes) -> float:
    """Bytes per second, read and written, of a plain copy; what the kernels are compared with."""
    count = int(1e9) if device.type == "cuda" else 1000
    source = torch.ones(count, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    clock = Clock(device, sizes.seconds)
    return 2 * source.numel() * source.element_size() / clock.run(lambda: target.copy_(source))


class Layers:
    """K and V of several layers, so that each is out of every cache when its turn comes again."""

    def __init__(
        self, sizes: Sizes, batch: int, context: int, device: torch.device, kv_format: KVFormat | None = None
    ) -> None:
        self.sizes, self.batch, self.context, self.device = sizes, batch, context, device
        self.records = None if kv_format is None else KVRecords(kv_format, sizes.dim, sizes.dim)
        self.bytes = layer_bytes(sizes, batch, context, self.records)
        count = max(1, min(32, round(sizes.working_bytes / self.bytes)))
        self.memories = [(self._memory(True), self._memory(False)) for _ in range(count)]
        self.query = torch.randn(batch, sizes.heads, sizes.dim, device=device).bfloat16()

    def _memory(self, is_keys: bool) -> torch.Tensor:
        shape = (self.sizes.kv_heads, self.batch * self.context + PAGE_TOKENS, self.sizes.dim)
        numbers = torch.empty(shape, dtype=torch.bfloat16, device=self.device).normal_()
        if self.records is None:
            return numbers
        encode = self.records.encode_keys if is_keys else self.records.encode_values
        return torch.cat([encode(of_slots) for of_slots in numbers.split(2**15, dim=1)], dim=1)

    def work(self, is_random: bool, tiles: Sequence[Tile] | None = None) -> Work:
        """One query a row over all of its context; its pages adjacent or anywhere."""
        each = self.context // PAGE_TOKENS
        pages = list(range(1, self.batch * each + 1))
        if is_random:
            random.Random(0).shuffle(pages)
        tables = PageTables()
        for row in range(self.batch):
            mine = pages[row * each : (row + 1) * each]
            tables.add(row, row + 1, [(page * PAGE_TOKENS, PAGE_TOKENS) for page in mine])
        sizes, group = self.sizes, self.sizes.heads // self.sizes.kv_heads
        kv_format = self.records and self.records.kv_format.name
        tiles = tiles or tiles_for(torch.bfloat16, sizes.dim, sizes.dim, group, kv_format)
        return send(cut(tables, range(self.batch), tiles, group, sizes.kv_heads, processors(self.device)), self.device)

    def attend(self, work: Work) -> None:
        """One call a layer."""
        for keys, values in self.memories:
            attend(self.query, keys, values, work, self.sizes.dim**-0.5, records=self.records)


def layer_bytes(sizes: Sizes, batch: int, context: int, records: KVRecords | None = None) -> int:
    """K and V of one layer in bfloat16, or in records."""
    slot_bytes = 2 * 2 * sizes.dim if records is None else records.key_bytes + records.value_bytes
    return sizes.kv_heads * slot_bytes * batch * context


def decode(device: torch.device, sizes: Sizes, bandwidth: float) -> Iterator[dict[str, object]]:
    """Decode attention in shares of the copy bandwidth."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 1e9
    clock = Clock(device, sizes.seconds)
    for context in sizes.contexts:
        for batch in sizes.batches:
            if layer_bytes(sizes, batch, context) > free * sizes.share_of_memory:
                continue
            layers = Layers(sizes, batch, context, device)
            for is_random in (False, True):
                work = layers.work(is_random)
                seconds = clock.run(lambda layers=layers, work=work: layers.attend(work)) / len(layers.memories)
                replayed = clock.replay(lambda layers=layers, work=work: layers.attend(work))
                kernel = seconds if replayed is None else replayed / len(layers.memories)
                yield {
                    "batch": batch,
                    "context": context,
                    "pages": "random" if is_random else "adjacent",
                    "microseconds": kernel * 1e6,
                    "microseconds_from_python": seconds * 1e6,
                    "share_of_copy_bandwidth": layers.bytes / kernel / bandwidth,
                }


def moves(device: torch.device, sizes: Sizes, bandwidth: float) -> Iterator[dict[str, object]]:
    """The store and copy kernels in shares of the copy bandwidth, in many tokens at once."""
    batch, tokens = sizes.batches[-1], sizes.contexts[0]
    layers = Layers(sizes, 2 * batch, tokens, device)
    clock = Clock(device, sizes.seconds)
    new = [
        torch.randn(batch, tokens, sizes.kv_heads, sizes.dim, device=device).bfloat16().transpose(1, 2)
        for _ in range(2)
    ]
    slots = torch.arange(PAGE_TOKENS, PAGE_TOKENS + batch * tokens, dtype=torch.int32, device=device)
    half = batch * tokens
    runs = [(PAGE_TOKENS + at, PAGE_TOKENS + half + at, PAGE_TOKENS) for at in range(0, half, PAGE_TOKENS)]
    copies = pack_copies(runs, device)

    def store() -> None:
        for memory in layers.memories:
            store_tokens(*new, *memory, slots)

    def copy() -> None:
        for memory in layers.memories:
            copy_slots(*memory, *memory, copies)

    for name, call in (("store", store), ("copy", copy)):
        seconds = (clock.replay(call) or clock.run(call)) / len(layers.memories)
        moved = layers.bytes  # half of the layers' tokens, read and written
        yield {
            "kernel": name,
            "tokens": half,
            "microseconds": seconds * 1e6,
            "share_of_copy_bandwidth": moved / seconds / bandwidth,
        }


def prefill(device: torch.device, sizes: Sizes) -> Iterator[dict[str, object]]:
    """One prompt on adjacent pages, against SDPA on the same contiguous causal shape."""
    clock = Clock(device, sizes.seconds)
    group = sizes.heads // sizes.kv_heads
    tiles = tiles_for(torch.bfloat16, sizes.dim, sizes.dim, group)
    for length in sizes.prompts:
        query, keys, values = _prompt(sizes, length, device)
        ours = _prefill_seconds(clock, sizes, tiles, query, keys, values)
        dense = [query.transpose(0, 1), *(m[:, PAGE_TOKENS:].repeat_interleave(group, 0) for m in (keys, values))]
        dense = [each.contiguous().unsqueeze(0) for each in dense]
        theirs = clock.run(lambda d=dense: torch.nn.functional.scaled_dot_product_attention(*d, is_causal=True))
        flops = 2 * 2 * sizes.heads * sizes.dim * length * length / 2
        yield {
            "tokens": length,
            "microseconds": ours * 1e6,
            "sdpa_microseconds": theirs * 1e6,
            "teraflops": flops / ours / 1e12,
            "share_of_sdpa": theirs / ours,
        }


def _prompt(sizes: Sizes, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries ``[length, heads, dim]``, and K and V behind a null page."""
    query = torch.randn(length, sizes.heads, sizes.dim, device=device).bfloat16()
    shape = (sizes.kv_heads, length + PAGE_TOKENS, sizes.dim)
    return query, torch.randn(shape, device=device).bfloat16(), torch.randn(shape, device=device).bfloat16()


def _prefill_seconds(
    clock: Clock, sizes: Sizes, tiles: Sequence[Tile], query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> float:
    length, device = query.shape[0], query.device
    tables = PageTables()
    tables.add(0, length, [(PAGE_TOKENS, length)], 0)
    group = sizes.heads // sizes.kv_heads
    work = send(cut(tables, range(length), tiles, group, sizes.kv_heads, processors(device)), device)
    return clock.run(lambda: attend(query, keys, values, work, sizes.dim**-0.5))


def tiles(device: torch.device, sizes: Sizes, bandwidth: float) -> Iterator[dict[str, object]]:
    """Other shapes of tiles than those of ``tuning.py``, to choose from; what does not fit a GPU says so."""
    clock = Clock(device, sizes.seconds)
    layers = Layers(sizes, sizes.batches[0], sizes.contexts[-1], device)
    query, keys, values = _prompt(sizes, sizes.prompts[0], device)

    def decode_share(tile: Tile) -> float:
        work = layers.work(False, (tile,))
        seconds = clock.replay(lambda: layers.attend(work)) or clock.run(lambda: layers.attend(work))
        return layers.bytes * len(layers.memories) / seconds / bandwidth

    def prefill_microseconds(tile: Tile) -> float:
        return 1e6 * _prefill_seconds(clock, sizes, (tile,), query, keys, values)

    for what, shapes, figure in (
        ("decode, share of copy bandwidth", sizes.decode_tiles, decode_share),
        ("prefill, microseconds", sizes.prefill_tiles, prefill_microseconds),
    ):
        for tile in shapes:
            try:
                yield {"what": what, "tile": tile._asdict(), "figure": figure(tile)}
            except Exception as error:  # out of shared memory, say
                yield {"what": what, "tile": tile._asdict(), "failed": f"{type(error).__name__}: {str(error)[:200]}"}
