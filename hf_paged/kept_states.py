"""States that sequences were in behind some of their tokens, for later calls that begin with the same tokens.

K and V of a prompt can be found again at every token; a convolutional or recurrent state is there once, behind the last
one. So copies are kept where later prompts are likely to go on: behind a prompt, behind its answer, and where two
prompts have parted (as Marconi does, Pan et al. 2024, arXiv 2411.19379). They count as cached memory and go like
blocks, where it is needed: the least recently used ones first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from typing import Any

import torch

from hf_paged.core.manager import BlockManager
from hf_paged.core.prefix import KEY_BYTES, TOKEN_BYTES, are_plain, pack_tokens
from hf_paged.core.table import BlockTable
from hf_paged.core.whole import whole
from hf_paged.errors import is_refusal

State = list[dict[str, Any]]  # of each layer that has one, by attribute


@dataclass(frozen=True, slots=True)
class KeptState:
    """The state of one row.

    Attributes:
        key: stands for `root` and the tokens.
        root: where the row's tokens are found in the prefix index.
        num_tokens: the row's tokens up to here.
        state: what its layers kept, tensors `[1, ...]`.
        stamp: when it was last used.
    """

    key: bytes
    root: bytes
    num_tokens: int
    state: State
    stamp: int


class KeptStates:
    """The states that one pool keeps; they draw on its budget.

    Attributes:
        block_bytes: of each of them, 0 before the first.
    """

    def __init__(self, manager: BlockManager):
        self._manager, self._lock, self._budget = manager, manager.lock, manager.budget
        self._kept: OrderedDict[bytes, KeptState] = OrderedDict()  # the least recently used first
        self.block_bytes = 0
        self._budget.admit(self)

    @property
    def cached(self) -> int:
        """How many there are."""
        return len(self._kept)

    def keep(self, root: bytes, tokens: Sequence[int], copy: Callable[[], State]) -> None:
        """Keep what `copy` returns as the state behind `tokens`, if there is room for it beside what is in use."""
        key = blake2b(root + pack_tokens(tokens), digest_size=KEY_BYTES).digest()
        if not tokens or self._use(key) is not None:
            return
        try:
            state = copy()
        except Exception as error:
            if is_refusal(error):  # nothing is lost but time
                return
            raise
        num_bytes = sum(tensor.nbytes for tensor in tensors_of(state))
        with self._lock:
            if self.block_bytes not in (0, num_bytes) or not _has_room(self._manager, num_bytes):
                return
            self.block_bytes = num_bytes
            self._kept[key] = KeptState(key, root, len(tokens), state, self._budget.stamp())

    def keep_rows(self, rows: Iterable[tuple[BlockTable, int]], layers: Sequence[dict[str, Any]]) -> None:
        """Keep the states that `layers` hold of some rows, given with their places, whose tokens say it all."""
        for table, place in rows:
            if table.root is not None:
                self.keep(table.root, table.tokens, partial(state_of_row, layers, place))

    def longest(self, root: bytes, tokens: Sequence[int], limit: int) -> KeptState | None:
        """The state behind the most of the first `limit` tokens."""
        if not are_plain(tokens):
            return None
        packed, digest = pack_tokens(tokens[:limit]), blake2b(root, digest_size=KEY_BYTES)
        with self._lock:
            lengths = {each.num_tokens for each in self._kept.values() if each.root == root}
            found, begin = None, 0
            for length in sorted(each for each in lengths if each <= len(packed) // TOKEN_BYTES):
                digest.update(packed[begin : (begin := length * TOKEN_BYTES)])
                key = digest.digest()
                found = key if key in self._kept else found
            return None if found is None else self._use(found)

    def forget(self, kept: KeptState) -> None:
        """Give up a state whose K and V are gone; harmless where it was given up already."""
        with self._lock:
            self._kept.pop(kept.key, None)

    def oldest_first(self) -> Iterable[tuple[bytes, int]]:
        """What each is known by, and when it was last used."""
        return ((key, each.stamp) for key, each in self._kept.items())

    def give_up(self, key: bytes) -> None:
        """Forget one, for its memory."""
        del self._kept[key]

    def clear(self) -> None:
        """Forget all of them."""
        with self._lock:
            self._kept.clear()

    def _use(self, key: bytes) -> KeptState | None:
        with self._lock:
            if key not in self._kept:
                return None
            self._kept[key] = used = replace(self._kept.pop(key), stamp=self._budget.stamp())
            return used


@whole
def _has_room(manager: BlockManager, num_bytes: int) -> bool:
    """Whether there is room for so many bytes more, for which cached blocks may be given up."""
    return manager.budget.has_room(num_bytes)


def lone_rows(tables: Sequence[BlockTable]) -> set[int]:
    """Rows whose prompt no other row has: nobody goes on with samples and beams."""
    prompts = [pack_tokens(table.tokens[: table.prompt_tokens]) for table in tables]
    return {row for row, prompt in enumerate(prompts) if prompts.count(prompt) == 1}


def tensors_of(state: State) -> Iterator[torch.Tensor]:
    """The tensors of some layers' states."""
    for layer in state:
        for value in layer.values():
            each = value.values() if isinstance(value, dict) else [value]
            yield from (tensor for tensor in each if isinstance(tensor, torch.Tensor))


def state_of_row(layers: Iterable[dict[str, Any]], row: int) -> State:
    """A copy of what `layers` hold of one row, `[1, ...]`."""

    def part(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: part(each) for name, each in value.items()}
        return value[row : row + 1].clone() if isinstance(value, torch.Tensor) else value

    return [{name: part(value) for name, value in layer.items()} for layer in layers]


def joined(states: Sequence[State]) -> State:
    """The states of several rows as those of a batch; copies."""

    def join(values: Sequence[Any]) -> Any:
        first = values[0]
        if isinstance(first, dict):
            return {name: join([each[name] for each in values]) for name in first}
        return torch.cat(values) if isinstance(first, torch.Tensor) else first

    return [{name: join([each[name] for each in layers]) for name in layers[0]} for layers in zip(*states, strict=True)]
