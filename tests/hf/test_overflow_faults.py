"""Calls too large for device and host together, transfers that fail, and random calls in little memory."""

import gc

import pytest
import torch
from host import LateMark, LateSide, as_gpu, hosted
from pair import NEW, piece
from prompts import batch
from soak import Soak
from spilled import check, continued, failing_once, generated, on_host, refused, watch
from test_sharing import BLOCK_BYTES

from hf_paged import PagedMemoryError
from hf_paged.layout import RecordLayout


@pytest.fixture(autouse=True)
def _gpu(monkeypatch):
    as_gpu(monkeypatch)


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"max_new_tokens": 90}, {"num_beams": 3}, {"output_attentions": True, "return_dict_in_generate": True}],
)
def test_a_call_too_large_for_both_is_refused_and_nothing_else_is_lost(kwargs):
    """The prompt does, at once, also of a stock-shaped pass; or what is generated does, in the midst."""
    pair = hosted(blocks=6, host=6 * BLOCK_BYTES)
    moved_bytes = refused(pair, kwargs)
    assert (moved_bytes > 0) == ("max_new_tokens" in kwargs), "else it is known beforehand"


def test_memory_that_the_host_refuses():
    def refuse(self, num_bytes):
        raise MemoryError("no more")

    pair = hosted(blocks=6)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(LateSide, "pinned", refuse)
        with pytest.raises(PagedMemoryError):
            pair.model.generate(**batch([piece(101, 1)]), max_new_tokens=NEW)
        check(pair, ["host tier: no more"])
    pair.ask([piece(101, 1)])


PLACES = {
    "gathering": (RecordLayout, "read_blocks"),
    "copying": (LateSide, "run"),
    "reading": (RecordLayout, "tokens"),
    "scattering": (RecordLayout, "write_blocks"),
    "pinning": (LateSide, "pinned"),
    "waiting": (LateMark, "hold_current"),
}


@pytest.mark.parametrize(("error", "number"), [(RuntimeError, 1), (KeyboardInterrupt, 0)])
@pytest.mark.parametrize("place", PLACES)
def test_a_transfer_that_fails_or_is_interrupted(place, error, number, monkeypatch):
    """The call ends with an error, or answers as stock; no block is leaked or written to behind its next owner."""
    owner, name = PLACES[place]
    if owner is RecordLayout:
        as_gpu(monkeypatch, lambda: None)  # on a stream, too, it is the calling thread that meets these errors
    pair, row = hosted(blocks=7), piece(101, 1)
    expected = continued(generated(pair.stock, row), pair.stock, 19).sequences
    pair.ask([row])
    pair.paged.clear()
    answer = expected
    with failing_once(monkeypatch, owner, name, error, number) as counts:
        answer = continued(generated(pair.model, row), pair.model, 19).sequences
    assert torch.equal(answer, expected)
    assert next(counts) > number or place == "pinning"
    gc.collect()
    assert on_host(pair) == 0
    check(pair, ["a transfer"])
    pair.ask([row])
    check(pair)


class TightSoak(Soak):
    """Rows that need a block each may find none: they are told, and nothing is lost."""

    def _call(self, pair, said):
        try:
            super()._call(pair, said)
        except PagedMemoryError:
            self.counts["refused"] += 1
        gc.collect()
        check(pair, ["damaged"])


def test_a_soak_of_random_calls(monkeypatch):
    read = watch(monkeypatch)
    sizes = {"llama": 7, "gemma3": 16}
    soak = TightSoak(
        14, [hosted(name, blocks, host="24KiB", disk="300KiB", policy=None) for name, blocks in sizes.items()]
    )
    soak.run(16)
    assert len(read) > 10
    assert min(soak.counts[name] for name in ("beams", "tokens reused", "blocks evicted")) > 0
    assert soak.counts["refused"] < 4
