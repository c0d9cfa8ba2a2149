"""Which prefixes a call may take from earlier ones: those of the model as it is now, and of the call's salt."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedModel

from hf_paged.core.prefix import root_key
from hf_paged.identity import ModelIdentity, Sampling
from hf_paged.pool import KVPool
from hf_paged.stats import Counters


@dataclass(frozen=True, eq=False)
class PrefixRoot:
    """Where the prefix index begins for one state of a model and one salt.

    Attributes:
        key: parent of a sequence's first block.
        digest: of the model's state.
        salt: of the call.
        on_change: called where the model is in that state no more.
    """

    key: bytes
    digest: bytes
    salt: str | None
    identity: ModelIdentity
    on_change: Callable[[], None]

    def holds(self) -> bool:
        """Whether the model is still in that state, as far as a look without sampling can tell."""
        return self.identity.holds(self.digest)

    def keeps(self) -> bool:
        """`holds`, for a call that has begun in that state: counted where not."""
        holds = self.holds()
        if not holds:
            self.on_change()
        return holds


class Prefixes:
    """The roots of one patched model.

    Args:
        model: held weakly.
        enabled: the setting `prefix_caching`.
        counters: told where a model's prefixes cannot be reused.
    """

    def __init__(self, model: PreTrainedModel, enabled: bool, counters: Counters):
        self._identity = ModelIdentity(model)
        self._enabled = enabled
        self._counters = counters
        self._epoch: bytes | None = None
        self._times_forgotten = 0

    def obstacle(self) -> str | None:
        """Why nothing is kept for later calls, or `None`."""
        return self._identity.obstacle() if self._enabled else "prefix_caching is False"

    def begin_look(self) -> Sampling | None:
        """Begins with what takes longest in `root`, on other threads; see `ModelIdentity.begin_look`."""
        return self._identity.begin_look() if self._enabled else None

    def root(self, salt: str | None, pool: KVPool, begun: Sampling | None = None) -> PrefixRoot | None:
        """Where to look for prefixes and to keep them; `None` where nothing may be reused, and that is counted.

        Forgets what weights have left that are gone for good.
        """
        if not self._enabled:
            return None
        digest, obstacle = self._identity.look(begun)
        if digest is None:
            self._counters.fall_back(f"prefixes not reused: {obstacle}")
            return None
        if self._epoch != self._identity.epoch:
            self._epoch = self._identity.epoch
            pool.forget_prefixes()
        kv_format = None if pool.kv_format is None else pool.kv_format.name
        on_change = partial(self._note_change, self._times_forgotten)
        return PrefixRoot(root_key(digest, salt, kv_format), digest, salt, self._identity, on_change)

    def _note_change(self, times_forgotten: int) -> None:
        """Count that a model has changed in the midst of a call, unless prefixes were only forgotten meanwhile."""
        if times_forgotten == self._times_forgotten:
            self._counters.fall_back("prefixes not kept: the model is not what it was when the call began")

    def passing(self) -> AbstractContextManager[None]:
        """Around every pass of the model; see `ModelIdentity.passing`."""
        return self._identity.passing()

    def forget(self) -> None:
        """No root that was given out before holds any more."""
        self._times_forgotten += 1
        self._identity.renew()
