"""Who asks, and whether they still listen for the answer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

Message = MutableMapping[str, Any]
_DISCONNECT = "http.disconnect"


@dataclass(frozen=True)
class Caller:
    """The client of one request: its `Authorization` header, and whether it has hung up."""

    authorization: str | None = None
    hung_up: threading.Event = field(default_factory=threading.Event)


_CALLER: ContextVar[Caller | None] = ContextVar("caller", default=None)


def current_caller() -> Caller:
    """The caller of the request under way."""
    return _CALLER.get() or Caller()


class NoteCaller:
    """ASGI middleware: `current_caller` knows the client, and notices when it hangs up.

    Nobody reads from the connection while an answer is computed, so that a client that has gone would not be missed.
    Messages are therefore read as they come, and handed on from a queue.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self._app = app

    async def __call__(self, scope: Message, receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        """Hand the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        value = dict(scope["headers"]).get(b"authorization")
        caller = Caller(None if value is None else value.decode("latin-1"))
        messages: asyncio.Queue[Message] = asyncio.Queue()
        reading = asyncio.create_task(_read(receive, messages, caller))
        outer = _CALLER.set(caller)

        async def received() -> Message:
            message = await messages.get()
            if message["type"] == _DISCONNECT:
                messages.put_nowait(message)  # for whoever else asks
            return message

        try:
            await self._app(scope, received, send)
        finally:
            _CALLER.reset(outer)
            reading.cancel()


async def _read(receive: Callable[..., Any], messages: asyncio.Queue[Message], caller: Caller) -> None:
    """Move messages into the queue until the client hangs up."""
    while not caller.hung_up.is_set():
        message = await receive()
        if message["type"] == _DISCONNECT:
            caller.hung_up.set()
        messages.put_nowait(message)
