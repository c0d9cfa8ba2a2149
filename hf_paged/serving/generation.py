"""`generate` as the server calls it: with the salt of its request, until nobody listens any more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import StoppingCriteria
from transformers.cli.serving.utils import GenerateManager, GenerationState

from hf_paged.serving.caller import Caller, current_caller
from hf_paged.serving.errors import HungUpError
from hf_paged.serving.streams import Pieces


@dataclass
class Call:
    """One request: what `generate` needs to know of it, and what it streams."""

    salt: str | None = None
    caller: Caller = field(default_factory=current_caller)
    are_errors_items: bool = False
    pieces: Pieces | None = None


_CALL: ContextVar[Call | None] = ContextVar("call", default=None)


@contextmanager
def under_way(call: Call) -> Iterator[None]:
    """What is generated inside the `with` block, in this task, is of this call."""
    outer = _CALL.set(call)
    try:
        yield
    finally:
        _CALL.reset(outer)


class UntilHungUp(StoppingCriteria):
    """Ends every row when the caller has hung up."""

    def __init__(self, caller: Caller):
        self._caller = caller

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        return torch.full(input_ids.shape[:1], self._caller.hung_up.is_set(), device=input_ids.device)


class AttendedModel:
    """A model for one call: `generate` has its salt, ends with its caller, and leaves the exception it raised."""

    def __init__(self, model: Any, call: Call):
        self._model, self._call = model, call
        self._error: Exception = RuntimeError("nothing was raised")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, **kwargs: Any) -> Any:
        """As the model's own; `HungUpError` where the caller was gone when its turn came."""
        try:
            if self._call.caller.hung_up.is_set():
                raise HungUpError
            salt = {} if self._call.salt is None else {"cache_salt": self._call.salt}
            return self._model.generate(**kwargs, **salt, stopping_criteria=[UntilHungUp(self._call.caller)])
        except Exception as error:
            self._error = error
            raise

    def raised(self) -> Exception:
        """What `generate` raised."""
        return self._error


class PagedGeneration(GenerateManager):
    """One `generate` after the other."""

    def generate_streaming(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own."""
        call = _CALL.get() or Call()
        attended = AttendedModel(model, call)
        queue, streamer = super().generate_streaming(attended, *args, **kwargs)
        call.pieces = Pieces(queue, attended.raised, call.are_errors_items)
        return call.pieces, streamer

    async def generate_non_streaming(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own."""
        return await super().generate_non_streaming(AttendedModel(model, _CALL.get() or Call()), *args, **kwargs)


class PagedGenerations(GenerationState):
    """Gives every model its `PagedGeneration`. Continuous batching, which has a cache of its own, stays off."""

    def get_manager(self, model_id: str, use_cb: bool = False) -> GenerateManager:
        """The manager of a model."""
        return self._generate_managers.setdefault(model_id, PagedGeneration())
