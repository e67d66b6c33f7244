"""The HTTP side: OpenAI endpoints, health, metrics, cluster state. What it knows of the cluster is a `Gateway`."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, Protocol

from aiohttp import web

from common.ids import ProcessId
from common.metrics import CONTENT_TYPE_LATEST
from services.router import openai_format
from services.router.answer import Answer
from services.router.api_error import ApiError
from services.router.choices import Choice, plan_choices
from services.router.http_admin import AdminApi
from services.router.http_answers import send_stream, send_whole
from services.router.http_bodies import REQUEST_ID, errors_as_json, json_response, read_body, request_id
from services.router.http_generation import Generations
from services.router.openai_format import ResponseHead
from services.router.request_parsing import parse_request
from services.router.served_model import ServedModel
from services.router.tokenization import parse_detokenize, parse_tokenize

log = logging.getLogger("regrow.http")
_SMALL_BODY_BYTES = 1 << 12  # tokenized in less time than a thread takes to be woken


class Gateway(Protocol):
    """What the HTTP side asks of the router."""

    def max_body_bytes(self) -> int: ...
    def send_timeout_s(self) -> float: ...
    def model(self) -> ServedModel:
        """Raises ApiError while there is none."""
        ...

    def draw_seed(self) -> int: ...
    def max_choices(self) -> int:
        """More than these in one request are never accepted."""
        ...

    def open(self, choices: Sequence[Choice], stops: tuple[str, ...]) -> Generations:
        """Accepts all choices of a request, or raises ApiError."""
        ...

    def unhealthy(self) -> str | None:
        """Why no request can be served now; None when one can."""
        ...

    async def cluster_status(self) -> dict[str, Any]: ...
    def process(self) -> ProcessId: ...
    def is_leaving(self) -> bool:
        """Connections end with the answer that is under way: a client must not use them again."""
        ...

    def requests_in_flight(self) -> list[dict[str, object]]: ...
    def render_metrics(self, placement: Mapping[str, Any]) -> bytes: ...


class HttpApi:
    def __init__(self, gateway: Gateway, admin: AdminApi) -> None:
        self._gateway, self._admin = gateway, admin
        self._started_at = int(time.time())

    def application(self) -> web.Application:
        app = web.Application(middlewares=[errors_as_json])
        app.on_response_prepare.append(self._end_connection)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/v1/chat/completions", self._chat_completions)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{model:.+}", self._one_model)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_post("/detokenize", self._detokenize)
        app.router.add_get("/health", self._health)
        app.router.add_get("/ping", self._health)
        app.router.add_post("/ping", self._health)
        app.router.add_get("/version", self._version)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/cluster", self._cluster)
        app.router.add_get("/requests", self._requests)
        self._admin.add_routes(app)
        return app

    async def _end_connection(self, request: web.Request, response: web.StreamResponse) -> None:
        if self._gateway.is_leaving():
            response.force_close()
            response.headers["Connection"] = "close"

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, chat=False)

    async def _chat_completions(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, chat=True)

    async def _generate(self, request: web.Request, chat: bool) -> web.StreamResponse:
        gateway = self._gateway
        body = await read_body(request, gateway.max_body_bytes())
        model = gateway.model()
        parsed = parse_request(body, chat, model.limits)
        # Off the loop: a body of megabytes must not hold up the streams of others.
        is_small = len(body) <= _SMALL_BODY_BYTES
        prompts = model.prompts(parsed) if is_small else await asyncio.to_thread(model.prompts, parsed)
        choices = plan_choices(parsed, prompts, model.limits, gateway.max_choices(), gateway.draw_seed)
        with gateway.open(choices, parsed.stops) as generations:
            id = f"{'chatcmpl' if chat else 'cmpl'}-{generations.id}"
            if REQUEST_ID in request.headers:
                log.info("%s is %s of the client", id, request_id(request, "unnamed"))
            head = ResponseHead(id, model.limits.name, int(time.time()), chat)
            answer = Answer(head, parsed, choices, model.tokenizer)
            # An error before the first token has its own HTTP status, streaming or not.
            first = await generations.next_ones()
            if parsed.stream:
                return await send_stream(request, answer, generations, first, gateway.send_timeout_s())
            return await send_whole(request, answer, generations, first)

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await read_body(request, self._gateway.max_body_bytes())
        model = self._gateway.model()
        parsed = parse_tokenize(body, model.limits)
        return json_response(await asyncio.to_thread(model.tokenize, parsed))

    async def _detokenize(self, request: web.Request) -> web.Response:
        body = await read_body(request, self._gateway.max_body_bytes())
        model = self._gateway.model()
        ids = parse_detokenize(body, model.limits)
        return json_response(await asyncio.to_thread(model.detokenize, ids))

    async def _models(self, request: web.Request) -> web.Response:
        limits = self._gateway.model().limits
        return json_response(openai_format.model_list(limits.name, self._started_at, limits.max_model_len))

    async def _one_model(self, request: web.Request) -> web.Response:
        limits, name = self._gateway.model().limits, request.match_info["model"]
        if name != limits.name:
            raise ApiError(404, f"the model {name!r} does not exist; this server has {limits.name!r}", "model")
        cards = openai_format.model_list(limits.name, self._started_at, limits.max_model_len)
        return json_response(cards["data"][0])

    async def _health(self, request: web.Request) -> web.Response:
        reason = self._gateway.unhealthy()
        if reason is not None:
            return json_response({"status": "unavailable", "reason": reason}, status=503)
        return json_response({"status": "ok"})

    async def _version(self, request: web.Request) -> web.Response:
        try:
            version = metadata.version("regrow")
        except metadata.PackageNotFoundError:  # a checkout that was not installed
            version = "unknown"
        return json_response({"version": version})

    async def _metrics(self, request: web.Request) -> web.Response:
        placement: dict[str, Any] = {}
        with contextlib.suppress(ApiError):  # no monitor has answered yet: the rest is shown all the same
            placement = (await self._gateway.cluster_status()).get("placement", {})
        body = self._gateway.render_metrics(placement)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _requests(self, request: web.Request) -> web.Response:
        """What this router has in flight, choice by choice.

        The id of a first choice is that of the answer without ``cmpl-`` or ``chatcmpl-``; the others' numbers follow.
        """
        return json_response({"router": self._gateway.process(), "requests": self._gateway.requests_in_flight()})

    async def _cluster(self, request: web.Request) -> web.Response:
        return json_response(await self._gateway.cluster_status())


def make_runner(gateway: Gateway, admin: AdminApi, shutdown_timeout_s: float) -> web.AppRunner:
    return web.AppRunner(
        HttpApi(gateway, admin).application(),
        handle_signals=False,
        access_log=None,
        handler_cancellation=True,  # a handler whose client is gone is cancelled, and its request aborted
        shutdown_timeout=shutdown_timeout_s,
    )
