"""Who asks: the `cache_salt` of an API user, so that no user sees or times the prefixes of another."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

# Salts are made with a key that ends with the process: neither API keys nor user names can be found from them.
_KEY = secrets.token_bytes(32)

_AUTHORIZATION: ContextVar[str | None] = ContextVar("authorization", default=None)
_SALT: ContextVar[str | None] = ContextVar("salt", default=None)

Message = MutableMapping[str, Any]


def user_salt(explicit: str | None, user: str | None) -> str | None:
    """The salt of the request under way: of `explicit`, else of its `Authorization` header and `user` together.

    `None` where the request has none of them.
    """
    who = (_AUTHORIZATION.get(), user)
    if explicit is None and who == (None, None):
        return None
    parts = ["cache_salt", explicit] if explicit is not None else ["user", *who]
    return hashlib.blake2b(json.dumps(parts).encode(), key=_KEY, digest_size=32).hexdigest()


@contextmanager
def salted(salt: str | None) -> Iterator[None]:
    """What is generated inside the `with` block, in this task, has this salt."""
    outer = _SALT.set(salt)
    try:
        yield
    finally:
        _SALT.reset(outer)


def with_salt(inputs: MutableMapping[str, Any]) -> dict[str, Any]:
    """Arguments of `generate`, with the salt of the request under way."""
    salt = _SALT.get()
    return dict(inputs) if salt is None else {**inputs, "cache_salt": salt}


class NoteAuthorization:
    """ASGI middleware: `user_salt` knows the request's `Authorization` header."""

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self._app = app

    async def __call__(self, scope: Message, receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        """Note the header and hand the request on."""
        headers = dict(scope.get("headers") or ())
        value = headers.get(b"authorization")
        outer = _AUTHORIZATION.set(None if value is None else value.decode("latin-1"))
        try:
            await self._app(scope, receive, send)
        finally:
            _AUTHORIZATION.reset(outer)
