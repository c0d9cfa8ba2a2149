"""The `cache_salt` of an API user, so that no user sees or times the prefixes of another."""

from __future__ import annotations

import hashlib
import json
import secrets

# Salts are made with a key that ends with the process: neither API keys nor user names can be found from them.
_KEY = secrets.token_bytes(32)


def user_salt(explicit: str | None, authorization: str | None, user: str | None) -> str | None:
    """The salt of a request: of `explicit`, else of its `Authorization` header and `user` together.

    `None` where the request has none of them.
    """
    who = (authorization, user)
    if explicit is None and who == (None, None):
        return None
    parts = ["cache_salt", explicit] if explicit is not None else ["user", *who]
    return hashlib.blake2b(json.dumps(parts).encode(), key=_KEY, digest_size=32).hexdigest()
