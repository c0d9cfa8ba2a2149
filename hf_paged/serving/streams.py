"""Streams that tell their errors: before the first piece by a status, later by a last event."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from transformers.cli.serving.utils import _StreamError

from hf_paged.serving.errors import error_object, explained


class Pieces:
    """What a handler of transformers streams: a queue with `get` and `get_nowait`.

    Args:
        queue: filled by the thread that generates; an error is its last item, a text without the exception.
        error: the exception behind that item.
        are_errors_items: whether the handler makes events of errors, as that of `/v1/responses` does. For others, which
            have no form for them that clients understand, `get` raises the exception.
    """

    def __init__(self, queue: asyncio.Queue, error: Callable[[], Exception], are_errors_items: bool):
        self._queue, self._error, self._are_errors_items = queue, error, are_errors_items
        self._ahead: list[Any] = []

    async def begin(self) -> None:
        """Wait for the first item. Raises the error that came instead of it."""
        self._ahead.append(await self._queue.get())
        if isinstance(self._ahead[0], _StreamError):
            raise self._error()

    async def get(self) -> Any:
        """The next item."""
        item = self._ahead.pop() if self._ahead else await self._queue.get()
        if not isinstance(item, _StreamError):
            return item
        if self._are_errors_items:
            return _StreamError(explained(self._error()).detail)
        raise self._error()

    def get_nowait(self) -> Any:
        """The next item if there is one, and `QueueEmpty` if not; errors are left to `get`."""
        item = self._ahead.pop() if self._ahead else self._queue.get_nowait()
        if isinstance(item, _StreamError):
            self._ahead.append(item)
            raise asyncio.QueueEmpty
        return item


async def with_last_event(events: AsyncGenerator[str, None]) -> AsyncIterator[str]:
    """The events of a stream; an exception becomes the last one, from which OpenAI's clients raise `APIError`."""
    async with aclosing(events):
        try:
            async for event in events:
                yield event
        except Exception as error:
            yield f"data: {json.dumps({'error': error_object(explained(error))})}\n\n"
