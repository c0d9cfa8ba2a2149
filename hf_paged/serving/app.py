"""transformers' server, put together from its own parts around a patched model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from pydantic import ValidationError
from transformers import PreTrainedModel
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerateManager, GenerationState

from hf_paged import compat
from hf_paged.config import PagedConfig
from hf_paged.errors import PagedMemoryError
from hf_paged.metrics import PagedCollector
from hf_paged.patch import is_patched, patch_model
from hf_paged.serving import checks
from hf_paged.serving.salt import NoteAuthorization, salted, user_salt, with_salt

_COMPLAINTS: dict[str, Callable[[Mapping[str, Any]], str | None]] = {
    "chat_handler": checks.chat_complaint,
    "completion_handler": checks.completion_complaint,
    "response_handler": checks.response_complaint,
}


class PagedModelManager(ModelManager):
    """Serves one model, and patches it whenever it is loaded (`/reset` unloads it).

    Args:
        model: hub id or folder.
        config: as in `patch_model`.
        **settings: those of transformers' `ModelManager`.
    """

    def __init__(self, model: str, config: PagedConfig, **settings: Any):
        self._config = config
        self._pinned: str | None = None
        super().__init__(force_model=model, **settings)

    def load_model_and_processor(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own, but for the one model only: what is loaded first, when the server starts."""
        self._pinned = self._pinned or model_id_and_revision
        if model_id_and_revision != self._pinned:
            raise ValueError(f"Server is pinned to '{self.force_model}'; requested '{model_id_and_revision}'.")
        return super().load_model_and_processor(model_id_and_revision, *args, **kwargs)

    def _load_model(self, *args: Any, **kwargs: Any) -> PreTrainedModel:
        return patch_model(super()._load_model(*args, **kwargs), self._config)

    def get_gen_models(self, *_: Any) -> list[dict[str, Any]]:
        """The one model that is served, instead of all that the Hub's cache holds."""
        return [{"id": self.force_model, "object": "model", "owned_by": "hf_paged", "created": int(time.time())}]

    def patched(self) -> dict[str, PreTrainedModel]:
        """The models that are loaded, by the name that requests have for them."""
        loaded = [timed.model for timed in list(self.loaded_models.values()) if is_patched(timed.model)]
        return {self.force_model: loaded[0]} if loaded else {}


class SaltedGeneration(GenerateManager):
    """One `generate` after the other, each with the salt of its request."""

    def generate_streaming(self, model: Any, processor: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own."""
        return super().generate_streaming(model, processor, with_salt(inputs), *args, **kwargs)

    async def generate_non_streaming(self, model: Any, processor: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own."""
        return await super().generate_non_streaming(model, processor, with_salt(inputs), *args, **kwargs)


class SaltedGenerations(GenerationState):
    """Gives every model its `SaltedGeneration`. Continuous batching, which has a cache of its own, stays off."""

    def get_manager(self, model_id: str, use_cb: bool = False) -> GenerateManager:
        """The manager of a model."""
        return self._generate_managers.setdefault(model_id, SaltedGeneration())


class PagedRequests:
    """Comes before a handler of transformers: looks at the body first, and takes the salt out of it."""

    complaint: Callable[[Mapping[str, Any]], str | None]

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """The handler's answer; 400 where the request cannot be answered."""
        problem = type(self).complaint(body)
        if problem is not None:
            raise HTTPException(status_code=400, detail=problem)
        rest = {name: value for name, value in body.items() if name != "cache_salt"}
        with salted(user_salt(body.get("cache_salt"), body.get("user"))):
            try:
                return await super().handle_request(rest, request_id)
            except ValidationError:  # of an answer: the server's fault, although a ValueError
                raise
            except (PagedMemoryError, TemplateError, ValueError) as error:
                # What `generate` and chat templates say of arguments; requests run one at a time, so that what does
                # not fit would not fit later either.
                raise HTTPException(status_code=400, detail=str(error)) from error


def build_app(models: PagedModelManager, chat_template_kwargs: Mapping[str, Any], enable_cors: bool = False) -> FastAPI:
    """The server's application: transformers' endpoints, and `/metrics`.

    Raises `RuntimeError` where this transformers builds its server in a way that is not known.
    """
    state, handlers = SaltedGenerations(), {}
    given = {"chat_template_kwargs": dict(chat_template_kwargs)} if chat_template_kwargs else {}
    for name, kind in compat.server_handlers().items():
        if name in _COMPLAINTS:
            kind = type(kind.__name__, (PagedRequests, kind), {"complaint": staticmethod(_COMPLAINTS[name])})
        taken = compat.accepted(kind.__init__, given)
        if name == "chat_handler" and taken != given:
            raise RuntimeError("chat_template_kwargs are not known to the server of this transformers")
        handlers[name] = kind(models, state, **taken)
    app = compat.build_server(models, state, handlers, enable_cors)
    app.add_middleware(NoteAuthorization)
    app.add_exception_handler(HTTPException, _explain)
    registry = CollectorRegistry()
    registry.register(PagedCollector(models.patched))

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return app


async def _explain(_: Request, problem: HTTPException) -> JSONResponse:
    """The answer to a bad request as OpenAI's clients read it; `detail` is what transformers' server has."""
    error = {"message": str(problem.detail), "type": "invalid_request_error", "code": problem.status_code}
    return JSONResponse({"detail": problem.detail, "error": error}, problem.status_code)
