"""Pools on a device whose memory is asked for in steps (the CPU stands for it): stock's tokens, memory that follows."""

import gc

import pytest
import torch
from host import as_gpu
from on_demand import HostDriver
from pair import Pair
from prompts import batch, tokens

from hf_paged import arena, generation, pool
from hf_paged.core import budget
from hf_paged.errors import RefusedMemoryError

PAGE = 4096
CALLS = {
    "greedy": {},
    "samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "states": {"output_hidden_states": True, "return_dict_in_generate": True},
}


@pytest.fixture
def driver(monkeypatch):
    driver = HostDriver(PAGE)
    monkeypatch.setattr(arena, "driver_for", lambda device: driver)
    monkeypatch.setattr(pool, "can_give_back", lambda: False)  # that is the CPU's own way
    return driver


def held(driver):
    """The device's memory; pools of before do not count, which poison holds in circles."""
    gc.collect()
    return driver.backed_bytes


def check_bytes(pair, driver):
    """The device has as much as the pool says, in whole blocks; and two pages for each head and extent at its ends."""
    ends = sum(
        4 * store.keys.shape[0] * PAGE * len(pair.pool.pools[store.group].extents.runs)
        for store in pair.paged._pool.stores
    )
    stores = sum(2 * PAGE for _ in pair.paged._pool.stores)
    in_blocks = pair.paged.stats().bytes_reserved - pair.pool.budget.guest_bytes  # states are tensors like any other
    assert in_blocks <= held(driver) <= in_blocks + ends + stores


@pytest.mark.parametrize(
    "architecture", ["llama", "mistral_sliding", "gemma2", "falcon_rotary", "qwen3_next", "deepseek_v3"]
)
@pytest.mark.parametrize("call", CALLS)
def test_answers(architecture, call, driver):
    pair = Pair(architecture)
    for lengths in ([30, 17], [90, 61], [30, 17], [5]):
        pair.ask([tokens(n, seed=n) for n in lengths], max_new_tokens=12, **CALLS[call])
    check_bytes(pair, driver)
    pair.paged.release()
    assert held(driver) == 0
    pair.ask([tokens(40, seed=1)], **CALLS[call])


@pytest.mark.parametrize("kv_format", ["int8", "int4"])
def test_answers_on_quantized_kv_are_those_of_a_pool_that_is_there_at_once(kv_format, driver, monkeypatch):
    answers = []
    for is_there in (False, True):
        if is_there:
            monkeypatch.undo()
        pair = Pair(kv_cache_dtype=kv_format, verify=False)
        rows = [tokens(n, seed=n) for n in (70, 33)]
        answers += [pair.model.generate(**batch(rows), max_new_tokens=40, do_sample=False) for _ in range(2)]
        assert (pair.pool.pools[0].extents is None) == is_there
    assert all(torch.equal(each, answers[0]) for each in answers)


def test_memory_follows_the_blocks(driver):
    pair = Pair(prefix_caching=False)
    pair.ask([tokens(20, seed=1)])
    least = held(driver)
    most = []
    for length in (60, 200, 60):
        peak = []
        pair.ask([tokens(length, seed=2), tokens(length, seed=3)], stopping_criteria=[_Watch(driver, peak)])
        most.append(max(peak))
        assert held(driver) == least, "only what the null block lies in stays"
    assert least < most[0] == most[2] < most[1]
    check_bytes(pair, driver)
    pair.paged.release()
    assert held(driver) == 0


class _Watch:
    """A stopping criterion that notes the device's memory."""

    def __init__(self, driver, peak):
        self.driver, self.peak = driver, peak

    def __call__(self, input_ids, scores, **kwargs):
        self.peak.append(self.driver.backed_bytes)
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_cached_prefixes_keep_their_memory_until_they_are_forgotten(driver):
    pair = Pair()
    rows = [tokens(100, seed=1)]
    pair.ask(rows)
    before = held(driver)
    pair.ask(rows)
    assert pair.reused > 90
    assert held(driver) == before
    pair.paged.clear()
    assert held(driver) < before
    pair.ask(rows)
    assert pair.reused == 0


def test_a_budget_holds(driver):
    pair = Pair()
    pair.ask([tokens(10, seed=1)])
    limit = 40 * pair.pool.pools[0].block_bytes
    pair = Pair(max_memory={"cpu": limit})
    for seed in range(8):
        pair.ask([tokens(100, seed=seed)], max_new_tokens=70)
        assert pair.paged.stats().bytes_reserved <= limit
        check_bytes(pair, driver)
    assert pair.paged.stats().evicted_blocks > 0


def test_free_memory_is_looked_up_extent_by_extent(driver, monkeypatch):
    asked, free_bytes = [], pool.free_bytes
    monkeypatch.setattr(pool, "free_bytes", lambda device: (asked.append(device), free_bytes(device))[1])
    monkeypatch.setattr(budget, "GROWTH_STEP_BYTES", 2 * PAGE)
    monkeypatch.setattr(generation, "MAX_ROOM_TOKENS", 0)  # a block is taken when it is needed
    pair = Pair(prefix_caching=False)
    pair.ask([tokens(20, seed=1)])
    asked.clear()
    pair.ask([tokens(20, seed=1)], max_new_tokens=150)
    took = 170 // 8
    assert 1 < len(asked) < took / 3, "not for every block"


def test_memory_that_is_refused_is_a_clear_error_and_nothing_is_lost(driver):
    pair = Pair(prefix_caching=False)
    pair.ask([tokens(10, seed=1)])
    before = held(driver)
    rows = [tokens(150, seed=2), tokens(150, seed=3)]
    for pages in range(1, 24):  # enough for K of the first layer, for its V, ...
        driver.limit_bytes = before + pages * PAGE
        with pytest.raises(RefusedMemoryError, match=r"no \d+ bytes .* more tokens need \d+ blocks .* tokens fit"):
            pair.model.generate(**batch(rows), max_new_tokens=4)
        assert pair.paged.stats().blocks_in_use == 0
        assert held(driver) == before, "what came went back"
    pair.ask([tokens(10, seed=1)])
    driver.limit_bytes = None
    pair.ask(rows)
    assert pair.paged.stats().fallbacks == {}


@pytest.mark.parametrize(("architecture", "named"), [("llama", True), ("mistral_sliding", False)])
def test_what_the_device_refuses_may_go_to_the_host_of_full_layers(architecture, named, driver, monkeypatch):
    as_gpu(monkeypatch)
    pair = Pair(architecture, prefix_caching=False)
    pair.ask([tokens(10, seed=1)])
    driver.limit_bytes = held(driver) + PAGE
    with pytest.raises(RefusedMemoryError, match=r"tokens fit\. Free memory there, .*lower the batch size") as raised:
        pair.model.generate(**batch([tokens(150, seed=seed) for seed in range(4)]), max_new_tokens=4)
    assert ("set max_memory['cpu'], shorten" in str(raised.value)) == named


def test_memory_that_is_refused_while_decoding(driver):
    pair = Pair(prefix_caching=False)
    row = [tokens(100, seed=2)]
    pair.ask(row, max_new_tokens=4)
    peak = []
    pair.ask(row, max_new_tokens=4, stopping_criteria=[_Watch(driver, peak)])
    driver.limit_bytes = max(peak)
    with pytest.raises(RefusedMemoryError):
        pair.model.generate(**batch(row), max_new_tokens=100)
    assert pair.paged.stats().blocks_in_use == 0
    pair.ask(row, max_new_tokens=4)
    driver.limit_bytes = None
    pair.ask(row, max_new_tokens=100)


def test_where_memory_is_refused_cached_blocks_make_room(driver):
    pair = Pair()
    for seed in range(4):
        pair.ask([tokens(100, seed=seed)])
    driver.limit_bytes = held(driver)
    pair.ask([tokens(120, seed=9), tokens(110, seed=10)])
    assert pair.paged.stats().evicted_blocks > 0
    assert pair.paged.stats().fallbacks == {}


def test_memory_that_is_refused_to_a_layer_of_the_first_pass(driver):
    pair = Pair()
    driver.limit_bytes = 9 * PAGE
    rows = [tokens(60, seed=2)]
    with pytest.raises(RefusedMemoryError):
        pair.model.generate(**batch(rows), max_new_tokens=4)
    driver.limit_bytes = None
    pair.ask(rows)
    assert pair.paged.stats().fallbacks == {}


def test_blocks_go_to_disk_and_come_back(driver, tmp_path):
    pair = Pair(max_memory={"cpu": 120_000, "disk": "10MB"}, offload_folder=str(tmp_path))
    rows = [[tokens(100, seed=seed)] for seed in range(4)]
    for _ in range(2):
        for row in rows:
            pair.ask(row)
    assert pair.paged.stats().blocks_disk > 0
    check_bytes(pair, driver)
