"""transformers' server, put together from its own parts around a patched model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from transformers import PreTrainedModel
from transformers.cli.serving.model_manager import ModelManager

from hf_paged import compat
from hf_paged.config import PagedConfig
from hf_paged.metrics import PagedCollector
from hf_paged.patch import is_patched, patch_model
from hf_paged.serving import checks
from hf_paged.serving.caller import NoteCaller, current_caller
from hf_paged.serving.errors import error_object, explained
from hf_paged.serving.generation import Call, PagedGenerations, under_way
from hf_paged.serving.salt import user_salt
from hf_paged.serving.streams import with_last_event


class Endpoint(NamedTuple):
    """What is to be known of a handler of transformers."""

    complaint: Callable[[Mapping[str, Any]], str | None]
    has_error_events: bool = False  # that clients understand


_ENDPOINTS = {
    "chat_handler": Endpoint(checks.chat_complaint),
    "completion_handler": Endpoint(checks.completion_complaint),
    "response_handler": Endpoint(checks.response_complaint, has_error_events=True),
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
        model = patch_model(super()._load_model(*args, **kwargs), self._config)
        model.paged.verify()  # not only when somebody asks
        return model

    def get_gen_models(self, *_: Any) -> list[dict[str, Any]]:
        """The one model that is served, instead of all that the Hub's cache holds."""
        return [{"id": self.force_model, "object": "model", "owned_by": "hf_paged", "created": int(time.time())}]

    def patched(self) -> dict[str, PreTrainedModel]:
        """The models that are loaded, by the name that requests have for them."""
        loaded = [timed.model for timed in list(self.loaded_models.values()) if is_patched(timed.model)]
        return {self.force_model: loaded[0]} if loaded else {}


class PagedRequests:
    """Comes before a handler of transformers: looks at the body first, and tells errors as OpenAI does."""

    endpoint: Endpoint

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """The handler's answer. A stream is begun when its first piece is there, so that an error before has a status.

        Raises `HTTPException` where the request cannot be answered.
        """
        problem = self.endpoint.complaint(body)
        if problem is not None:
            raise HTTPException(status_code=400, detail=problem)
        rest = {name: value for name, value in body.items() if name != "cache_salt"}
        salt = user_salt(body.get("cache_salt"), current_caller().authorization, body.get("user"))
        call = Call(salt, are_errors_items=self.endpoint.has_error_events)
        try:
            with under_way(call):
                response = await super().handle_request(rest, request_id)
            if call.pieces is not None:
                await call.pieces.begin()
                response.body_iterator = with_last_event(response.body_iterator)
            return response
        except Exception as error:
            raise explained(error) from error


def build_app(models: PagedModelManager, chat_template_kwargs: Mapping[str, Any], enable_cors: bool = False) -> FastAPI:
    """The server's application: transformers' endpoints, and `/metrics`.

    Raises `RuntimeError` where this transformers builds its server in a way that is not known.
    """
    state, handlers = PagedGenerations(), {}
    given = {"chat_template_kwargs": dict(chat_template_kwargs)} if chat_template_kwargs else {}
    for name, kind in compat.server_handlers().items():
        if name in _ENDPOINTS:
            kind = type(kind.__name__, (PagedRequests, kind), {"endpoint": _ENDPOINTS[name]})
        taken = compat.accepted(kind.__init__, given)
        if name == "chat_handler" and taken != given:
            raise RuntimeError("chat_template_kwargs are not known to the server of this transformers")
        handlers[name] = kind(models, state, **taken)
    app = compat.build_server(models, state, handlers, enable_cors)
    app.add_middleware(NoteCaller)
    app.add_exception_handler(HTTPException, _tell)
    app.add_exception_handler(RequestValidationError, _tell_invalid)
    registry = CollectorRegistry()
    registry.register(PagedCollector(models.patched))

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return app


async def _tell(_: Request, problem: HTTPException) -> JSONResponse:
    """A problem as OpenAI's clients read it; `detail` is what transformers' server has."""
    content = {"detail": problem.detail, "error": error_object(problem)}
    return JSONResponse(content, problem.status_code, problem.headers)


async def _tell_invalid(request: Request, problem: RequestValidationError) -> JSONResponse:
    """The same of a body that is no JSON object."""
    return await _tell(request, HTTPException(400, "; ".join(str(each["msg"]) for each in problem.errors())))
