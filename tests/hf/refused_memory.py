"""A process to which the system refuses memory from some moment of a call on: `refused_memory.py nothing|disk`.

Whatever comes of such a call, the answer is stock's or the error says that memory was refused, no block stays in use,
and the next call answers as stock, as fast as ever. In a process of its own, whose limit and heap these are.
"""

import ctypes
import gc
import resource
import sys
from collections import Counter
from contextlib import contextmanager
from itertools import count
from unittest import mock

import psutil
import torch
from disk import Always, check
from pair import Pair, distinct_pieces
from prompts import batch
from resident import TOKEN_BYTES, wide_model
from transformers.models.llama.modeling_llama import LlamaMLP

from hf_paged import tiers
from hf_paged.disk import DiskLevel
from hf_paged.errors import is_refusal

M_MMAP_THRESHOLD, LARGE_BYTES = -3, 16384
# A method, and the call of it (from 0) from which on there is no more memory: while the model is tried, in the midst of
# a prompt and of decoding; and those during which there is none, on the way to the disk and back.
PLACES = [(LlamaMLP, "forward", number) for number in (2, 0, 2, 6, 13)]
DISK_PLACES = [(DiskLevel, "put", 0), (DiskLevel, "load", 0)]


def limit(num_bytes: int) -> None:
    """Of the process's address space."""
    resource.setrlimit(resource.RLIMIT_AS, (num_bytes, resource.RLIM_INFINITY))


@contextmanager
def refusing(owner: type, name: str, number: int):
    """The process gets no more memory than it has from a call of a method on; gives the count of calls."""
    function, calls = getattr(owner, name), count()

    def limited(self, *args, **kwargs):
        if next(calls) == number:
            gc.collect()
            limit(psutil.Process().memory_info().vms)
        try:
            return function(self, *args, **kwargs)
        finally:
            if owner is DiskLevel:
                limit(resource.RLIM_INFINITY)

    try:
        with mock.patch.object(owner, name, limited):
            yield calls
    finally:
        limit(resource.RLIM_INFINITY)


def ask_refused(pair: Pair, rows: list[list[int]], owner: type, name: str, number: int) -> str:
    """One call that meets the limit; what has come of it."""
    expected = pair.stock.generate(**batch(rows), do_sample=False, max_new_tokens=6)
    pair.paged.reset_stats()
    try:
        with refusing(owner, name, number) as calls:
            answer = pair.model.generate(**batch(rows), do_sample=False, max_new_tokens=6)
    except Exception as error:
        if not is_refusal(error):
            raise
        return "refused"
    assert torch.equal(answer, expected)
    return "answered" if next(calls) > number else "not met"


def main(below: str) -> None:
    """Every place in turn, and then the same with memory."""
    torch.set_num_threads(1)
    # Large tensors get memory of the system's own each time, and none that was freed before.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
    tiers.FetchPolicy = Always
    rows, seen = distinct_pieces(6, 75), Counter()
    memory = {"cpu": 3 * 96 * TOKEN_BYTES + 16 * TOKEN_BYTES}  # three rows, and the null block
    pair = Pair.of(wide_model(), max_memory=memory | ({"disk": "1GiB"} if below == "disk" else {}))
    for place in PLACES if below == "nothing" else DISK_PLACES:
        for asked in (rows[:3], rows[3:], rows[:3])[: 2 if below == "nothing" else 3]:  # new to it, and on disk by then
            said = ask_refused(pair, asked, *place)
            print(place[0].__name__, *place[1:], said, pair.paged.stats().fallbacks)
            seen[place, said] += 1
            pair.check()
            pair.ask(asked)
            assert not pair.paged.stats().fallbacks
        if below == "disk":
            check(pair)
        pair.paged.release()
        assert seen[place, "refused" if below == "nothing" else "answered"] > 0, place


if __name__ == "__main__":
    main(sys.argv[1])
