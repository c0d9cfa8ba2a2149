"""Calls that need more than the device holds, on a CPU that is taken for a GPU: part of their blocks is on the host."""

import contextlib
import copy
import gc
import random
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from graphed import Both
from host import as_gpu, hosted, side
from pair import Pair, distinct_pieces, evict, piece
from prompts import batch
from spilled import CALLS, Notes, check, continued, generated, narrow, num_rows, on_host, watch
from test_quantized import RoundingCache
from test_sharing import BLOCK_BYTES, TOKEN_BYTES
from windows import window_pair

from hf_paged import PagedMemoryError, host, overflow
from hf_paged.backends import staged


@pytest.fixture(autouse=True)
def _gpu(monkeypatch):
    as_gpu(monkeypatch)


@pytest.mark.parametrize("call", CALLS)
def test_a_call_of_three_times_the_device_answers_as_stock(call, monkeypatch):
    rows, how, blocks = CALLS[call]
    read = watch(monkeypatch)
    pair = hosted(blocks=blocks)
    pair.ask(rows, **how)
    check(pair)
    assert max(read, default=0) > blocks, "more lies on the host than on the device"
    stats = pair.paged.stats()
    assert stats.offloaded_bytes >= max(read) * BLOCK_BYTES
    assert on_host(pair) == 0
    pair.ask(rows, **how)
    check(pair)


@pytest.mark.parametrize("call", CALLS)
def test_latents_on_the_host_are_met_there(call):
    rows, how, blocks = CALLS[call]
    pair = narrow(partial(Pair, "deepseek_v3"), num_rows(call) + 1, blocks)
    pair.ask(rows, **how)
    check(pair)
    assert pair.paged.stats().fetched_bytes > 0


@pytest.mark.parametrize("share", [1 / 8, 1])
def test_parts_of_several_blocks(share, monkeypatch):
    """Areas that hold some blocks of a layer, and areas that hold all of them."""
    monkeypatch.setattr(overflow, "STAGE_SHARE", share)
    pair = hosted(blocks=9)
    pair.ask(CALLS["batch"][0], max_new_tokens=20)
    assert pair.paged.stats().fetched_bytes > 0


def test_long_runs_are_cut(monkeypatch):
    monkeypatch.setattr(staged, "MAX_PART_TOKENS", 8)
    monkeypatch.setattr(staged, "MIN_OWN_TOKENS", 3)
    for call in ("batch", "samples"):
        rows, how, blocks = CALLS[call]
        pair = hosted(blocks=3 * blocks)
        pair.ask(rows, **(how | {"max_new_tokens": 70}))
        assert pair.paged.stats().fetched_bytes > 0
        check(pair)


def test_copies_that_are_made_at_once(monkeypatch):
    as_gpu(monkeypatch, lambda: None)
    pair = hosted(blocks=9)
    pair.ask(CALLS["batch"][0], max_new_tokens=20)
    assert pair.paged.stats().fetched_bytes > 0
    check(pair)


@pytest.mark.parametrize("backend", ["reference", "cpu without a native kernel"])
def test_other_backends(backend, monkeypatch):
    if backend != "reference":
        monkeypatch.setattr("hf_paged.backends.cpu.kernel_of_store", lambda store: None)
    pair = hosted(blocks=9, attention_backend=backend.split()[0])
    pair.ask(CALLS["samples"][0], **CALLS["samples"][1])
    assert pair.paged.stats().fetched_bytes > 0
    check(pair)


def test_windows_stay_on_the_device_beside_a_layer_that_keeps_all(monkeypatch):
    def windowed(*args, **kwargs):
        return window_pair(*args, window=20, **kwargs)

    read = watch(monkeypatch)
    pair = hosted("gemma3", 16, make=windowed)
    pair.ask([piece(200, 1), piece(150, 2)], max_new_tokens=20)
    check(pair)
    assert max(read) > 16
    with pytest.raises(PagedMemoryError):
        hosted("mistral_sliding", 3, make=windowed).ask([piece(200, 1)])


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantized_blocks(kind, monkeypatch):
    class Rounded(Pair):
        """A pair whose stock side keeps rounded KV."""

        def ask(self, rows, **kwargs):
            def cache(model):
                return RoundingCache(model.config, kind) if model is self.stock else None

            return super().ask(rows, past_key_values=cache, **kwargs)

    read = watch(monkeypatch)
    pair = hosted(blocks=3, make=Rounded, kv_cache_dtype=kind, verify=False)
    pair.ask([piece(200, 1)], max_new_tokens=20)
    check(pair)
    assert max(read) > 0


# What goes on with the cache


@pytest.mark.parametrize("keep", [None, 43, 64, 75, 83])
def test_a_cache_that_comes_back_goes_on(keep):
    """Also where it was cut within a block that lies on the host, which is written to next."""
    pair = hosted(blocks=5)
    first = [generated(model, piece(101, 1)) for model in (pair.stock, pair.model)]
    assert pair.paged.stats().blocks_host >= on_host(pair) > 8
    then = [continued(*each, keep) for each in zip(first, (pair.stock, pair.model), strict=True)]
    assert torch.equal(then[0].sequences, then[1].sequences)
    del first, then
    check(pair)
    assert on_host(pair) == 0


def test_a_copy_of_a_cache_goes_its_own_way():
    pair = hosted(blocks=14)
    others = generated(pair.model, piece(40, 2))
    outputs = [generated(model, piece(101, 1)) for model in (pair.stock, pair.model)]
    twins = [copy.deepcopy(each) for each in outputs]
    del others  # what the two of them hold in common stays where it is
    gc.collect()
    for which, keep in ((outputs, 41), (twins, 70), (outputs, None)):
        assert on_host(pair) > 0
        then = [continued(each, model, keep) for each, model in zip(which, (pair.stock, pair.model), strict=True)]
        assert torch.equal(then[0].sequences, then[1].sequences)
        pair.pool.check_integrity()
        which[:] = then
    del outputs, twins, which, then
    check(pair)


def test_whoever_reads_dense_keys_gets_them_from_the_device():
    pair = hosted(blocks=16)
    held = [generated(model, piece(101, 1)).past_key_values for model in (pair.stock, pair.model)]
    assert on_host(pair) == 0
    other = generated(pair.model, piece(60, 2)).past_key_values
    assert on_host(pair) > 0
    with pytest.raises(PagedMemoryError, match=r"max_memory\[0\] or max_memory\['cpu'\]"):
        _ = other.layers[0].keys
    held.append(other)
    other = None
    stock = generated(pair.stock, piece(60, 2)).past_key_values
    held[1] = None
    gc.collect()
    for mine, theirs in zip(held[2].layers, stock.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys)
        torch.testing.assert_close(mine.values, theirs.values)
    assert on_host(pair) == 0, "all of them came back"
    held.clear()
    check(pair)


def test_a_padded_pass_reads_the_host():
    pair, rows = hosted(blocks=16), batch([piece(40, 1), piece(40, 2)])
    others = generated(pair.model, piece(90, 9))
    held = [generated(model, rows) for model in (pair.stock, pair.model)]
    before = on_host(pair)
    assert before > 0
    logits = []
    for model, outputs in zip((pair.stock, pair.model), held, strict=True):
        more = torch.tensor([[7, 8, 9], [10, 11, 12]])
        with torch.no_grad():  # logits of all columns: these passes are padded
            logits.append(
                model(torch.cat([outputs.sequences[:, -1:], more], 1), past_key_values=outputs.past_key_values)
            )
    assert on_host(pair) >= before
    torch.testing.assert_close(logits[0].logits, logits[1].logits)
    del held, logits, outputs, others
    check(pair, ["logits of all tokens"])


def test_guesses_that_are_taken_back():
    pair = hosted(blocks=7)
    row = piece(30, 1) * 3
    pair.ask([row], prompt_lookup_num_tokens=4, max_new_tokens=24, eos_token_id=1)
    assert pair.paged.stats().fetched_bytes > 0
    check(pair)


def test_blocks_come_back_when_other_rows_have_ended():
    pair = hosted(blocks=17)
    rows = [piece(61, 1), piece(61, 2), piece(61, 3)]
    free = pair.ask(rows, max_new_tokens=30)[:, 61:]
    notes = Notes(lambda: on_host(pair))
    pair.ask(
        rows,
        max_new_tokens=30,
        eos_token_id=[int(free[row, 4]) for row in (0, 1)],
        stopping_criteria=lambda model: [notes] if model is pair.model else [],
    )
    assert notes.said[0] > 0 == notes.said[-1]
    check(pair)


def test_steps_that_read_the_host_are_no_graphs(quick):
    """What was learned of other steps stays, and they are graphs again."""
    both = Both(max_memory={0: 9 * 16 * TOKEN_BYTES, "cpu": "1MiB"})
    assert both.ask(new=9) > 5
    assert both.ask([piece(200, 1)], new=9) == 0
    assert both.reasons == {"no CUDA graphs: blocks on the host": 1}
    assert both.ask(new=9) == 8


# Beside what the host keeps


def test_cached_blocks_make_way_on_the_host_and_may_come_again(monkeypatch):
    monkeypatch.setattr(host, "SLAB_BYTES", 4 * BLOCK_BYTES)
    monkeypatch.setattr(host, "MIN_SLAB_RECORDS", 1)
    pair, rows = hosted(blocks=9, host=24 * BLOCK_BYTES, disk="1MiB"), distinct_pieces(3, 61)
    for row in rows:
        pair.ask([row])
    evict(pair)
    check(pair)
    assert (pair.paged.stats().blocks_host, pair.paged.stats().blocks_disk) == (24, 3)
    said = Notes(lambda: (on_host(pair), pair.paged.stats().blocks_host))
    pair.ask(
        [piece(150, 9)],
        max_new_tokens=20,
        stopping_criteria=lambda model: [said] if model is pair.model else [],
    )
    check(pair)
    assert max(said.said)[0] > 9
    assert max(total for _, total in said.said) <= 24, "within the budget"
    assert pair.paged.stats().blocks_disk > 12, "what had to go"
    for row in rows:
        pair.ask([row])
        assert pair.reused == 56
        check(pair)
    evict(pair)
    assert pair.paged.stats().blocks_host == 24, "all of it is the tier's again"


def test_a_prompt_that_did_not_fit_is_found_again():
    pair, row = hosted(blocks=6), piece(101, 1)
    pair.ask([row])
    check(pair)
    assert pair.paged.stats().blocks_host >= 8, "copies of what was moved"
    for length, reused in ((41, 40), (25, 24)):
        pair.ask([row[:length]])
        check(pair)
        assert pair.reused == reused, "as much as the device holds"


@pytest.mark.parametrize("how", ["clear", "release"])
def test_what_runs_keeps_its_blocks_when_all_else_is_given_up(how):
    pair = hosted(blocks=6)
    pair.ask([piece(40, 2)])
    evict(pair)
    aside = side(pair)

    def give_up():
        getattr(pair.paged, how)()
        if how == "release":
            assert pair.paged._pool.overflow.staging_bytes == 0
        return on_host(pair)

    said = Notes(give_up)
    pair.ask([piece(101, 1)], max_new_tokens=9, stopping_criteria=lambda model: [said] if model is pair.model else [])
    assert min(said.said) > 6
    check(pair)
    pair.paged.release()
    gc.collect()
    assert len(aside.pinned_now) == 0
    pair.ask([piece(101, 1)])
    check(pair)


def test_threads_get_stocks_answers_or_are_told_that_there_is_no_room():
    pair, rows = hosted(blocks=16), distinct_pieces(4, 61)
    expected = [pair.stock.generate(**batch([row]), do_sample=False, max_new_tokens=20) for row in rows]
    pair.ask([piece(150, 9)])
    wrong, right = [], []

    def work(seed):
        for at in random.Random(seed).choices(range(4), k=5):
            with contextlib.suppress(PagedMemoryError):  # where others fill the device
                answer = pair.model.generate(**batch([rows[at]]), do_sample=False, max_new_tokens=20)
                (right if torch.equal(answer, expected[at]) else wrong).append(at)

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(work, range(3)))  # raises what else they have raised
    assert not wrong
    assert right
    assert pair.paged.stats().offloaded_bytes > 0
    gc.collect()
    assert on_host(pair) == 0
    check(pair)
