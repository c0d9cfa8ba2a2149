"""CUDA graphs without a GPU: a driver that records what a pass does to tensors, and does exactly that again.

A replay runs no Python of the model or of ours. What was computed from Python's numbers during the capture is a
constant of the tape, as in a graph, and so shows up in the tokens where it should have been read from a buffer.
"""

import contextlib
import functools
import threading

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
# What waits for the device, and so cannot be captured.
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten._unique2.default}
EMPTY = {aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default, aten.empty_strided.default}


class Tape(TorchDispatchMode):
    """Operations and kernel launches, in order, with the very tensors that they read and return."""

    current: "Tape | None" = None

    def __init__(self):
        super().__init__()
        self.entries = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in WAITS:
            raise RuntimeError("operation not permitted when stream is capturing")
        return self.add(func, args, kwargs or {})

    def add(self, function, args, kwargs):
        result = function(*args, **kwargs)
        args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs))  # memory, not who holds it
        self.entries.append((function, args, kwargs, result))
        return result

    def __enter__(self):
        Tape.current = self
        return super().__enter__()

    def __exit__(self, *error):
        Tape.current = None
        return super().__exit__(*error)

    def play(self):
        for function, args, kwargs, recorded in self.entries:
            fresh = function(*args, **kwargs)
            for old, new in zip(tree_leaves(recorded), tree_leaves(fresh), strict=True):
                if (
                    isinstance(old, torch.Tensor)
                    and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr()
                ):
                    if function in EMPTY and new.is_floating_point():
                        new.fill_(torch.nan)  # memory that others have used since
                    old.copy_(new)


def launch(function):
    """The function as a kernel: one entry of the tape, whatever it does inside."""

    @functools.wraps(function)
    def launched(*args, **kwargs):
        tape = Tape.current
        with _disable_current_modes():
            return function(*args, **kwargs) if tape is None else tape.add(function, args, kwargs)

    return launched


class Launches:
    """A Triton kernel `kernel[grid](...)` as entries of the tape."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return launch(self.kernel[grid])


class TapeDriver:
    """A `GraphDriver` on the CPU.

    Attributes:
        captures, replays: number of these.
    """

    def __init__(self):
        self.captures = self.replays = 0
        self._in_turn = threading.Lock()

    @contextlib.contextmanager
    def turn(self):
        assert self._in_turn.acquire(blocking=False), "two steps at once"
        try:
            yield
        finally:
            self._in_turn.release()

    def send(self, numbers, target):
        assert self._in_turn.locked()
        target[: len(numbers)].copy_(torch.frombuffer(numbers, dtype=torch.int32))

    def warm_up(self, forward):
        return forward()

    def capture(self, forward):
        tape = Tape()
        with tape:
            captured = forward()
        self.captures += 1
        for _, _, _, recorded in tape.entries:  # a capture computes nothing
            for each in tree_leaves(recorded):
                if isinstance(each, torch.Tensor) and each is captured.logits:
                    each.fill_(torch.nan)

        def replay():
            self.replays += 1
            tape.play()

        return captured, replay

    def release(self):
        pass


def attend_plainly(query, keys, values, work, scale, softcap=None, sinks=None, records=None):
    """As `hf_paged_kernels.attend.attend`, item by item in plain torch: what the interpreter takes seconds for."""
    from hf_paged_kernels.tuning import PAGE_TOKENS

    if records is not None:
        keys, values = records.decode_keys(keys, query.dtype), records.decode_values(values, query.dtype)
    group = query.shape[1] // keys.shape[0]
    rows, pages = work.rows.tolist(), work.pages
    scores = [[] for _ in rows]
    seen = [[] for _ in rows]
    for start, count, table, lo, hi, first, _, _ in (item for each in work.launches for item in each.items.tolist()):
        index = torch.arange(lo, hi)
        slots = pages[table + index // PAGE_TOKENS].long() * PAGE_TOKENS + index % PAGE_TOKENS
        for i in range(count):
            visible = index <= first + i
            if work.window is not None:
                visible &= index > first + i - work.window
            mine = slots[visible]
            k = keys[:, mine].repeat_interleave(group, 0)
            score = (k @ query[rows[start + i]].unsqueeze(-1)).squeeze(-1) * scale
            scores[start + i].append(score if softcap is None else softcap * torch.tanh(score / softcap))
            seen[start + i].append(mine)
    out = torch.zeros(len(rows), query.shape[1], values.shape[2], dtype=query.dtype)
    for i, row in enumerate(rows):
        if not seen[i]:
            continue
        logits = torch.cat(scores[i], 1)
        count = logits.shape[1]
        if sinks is not None:
            logits = torch.cat([logits, sinks.unsqueeze(1)], 1)
        weights = logits.softmax(1)[:, :count].unsqueeze(1)
        out[row] = (weights @ values[:, torch.cat(seen[i])].repeat_interleave(group, 0)).squeeze(1)
    return out
