"""What the process's memory comes to at the most, and a system that refuses some in the midst of a call."""

import re
import sys
from itertools import count
from pathlib import Path

import pytest
import torch
from pair import Pair, piece
from prompts import batch, tokens
from resident import MIB, NOISE, TOKEN_BYTES, patched, resident, resident_now
from scripts import run_script
from transformers import StoppingCriteria

from hf_paged import probe, trial
from hf_paged.errors import RefusedMemoryError

PEAK = re.compile(r"VmHWM:\s+(\d+) kB")


def peak() -> int:
    """The most memory, in bytes, that the process has had since `forget_peak`."""
    return 1024 * int(PEAK.search(Path("/proc/self/status").read_text())[1])


def forget_peak() -> None:
    """Only Linux can, where `/proc` may be written to; some sandboxes do not let anybody."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        pytest.skip(f"this system cannot forget the peak of a process's memory: {error}")


class EndsWatched(StoppingCriteria):
    """Row `i` ends after `steps[i]` new tokens. Notes the peak of every step, and the memory of blocks behind it."""

    eos_token_id = torch.tensor([2])  # stock pads rows that have ended

    def __init__(self, model, steps: list[int]):
        self.model, self.steps, self.seen = model, torch.tensor(steps), []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append((peak(), self.model.paged.stats().bytes_reserved))
        resident_now()  # the heap keeps nothing for itself
        forget_peak()
        return len(self.seen) >= self.steps


def test_growing_and_shrinking_copy_nothing_and_take_no_memory_twice(no_poison):
    """At no moment of a call is there more than its blocks: those that live stay where they are."""
    model = patched(prefix_caching=False)
    memory = [each.data_ptr() for store in model.paged._pool.stores for each in (store.keys, store.values)]
    before, watch = resident(), EndsWatched(model, [90, 180, 270])
    rows = [tokens(100, seed=seed) for seed in range(3)]
    model.generate(**batch(rows), do_sample=False, max_new_tokens=300, stopping_criteria=[watch])
    decoding = watch.seen[1:]  # a prompt's activations are no blocks
    reserved = [held for _, held in decoding]
    assert len(decoding) == 269
    assert max(reserved) >= 2 * 270 * TOKEN_BYTES > min(reserved) + 5 * MIB, "it has grown and shrunk"
    for step, (most, held) in enumerate(decoding):
        just_before = reserved[max(0, step - 1)]
        assert most - before - max(held, just_before) <= 2 * NOISE, f"step {step}"
    assert [each.data_ptr() for store in model.paged._pool.stores for each in (store.keys, store.values)] == memory


# `RLIMIT_AS` is what the test is made with: macOS takes it and does not keep to it, Windows has no such thing.
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the address space of a process has no limit")
@pytest.mark.parametrize("below", ["nothing", "disk"])
def test_memory_that_the_system_refuses_half_way_through_a_batch(below, tmp_path):
    run_script(Path(__file__).with_name("refused_memory.py"), below, out=tmp_path / "said")


TRIALS = {
    "a packed pass": ("llama", probe, "run_packed", 0),
    "positions": ("llama", probe, "run_packed", 1),
    "views": ("bloom", probe, "run_padded", 0),
    "a decode step": ("t5", trial, "run_decode", 0),
}
REFUSALS = [
    MemoryError("no more"),
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    RefusedMemoryError("no address space"),
]


@pytest.mark.parametrize(
    ("what", "error"),
    [*((what, REFUSALS[0]) for what in TRIALS), *(("a packed pass", error) for error in REFUSALS[1:])],
)
def test_memory_refused_while_a_model_is_tried_says_nothing_about_it(what, error, monkeypatch):
    """The call ends with that error, and the next one tries again."""
    name, module, function, number = TRIALS[what]
    usual, pair, row = Pair(name), Pair(name), piece(20, 1)
    calls, real = count(), getattr(module, function)

    def refused(*args, **kwargs):
        if next(calls) == number:
            raise error
        return real(*args, **kwargs)

    with monkeypatch.context() as refusing:
        refusing.setattr(module, function, refused)
        with pytest.raises(type(error), match=str(error)):
            pair.model.generate(**batch([row]), do_sample=False, max_new_tokens=12)
    for each in (usual, pair):
        each.ask([row], max_new_tokens=12)
    assert next(calls) > number
    assert [*pair.paged._capabilities._found.values()] == [*usual.paged._capabilities._found.values()]
    assert [*pair.paged._stepwise._trials.values()] == [*usual.paged._stepwise._trials.values()]
