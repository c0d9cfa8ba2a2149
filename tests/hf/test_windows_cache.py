"""`PagedCache` as the cache of unpatched window models, far past the window: as `DynamicCache`, or a clear refusal."""

import copy

import pytest
import torch
from pair import piece
from prompts import batch, tokens
from tolerances import assert_close
from transformers import Cache, DynamicCache
from versions import choose_attention
from windows import MIXED, PURE, WINDOWED, WINDOWS, Need, spread, stock_model

from hf_paged import PagedCache

ATTENTIONS = ("eager", "sdpa")


def model_with(name: str, window: int, attention: str) -> torch.nn.Module:
    model = copy.deepcopy(stock_model(name, window))
    choose_attention(model, attention)
    return model


class Caches:
    """A `DynamicCache` and a `PagedCache` that one model fills with the same tokens."""

    def __init__(self, name: str = MIXED, window: int = 8, attention: str = "sdpa", rows: int = 1):
        self.model = model_with(name, window, attention)
        self.stock = DynamicCache(config=self.model.config)
        self.paged = PagedCache(self.model.config, block_size=8)
        self.rows, self.seed, self.text = rows, 0, torch.zeros(rows, 0, dtype=torch.long)

    def both(self, change) -> None:
        for cache in (self.stock, self.paged):
            change(cache)

    def next_piece(self, count: int) -> torch.Tensor:
        self.seed += 1
        return torch.tensor([tokens(count, 100 * self.seed + row) for row in range(self.rows)])

    @torch.no_grad()
    def feed(self, *counts: int) -> None:
        """The same logits from both, for pieces of so many tokens."""
        for count in counts:
            ids = self.next_piece(count)
            expected, actual = (self.model(ids, past_key_values=cache).logits for cache in (self.stock, self.paged))
            assert_close(actual, expected, f"piece of {count} tokens after {self.text.shape[1]}")
            self.text = torch.cat([self.text, ids], dim=1)
        assert self.paged.get_seq_length() == self.stock.get_seq_length()

    @torch.no_grad()
    def feed_paged(self, count: int) -> None:
        """Logits as without any cache, for what stock's cache cannot do."""
        ids = self.next_piece(count)
        actual = self.model(ids, past_key_values=self.paged).logits
        self.text = torch.cat([self.text, ids], dim=1)
        assert_close(actual, self.model(self.text, use_cache=False).logits[:, -count:], f"after {self.text.shape[1]}")


@pytest.mark.parametrize(("name", "attention", "window"), spread(WINDOWED, ATTENTIONS, WINDOWS))
def test_generate_far_past_the_window(name, attention, window):
    model = model_with(name, window, attention)
    inputs = batch([piece(2 * window + 7, 1), piece(9, 2)])
    for how in ({"max_new_tokens": 2 * window + 10}, {"max_new_tokens": 12, "num_beams": 3}):
        answers = [
            model.generate(**inputs, past_key_values=cache, do_sample=False, **how)
            for cache in (DynamicCache(config=model.config), PagedCache(model.config, block_size=8))
        ]
        assert torch.equal(*answers), f"{how}\n  stock {answers[0].tolist()}\n  paged {answers[1].tolist()}"


@pytest.mark.parametrize(("name", "window"), [(PURE, 5), (PURE, 20), (PURE, 8)])
def test_a_small_budget_carries_a_long_answer(name, window):
    model = stock_model(name, window)
    need = Need.of(model, 8)
    budget = 2 * need.window + need.everything(8)
    assert budget < 0.7 * need.everything(190)
    cache = PagedCache(model.config, block_size=8, max_memory={"cpu": budget})
    inputs = batch([piece(10, 1)])
    answer = model.generate(**inputs, past_key_values=cache, do_sample=False, max_new_tokens=180)
    assert torch.equal(answer, model.generate(**inputs, do_sample=False, max_new_tokens=180))


@pytest.mark.parametrize(("attention", "window", "name"), spread(ATTENTIONS, WINDOWS, [PURE, "gemma2", MIXED]))
def test_pieces_of_a_text_and_rows_that_move(attention, window, name):
    caches = Caches(name, window, attention, rows=3)
    caches.feed(3 * window + 2, 1, 1, 1)
    caches.both(lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])))
    caches.feed(1, window + 4, 1)
    caches.both(lambda cache: cache.batch_select_indices(torch.tensor([2, 0])))
    caches.rows, caches.text = 2, caches.text[:2]
    caches.feed(1, 2, window + 9)
    caches.both(lambda cache: cache.batch_repeat_interleave(2))
    caches.rows, caches.text = 4, caches.text.repeat_interleave(2, dim=0)
    caches.feed(*[1] * 10)


@pytest.mark.parametrize("name", [PURE, MIXED])
def test_copies_part_far_past_the_window(name):
    caches = Caches(name)
    caches.feed(50, 1, 1)
    stock, paged = copy.deepcopy(caches.stock), copy.deepcopy(caches.paged)
    caches.feed(1, 9, 20)
    caches.stock, caches.paged = stock, paged
    caches.text = caches.text[:, :52]
    caches.feed(1, 1, 12)


@pytest.mark.parametrize("remove", [1, 3, 8, 20, 49])
@pytest.mark.parametrize("window", [5, 20])
@pytest.mark.parametrize("name", [PURE, MIXED])
def test_crop_past_the_window_is_right_or_refused(name, window, remove):
    """Stock refuses: what the window needs then is gone. A refusal changes nothing."""
    caches = Caches(name, window)
    caches.feed(40, 1, 9)
    with pytest.raises((RuntimeError, ValueError)):
        copy.deepcopy(caches.stock).crop(-remove)
    refusal = None
    try:
        caches.paged.crop(-remove)
    except ValueError as error:
        refusal = str(error)
    if refusal is None:
        caches.text = caches.text[:, : 50 - remove]
    assert refusal is None or "window" in refusal, "the message says what is in the way"
    assert caches.paged.get_seq_length() == caches.text.shape[1]
    for count in (1, 6, 1, 25):
        caches.feed_paged(count)


@pytest.mark.parametrize("name", [PURE, MIXED])
def test_crop_within_the_window(name):
    """Nothing has fallen out of a window that is longer than the text."""
    caches = Caches(name, window=33)
    caches.feed(20, 1, 1)
    caches.both(lambda cache: cache.crop(-9))
    caches.text = caches.text[:, :13]
    caches.feed(1, 30, 1, 12)


@pytest.mark.skipif(not hasattr(Cache, "activate_past_recording"), reason="this transformers has no past recording")
@pytest.mark.parametrize("window", [5, 8, 20])
@pytest.mark.parametrize("name", [PURE, MIXED])
def test_crop_of_what_was_recorded(name, window):
    """As assisted decoding does it, round after round: some tokens more, and some of them taken back."""
    caches = Caches(name, window)
    caches.both(lambda cache: cache.activate_past_recording())
    caches.feed(40)
    caches.both(lambda cache: cache.crop(0))
    for count, remove in [(6, 5), (6, 0), (9, 8), (3, 1), (12, 11), (window + 10, window + 9)]:
        caches.feed(count)
        caches.both(lambda cache, remove=remove: cache.crop(-remove))
        caches.text = caches.text[:, : caches.text.shape[1] - remove]
    caches.feed(1)
    caches.both(lambda cache: cache.crop(0))  # stock 5.17 wants a crop after every pass
    caches.feed(1)
