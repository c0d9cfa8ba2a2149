"""Calls that need more than the device holds: data, and helpers of their tests."""

import gc
import itertools
from contextlib import contextmanager, suppress

import disk
import pytest
import torch
from disk import Always
from host import tiers
from pair import NEW, Pair, piece
from prompts import batch, tokens
from transformers import StoppingCriteria

from hf_paged import PagedMemoryError, overflow
from hf_paged.core.capacity import Capacity, group_costs
from hf_paged.footprint import footprint_of

SYSTEM = tokens(50, seed=3)
CALLS = {
    # A call, and the blocks on the device: about a third of what it needs.
    "one row": ([piece(101, 1)], {}, 5),
    "no multiple of a block": ([piece(64, 1)], {"max_new_tokens": 40}, 5),
    "batch": ([piece(61, 1), piece(90, 2), piece(23, 3)], {"max_new_tokens": 20}, 11),
    "batch under one prompt": ([SYSTEM + tokens(n, seed=n) for n in (9, 30, 40)], {"max_new_tokens": 12}, 9),
    "samples": ([piece(75, 1)], {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 24}, 8),
    "beams": ([piece(101, 1)], {"num_beams": 3, "max_new_tokens": 24}, 8),
    "rows that end": ([piece(61, 1), piece(64, 2), piece(40, 3)], {"max_new_tokens": 30, "eos_token_id": [5, 9]}, 9),
    "chunks": ([piece(90, 1), piece(70, 2)], {"prefill_chunk_size": 16}, 9),
}


def device_bytes(pair: Pair, num_rows: int, full_blocks: int) -> int:
    """Memory for `full_blocks` blocks in full layers, and what `num_rows` rows hold in the others while they grow."""
    config = pair.paged.config
    layer_bytes = footprint_of(pair.model, config.kv_format).layer_bytes
    groups = group_costs(layer_bytes, pair.paged.layout().windows)
    capacity, total = Capacity(groups, config.block_size, 2**20), 0
    for group in groups:
        blocks = full_blocks if group.window is None else num_rows * (capacity.blocks(group, 2**20) + 1)
        total += (1 + blocks) * group.block_bytes(config.block_size)
    return total


def narrow(make, num_rows: int, full_blocks: int, host="10MiB", **overrides) -> Pair:
    """A pair that `make` makes, with so much memory and a host below."""
    size = device_bytes(make(**overrides), num_rows, full_blocks)
    pair = make(max_memory={0: size, "cpu": host}, **overrides)
    pair.paged._current_pool(pair.model).tiers.policy = Always()
    return pair


def num_rows(call: str) -> int:
    """Rows of one of `CALLS`; beams have much of a window in common."""
    return {"samples": 3, "beams": 2}.get(call, len(CALLS[call][0]))


def refused(pair: Pair, kwargs: dict, reasons=()) -> int:
    """A call too large for device and host: it ends with an error, nothing else is lost. Gives the bytes it moved."""
    held = generated(pair.model, piece(9, 5))
    row = piece(61 if "max_new_tokens" in kwargs else 121, 1)
    with pytest.raises(PagedMemoryError, match=r"tokens need .* max_memory\[0\] or max_memory\['cpu'\]"):
        pair.model.generate(**batch([row]), **{"do_sample": False, "max_new_tokens": NEW, **kwargs})
    moved_bytes = pair.paged.stats().offloaded_bytes
    gc.collect()
    assert on_host(pair) == 0
    assert pair.pool.in_use == 2
    pair.pool.check_integrity()
    assert torch.equal(held.sequences, generated(pair.stock, piece(9, 5)).sequences)
    del held
    pair.ask([piece(61, 2)])
    check(pair, reasons)
    return moved_bytes


@contextmanager
def failing_once(monkeypatch, owner: type, name: str, error: type[BaseException], number: int):
    """A method of `owner` raises `error` when it is called for time `number`, from 0; gives the count of its calls."""
    counts, function = itertools.count(), getattr(owner, name)

    def failing(self, *args):
        if next(counts) == number:
            raise error("a transfer")
        return function(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, failing)
        with suppress(RuntimeError, KeyboardInterrupt):
            yield counts


def watch(monkeypatch) -> list[int]:
    """How many blocks each pass has read on the host."""
    counts, function = [], overflow.host_reads

    def counted(plan, blocks, *args):
        counts.append(len(blocks))
        return function(plan, blocks, *args)

    monkeypatch.setattr(overflow, "host_reads", counted)
    return counts


def on_host(pair: Pair) -> int:
    """Blocks that running sequences hold on the host."""
    overflow = pair.paged._pool.overflow
    return 0 if overflow is None else len(overflow)


def check(pair: Pair, fallbacks=()) -> None:
    """As the tiers are checked; and the host tier has all of its memory back."""
    disk.check(pair, fallbacks)
    assert on_host(pair) == 0
    index = tiers(pair).levels[0].index
    assert index is None or not any(index._lent)


def generated(model, given, new=NEW, **kwargs):
    inputs = given if isinstance(given, dict) else batch([given])
    return model.generate(**inputs, do_sample=False, max_new_tokens=new, return_dict_in_generate=True, **kwargs)


def continued(outputs, model, keep=None):
    """Some tokens more behind a cache that came back, of which `keep` tokens are left."""
    cache, ids = outputs.past_key_values, outputs.sequences
    if keep is not None:
        cache.crop(keep - cache.get_seq_length())
        ids = ids[:, : keep + 1]
    return generated(model, {"input_ids": ids}, past_key_values=cache)


class Notes(StoppingCriteria):
    """After each step: what `note` says."""

    def __init__(self, note):
        self._note, self.said = note, []

    def __call__(self, input_ids, scores, **kwargs):
        self.said.append(self._note())
        return torch.zeros(len(input_ids), dtype=torch.bool)
