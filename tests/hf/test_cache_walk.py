"""Random operations on a `PagedCache` and a `DynamicCache`, and texts fed in random pieces."""

import copy

import prompts
import pytest
import torch
from cache_pairs import CONFIGS, append, assert_caches_equal, both_caches
from families import stock_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tolerances import assert_close
from transformers import Cache

from hf_paged import PagedCache


class AgainstDynamicCache(RuleBasedStateMachine):
    """Any order of operations leaves both caches with the same K and V in every layer, bit for bit."""

    config_name = "llama"

    def __init__(self):
        super().__init__()
        self.pairs: list[tuple[Cache, Cache]] = []
        self.rows: list[int] = []
        self.seed = 0

    @initialize(rows=st.integers(1, 4), tokens=st.integers(1, 20))
    def start(self, rows, tokens):
        record = hasattr(Cache, "activate_past_recording") and self.config_name != "llama"
        self.pairs = [both_caches(self.config_name, rows, tokens, record_past=record)]
        self.rows = [rows]

    def pick(self, choice: int) -> int:
        return choice % len(self.pairs)

    @rule(choice=st.integers(0, 3), tokens=st.integers(1, 11))
    def append(self, choice, tokens):
        index = self.pick(choice)
        self.seed += 1
        append(self.pairs[index], self.rows[index], tokens, self.seed)

    @rule(choice=st.integers(0, 3), order=st.lists(st.integers(0, 7), min_size=8, max_size=8))
    def reorder(self, choice, order):
        index = self.pick(choice)
        beam_idx = torch.tensor([position % self.rows[index] for position in order[: self.rows[index]]])
        for cache in self.pairs[index]:
            cache.reorder_cache(beam_idx)

    @rule(choice=st.integers(0, 3), order=st.lists(st.integers(0, 7), min_size=1, max_size=5))
    def select(self, choice, order):
        index = self.pick(choice)
        indices = torch.tensor([position % self.rows[index] for position in order])
        for cache in self.pairs[index]:
            cache.batch_select_indices(indices)
        self.rows[index] = len(order)

    @precondition(lambda self: max(self.rows, default=0) <= 4)
    @rule(choice=st.integers(0, 3))
    def repeat(self, choice):
        index = self.pick(choice)
        for cache in self.pairs[index]:
            cache.batch_repeat_interleave(2)
        self.rows[index] *= 2

    @rule(choice=st.integers(0, 3), remove=st.integers(0, 12))
    def crop(self, choice, remove):
        """As far as stock can: a window layer only remembers what was recorded since its last crop."""
        index = self.pick(choice)
        dynamic = self.pairs[index][0]
        amount = min(remove, *(self.can_crop(layer) for layer in dynamic.layers))
        if amount > 0 or hasattr(dynamic, "activate_past_recording"):  # before that, 0 was a length
            for cache in self.pairs[index]:
                cache.crop(-amount)

    @staticmethod
    def can_crop(layer) -> int:
        length = layer.get_seq_length()
        if not getattr(layer, "is_sliding", False):
            return length - 1
        if length < layer.sliding_window:
            return length - 1
        if not getattr(layer, "record_past", False):
            return 0
        return max(0, layer.keys.shape[-2] - (layer.sliding_window - 1))

    @precondition(lambda self: len(self.pairs) < 3)
    @rule(choice=st.integers(0, 3))
    def copy(self, choice):
        index = self.pick(choice)
        self.pairs.append(copy.deepcopy(self.pairs[index]))
        self.rows.append(self.rows[index])

    @precondition(lambda self: len(self.pairs) > 1)
    @rule(choice=st.integers(0, 3))
    def drop(self, choice):
        index = self.pick(choice)
        del self.pairs[index], self.rows[index]

    @invariant()
    def equal(self):
        for index, pair in enumerate(self.pairs):
            assert_caches_equal(*pair, f"cache {index}")


@pytest.mark.parametrize("name", CONFIGS)
def test_random_operations_leave_the_same_keys_and_values(name):
    if name != "llama" and not hasattr(Cache, "activate_past_recording"):
        AgainstDynamicCacheOnWindows = type("WithoutCrop", (AgainstDynamicCache,), {"config_name": name, "crop": None})
        machine = AgainstDynamicCacheOnWindows
    else:
        machine = type(f"On_{name}", (AgainstDynamicCache,), {"config_name": name})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=40, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


@settings(max_examples=40, deadline=None)
@given(
    pieces=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    rows=st.integers(1, 3),
    block_size=st.sampled_from([8, 16, 32]),
)
@torch.no_grad()
def test_any_split_of_a_text_gives_the_same_logits(pieces, rows, block_size):
    """Feeding a text in any pieces through a PagedCache gives the logits of feeding it at once without a cache."""
    model = stock_model("gemma3")
    ids = torch.tensor([prompts.tokens(sum(pieces), seed) for seed in range(rows)])
    cache = PagedCache(model.config, block_size=block_size)
    logits = torch.cat([model(piece, past_key_values=cache).logits for piece in ids.split(pieces, dim=1)], dim=1)
    assert_close(logits, model(ids, use_cache=False).logits, f"pieces {pieces}")
