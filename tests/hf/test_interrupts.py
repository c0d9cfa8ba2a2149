"""Ctrl-C between any two lines of ours: nothing stays in use, and the next answers are right."""

import gc
import linecache
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from pair import Pair, distinct_pieces
from prompts import batch, tokens
from test_kept_states import tried
from test_sharing import BLOCK_BYTES

import hf_paged
from hf_paged.stats import Counters

OURS = str(Path(hf_paged.__file__).parent)
BOOKS = tuple(f"{OURS}/{name}" for name in ("core/", "pool.py", "sequences.py", "kept_states.py", "resume.py"))
PLACES = 60  # in each kind of call
STARTS = distinct_pieces(3, 21)
ROWS = [STARTS[0] + tokens(3, seed=1), STARTS[0][:18], STARTS[1]]
CALLS = {
    "rows": {"max_new_tokens": 3, "eos_token_id": list(range(3, 40))},
    "beams": {"max_new_tokens": 3, "num_beams": 2},
    "returned cache": {"max_new_tokens": 2, "return_dict_in_generate": True},
}


class Interrupts:
    """Raises `KeyboardInterrupt` at the n-th line that a call passes through of what keeps the books; `None`: counts.

    Not where a `with` ends, where no signal's handler can come before the lock is let go.
    """

    def __init__(self, at=None):
        self.at, self.passed = at, 0

    def __enter__(self):
        sys.settrace(self._begin)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    def _begin(self, frame, event, argument):
        return self._trace if frame.f_code.co_filename.startswith(BOOKS) else None

    def _trace(self, frame, event, argument):
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and not line.lstrip().startswith("with "):
            self.passed += 1
            if self.passed == self.at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._trace


def prepared(name: str) -> Pair:
    """A pair that knows the model, with cached prefixes, and states of a hybrid, and little memory."""
    if "recurrent" in FAMILIES[name].tags:
        known = tried(name)
        state_bytes, block_bytes = known.paged._pool.kept_states.block_bytes, known.pool.pools[0].block_bytes
        pair = tried(name, max_memory={"cpu": 30 * block_bytes + 4 * state_bytes})
    else:
        pair = Pair(name, max_memory={"cpu": 27 * BLOCK_BYTES})
    for start in STARTS:
        pair.ask([start])
    return pair


def call(model, kind: str) -> torch.Tensor:
    output = model.generate(**batch(ROWS), do_sample=False, **CALLS[kind])
    return output if isinstance(output, torch.Tensor) else output.sequences


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("name", ["llama", "mistral_sliding", "lfm2"])
# The finalizer of a returned cache may be what is interrupted, and the interpreter says so.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_at_any_line_leaves_nothing_half_done(name, kind):
    pair = prepared(name)
    expected = call(pair.stock, kind)
    call(pair.model, kind)
    with Interrupts() as lines:
        call(pair.model, kind)
    assert lines.passed > 10 * PLACES
    interrupted = 0
    for at in range(1, lines.passed, lines.passed // PLACES):
        try:
            with Interrupts(at):
                assert torch.equal(call(pair.model, kind), expected)
        except KeyboardInterrupt:
            interrupted += 1
        if pair.paged.stats().blocks_in_use:
            gc.collect()
        pair.ask([ROWS[at % len(ROWS)]])  # in use is nothing after it, and every block is in one state
        assert not pair.pool._tables, "sequences were left behind"
        assert not +pair.pool._pinned, "blocks were left pinned"
    assert interrupted > PLACES * 3 / 4


def test_counts_that_go_together_are_added_together():
    counters = Counters()
    counters.add(prompt_tokens=2, computed_tokens=2)
    with pytest.raises(TypeError):
        counters.add(prompt_tokens=3, computed_tokens="interrupted")
    assert counters.snapshot().prompt_tokens == 2
