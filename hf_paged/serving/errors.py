"""What goes wrong, as OpenAI's clients read it: the status and the error object."""

from __future__ import annotations

import logging
import traceback
from typing import Any

from fastapi import HTTPException
from jinja2 import TemplateError
from pydantic import ValidationError

from hf_paged.errors import PagedMemoryError, is_refusal

# Code that no argument of a request is read by: an error that passes through it is the server's own.
_SERVERS_OWN = ("hf_paged.", "torch.nn.", "transformers.cli.serving.model_manager")
_PASSED_THROUGH = ("hf_paged.generation", "hf_paged.serving.")

_log = logging.getLogger(__name__)


class HungUpError(Exception):
    """The client hung up before its turn came."""


def explained(error: Exception) -> HTTPException:
    """The answer to a request that ended in `error`.

    400 for what the request asked for; 507 where KV memory is too little for it, which asking again does not change;
    503 where other memory was short; 500 for the rest, which is logged and not told to the client.
    """
    if isinstance(error, HTTPException):
        return error
    if isinstance(error, HungUpError):
        return HTTPException(499, "the client hung up")
    if isinstance(error, PagedMemoryError):
        return HTTPException(507, str(error), headers={"x-should-retry": "false"})  # read by OpenAI's clients
    if is_refusal(error):
        return HTTPException(503, "the server is short of memory")
    if is_of_request(error):
        return HTTPException(400, str(error))
    _log.error("a request failed", exc_info=error)
    return HTTPException(500, f"the server failed ({type(error).__name__}); its log says where")


def is_of_request(error: Exception) -> bool:
    """Whether the chat template or `generate` refused what the request asked for.

    Both do so with errors that anything else may raise, too; what the model, hf_paged or the loading of weights raised
    does not count.
    """
    if not isinstance(error, ValueError | TemplateError) or isinstance(error, ValidationError):
        return False
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return not any(name.startswith(_SERVERS_OWN) and not name.startswith(_PASSED_THROUGH) for name in modules)


def error_object(problem: HTTPException) -> dict[str, Any]:
    """The `error` of an answer or of a stream's last event."""
    kind = "invalid_request_error" if problem.status_code < 500 else "server_error"
    return {"message": str(problem.detail), "type": kind, "code": problem.status_code}
