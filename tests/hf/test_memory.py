"""The process's own memory: it grows with the blocks that are used, and falls when they are not needed any more."""

from types import SimpleNamespace

import pytest
import torch
from families import VOCAB
from pair import Pair, distinct_pieces, evict, piece
from prompts import batch, tokens
from resident import MIB, NOISE, TOKEN_BYTES, Watch, ask, patched, resident, wide_model
from transformers import StoppingCriteria
from windows import MIXED, PURE, window_pair

from hf_paged import PagedCache, PagedMemoryError, arena, free_memory, patch_model, pool
from hf_paged.core.budget import GROWTH_STEP_BYTES

# The process's memory


def test_memory_comes_with_use_and_goes_with_the_call(no_poison):
    model = patched(prefix_caching=False)
    before, watch = resident(), Watch(model)
    ask(model, 600, stopping_criteria=[watch])
    during, stats = watch.seen[0]
    assert 600 * TOKEN_BYTES <= stats.bytes_in_use <= stats.bytes_reserved <= 620 * TOKEN_BYTES
    assert abs(during - before - stats.bytes_reserved) <= NOISE
    assert resident() - before <= NOISE
    assert model.paged.stats().bytes_reserved == 0


@pytest.mark.parametrize("forget", ["clear", "release"])
def test_what_is_cached_stays_until_it_is_forgotten(forget, no_poison):
    model = patched()
    before = resident()
    for seed in range(3):
        ask(model, 300, seed)
    stats, held = model.paged.stats(), resident() - before
    assert stats.blocks_cached * 16 * TOKEN_BYTES == stats.bytes_reserved >= 900 * TOKEN_BYTES
    assert abs(held - stats.bytes_reserved) <= NOISE
    getattr(model.paged, forget)()
    assert resident() - before <= NOISE
    assert model.paged.stats().bytes_reserved == 0
    assert "/ 0 B" in str(model.paged)


def test_release_leaves_a_sequence_that_is_held_its_memory(no_poison):
    model, stock = patched(), wide_model()
    before = resident()
    inputs = batch([tokens(300, seed=1)])
    output = model.generate(**inputs, do_sample=False, max_new_tokens=4, return_dict_in_generate=True)
    for seed in (2, 3):
        ask(model, 500, seed)
    model.paged.release()
    stats = model.paged.stats()
    assert 300 * TOKEN_BYTES <= stats.bytes_reserved == stats.bytes_in_use <= 320 * TOKEN_BYTES
    assert resident() - before - stats.bytes_reserved <= NOISE
    ask(model, 500, 4)  # on the same pool, beside it
    more = batch([output.sequences[0].tolist() + tokens(9, seed=5)])
    continued = model.generate(**more, past_key_values=output.past_key_values, do_sample=False, max_new_tokens=6)
    assert torch.equal(continued, stock.generate(**more, do_sample=False, max_new_tokens=6))
    del output
    model.paged.release()
    assert model.paged.stats().bytes_reserved == 0
    assert resident() - before <= NOISE


def test_calls_of_growing_and_shrinking_size_leave_memory_flat(no_poison):
    model = patched(prefix_caching=False)
    before, sizes = resident(), [*range(40, 440, 60), *range(400, 0, -60)]
    assert len(sizes) == 14
    for size in sizes:
        watch = Watch(model)
        ask(model, size, new=2, stopping_criteria=[watch])
        (during, stats), *_ = watch.seen
        assert abs(during - before - size * TOKEN_BYTES) <= NOISE, f"{size} tokens: {(during - before) / MIB} MiB"
        assert stats.bytes_reserved - size * TOKEN_BYTES <= 16 * TOKEN_BYTES, "no trace of larger calls before"
        assert resident() - before <= NOISE, f"after {size} tokens"
    model.paged._pool.manager.check_integrity()


def test_rows_that_end_early_give_memory_back_while_others_run(no_poison):
    class Ends(Watch):
        eos_token_id = torch.tensor([VOCAB - 1])

        def __call__(self, input_ids, scores, **kwargs):
            super().__call__(input_ids, scores)
            return torch.tensor([len(self.seen) > (1 if row else 6) for row in range(len(input_ids))])

    model = patched(prefix_caching=False)
    watch = Ends(model)
    rows = [tokens(400, seed=seed) for seed in range(4)]
    model.generate(**batch(rows), do_sample=False, max_new_tokens=8, stopping_criteria=[watch])
    first, last = watch.seen[0], watch.seen[-1]
    assert last[1].bytes_reserved <= 420 * TOKEN_BYTES
    assert first[0] - last[0] >= 1180 * TOKEN_BYTES - NOISE


def held_bytes(pair: Pair) -> tuple[int, int, int]:
    """Of blocks in use, of all memory that is touched, and of one block in every group."""
    pools, stats = pair.pool.pools, pair.paged.stats()
    return stats.bytes_in_use, stats.bytes_reserved, sum(each.page_blocks * each.block_bytes for each in pools)


@pytest.mark.parametrize(
    ("name", "kwargs"), [("llama", {"num_beams": 4}), (MIXED, {}), (MIXED, {"num_beams": 3})], ids=str
)
def test_running_sequences_hold_little_more_than_their_blocks(name, kwargs, no_poison):
    """A prompt in windows has needed much more for a moment, and beams give blocks up at every step."""
    pair = Pair(name) if name == "llama" else window_pair(name, 8)
    patch_model(pair.model, block_size=8, prefix_caching=False)
    seen = []

    class Held(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            seen.append(held_bytes(pair))
            return torch.zeros(len(input_ids), dtype=torch.bool)

    pair.ask(
        [tokens(250, seed=3)],
        max_new_tokens=40,
        stopping_criteria=lambda model: [Held()] * (model is pair.model),
        **kwargs,
    )
    rows = kwargs.get("num_beams", 1)
    # At either end of its blocks a row may share a page with others that are free.
    assert all(reserved - used <= 2 * rows * block for used, reserved, block in seen)


# The budget


@pytest.mark.parametrize("name", ["llama", PURE, MIXED])
def test_reserved_memory_never_passes_the_budget(name, no_poison):
    """At every step; eviction, windows and groups that need each other's memory included."""
    pair = Pair(name) if name == "llama" else window_pair(name, 8)
    budget = 150 * pair.paged._make_pool(pair.model).token_bytes
    patch_model(pair.model, block_size=8, max_memory={"cpu": budget})
    seen = []

    class Reserved(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            seen.append(pair.paged.stats().bytes_reserved)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    for seed, length in enumerate((100, 20, 60, 110, 7, 90)):
        pair.ask([tokens(length, seed=seed)], max_new_tokens=24, stopping_criteria=lambda _: [Reserved()])
        seen.append(pair.paged.stats().bytes_reserved)
    assert 0.9 * budget < max(seen) <= budget, "it was needed, and it was kept"


class Machine:
    """What the pool is told of its machine: `total` bytes, of which others and the pool itself take some."""

    def __init__(self, monkeypatch, model, total: int):
        self.model, self.total, self.others, self.asked = model, total, 0, 0
        told = SimpleNamespace(virtual_memory=self.virtual_memory, disk_partitions=lambda all: [])
        monkeypatch.setattr(free_memory, "psutil", told)

    def virtual_memory(self):
        self.asked += 1
        available = self.total - self.others - self.model.paged.stats().bytes_reserved
        return SimpleNamespace(total=self.total, available=max(0, available))


def test_the_default_budget_is_what_is_free_when_it_is_needed(monkeypatch, no_poison):
    model = patched()
    model.paged.release()
    machine = Machine(monkeypatch, model, 200 * MIB)
    ask(model, 600, 1)
    machine.others = 150 * MIB
    ask(model, 600, 2)  # there is no more, so what is cached goes
    stats = model.paged.stats()
    assert stats.evicted_blocks > 0
    assert stats.bytes_reserved <= 50 * MIB * pool.FREE_MEMORY_SHARE
    with pytest.raises(PagedMemoryError, match=r"max_memory\['cpu'\]"):
        ask(model, 900, 3)
    model.paged._pool.manager.check_integrity()
    assert model.paged.stats().blocks_in_use == 0
    machine.others = 0
    assert torch.equal(ask(model, 900, 3), ask(wide_model(), 900, 3))


def test_memory_that_others_take_during_a_call_is_not_grown_into(monkeypatch, no_poison):
    """By more than one step."""
    model = patched()
    model.paged.release()
    machine = Machine(monkeypatch, model, 1000 * MIB)

    class Others(Watch):
        def __call__(self, input_ids, scores, **kwargs):
            machine.others = 900 * MIB
            return super().__call__(input_ids, scores)

    watch = Others(model)
    with pytest.raises(PagedMemoryError):
        model.generate(
            **batch([tokens(64, seed=seed) for seed in range(24)]),
            do_sample=False,
            max_new_tokens=200,
            stopping_criteria=[watch],
        )
    taken = [stats.bytes_reserved for _, stats in watch.seen]
    assert taken[0] > 90 * MIB
    assert taken[0] < max(taken) <= taken[0] + GROWTH_STEP_BYTES
    assert model.paged.stats().blocks_in_use == 0


def test_free_memory_is_looked_up_step_by_step_and_not_block_by_block(monkeypatch, no_poison):
    model = patched()
    machine = Machine(monkeypatch, model, 4000 * MIB)
    for seed in range(4):
        ask(model, 200, seed, new=60)
        assert 1 <= machine.asked <= 1 + model.paged.stats().bytes_reserved / GROWTH_STEP_BYTES
        machine.asked = 0


# Where pages cannot be given back, or not be had


def test_without_a_way_to_give_pages_back_all_works_and_memory_stays(monkeypatch):
    for module in (arena, pool):
        monkeypatch.setattr(module, "can_give_back", lambda: False)
    pair = window_pair(MIXED, 8)
    for row in distinct_pieces(3, 50):
        pair.ask([row], max_new_tokens=12)
    before = pair.paged.stats().bytes_reserved
    pair.paged.clear()
    assert pair.paged.stats().bytes_reserved == before > 0
    pair.ask(distinct_pieces(3, 50))
    pair.paged.release()
    assert pair.paged.stats().bytes_reserved == 0


def test_address_space_that_the_system_refuses(monkeypatch):
    pair = Pair("llama")
    expected = pair.ask([piece(30, 1)])
    pair.paged.release()
    allowed, real = iter([True, True, True]), arena._map

    def refuse(num_bytes):
        if next(allowed, False):
            return real(num_bytes)
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(arena, "_map", refuse)
    with pytest.raises(PagedMemoryError, match="max_memory"):
        pair.model.generate(**batch([piece(30, 1)]), do_sample=False, max_new_tokens=6)
    pair.check()
    monkeypatch.setattr(arena, "_map", real)
    assert torch.equal(pair.ask([piece(30, 1)]), expected)


# The arena


@pytest.mark.parametrize(
    ("dim", "dtype"), [(64, torch.float32), (80, torch.float32), (96, torch.bfloat16), (5, torch.half)]
)
def test_pages_of_an_arena(dim, dtype):
    """Every head begins with a page and has an odd number of them; whole pages lose their content, others keep it."""
    like = torch.empty(1, 3, 1, dim, dtype=dtype)
    made = arena.Arena(arena.whole_pages_of_slots(10_000, [like]), like)
    memory, block_size = made.tensor, 16
    assert memory.is_contiguous()
    assert memory.shape[1] >= 10_000
    assert not memory.any()
    stride = memory.stride(0) * memory.element_size()
    assert memory.data_ptr() % arena.PAGE_BYTES == stride % arena.PAGE_BYTES == 0
    assert stride // arena.PAGE_BYTES % 2 == 1
    memory.fill_(1)
    page_blocks = made.whole_page_blocks(block_size)
    assert page_blocks * block_size * dim * memory.element_size() % arena.PAGE_BYTES == 0
    start, stop = 2 * page_blocks * block_size, 3 * page_blocks * block_size
    made.give_back(start, stop)
    given = memory[:, start:stop]
    assert given.eq(0).all()
    assert memory.sum(dtype=torch.float64) == memory.numel() - given.numel()


# Several devices


def test_each_layer_keeps_its_kv_on_its_own_device():
    """The meta device stands for a second one: its tensors are stored, and hold nothing."""
    model = wide_model()
    cache, devices = PagedCache(model.config), ["cpu", "meta", "cpu", "meta"]
    key = torch.randn(1, 8, 20, 256)
    for layer, device in enumerate(devices):
        keys, _ = cache.update(key.to(device), key.to(device), layer)
        assert keys.device.type == device
        if device == "cpu":
            assert torch.equal(keys, key)
    assert [layer.device.type for layer in cache.layers] == devices
    cache.reset()
    assert cache.pool.bytes_reserved == 0


@pytest.mark.parametrize("offload", ["cpu_offload", "disk_offload", "dispatch_model"])
def test_offloaded_models_keep_kv_where_they_compute(offload, tmp_path):
    """Parameters lie on the meta device between calls, KV never does, and its memory goes back as any other's."""
    accelerate = pytest.importorskip("accelerate")
    pair = Pair("llama")
    if offload == "cpu_offload":
        accelerate.cpu_offload(pair.model, execution_device=torch.device("cpu"))
    elif offload == "disk_offload":
        accelerate.disk_offload(pair.model, str(tmp_path), execution_device=torch.device("cpu"))
    else:
        where = {name: "cpu" for name, _ in pair.model.model.named_children() if name != "layers"}
        where |= {f"layers.{at}": "disk" if at else "cpu" for at in range(pair.model.config.num_hidden_layers)}
        where = {f"model.{name}": device for name, device in where.items()} | {"lm_head": "cpu"}
        accelerate.dispatch_model(pair.model, where, offload_dir=str(tmp_path), main_device="cpu")
    assert any(parameter.is_meta for parameter in pair.model.parameters())
    for seed in (1, 2):
        pair.ask([piece(40, seed), piece(25, seed)])
    assert {layer.keys.device.type for layer in pair.paged._pool.stores} == {"cpu"}
    assert pair.paged._pool.device.type == "cpu"
    assert not [reason for reason in pair.paged.stats().fallbacks if "meta" in reason]
    pair.paged.clear()
    assert pair.paged.stats().bytes_reserved == 0


def test_what_was_evicted_by_hand_is_given_back_when_the_model_is_idle():
    pair = Pair("llama")
    pair.ask([piece(60, 1)])
    evict(pair, 4)
    pair.ask([piece(5, 2)], max_new_tokens=1)
    stats = pair.paged.stats()
    assert stats.bytes_in_use == 0
    assert stats.bytes_reserved <= (stats.blocks_cached + 64) * 8 * 1024, "no more than pages shared with cached blocks"
