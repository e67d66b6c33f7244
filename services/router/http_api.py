"""The HTTP side: OpenAI endpoints, health, metrics, cluster state. What it knows of the cluster is a `Gateway`."""

import asyncio
import contextlib
import errno
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Protocol

import msgspec
from aiohttp import web

from common.messages import Sampling
from common.metrics import CONTENT_TYPE_LATEST
from common.service_runner import OperatorError
from services.router import openai_format
from services.router.http_generation import Generation
from services.router.openai_format import ResponseHead, TokenLogprob, Usage
from services.router.request_parsing import ApiError, ParsedRequest, parse_request
from services.router.served_model import ServedModel
from services.router.text_stream import TextDelta

_READ_BODY_S = 30.0

log = logging.getLogger("regrow.http")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Gateway(Protocol):
    """What the HTTP side asks of the router."""

    def max_body_bytes(self) -> int: ...
    def send_timeout_s(self) -> float: ...
    def model(self) -> ServedModel:
        """Raises ApiError while there is none."""
        ...

    def draw_seed(self) -> int: ...
    def open(self, prompt: tuple[int, ...], sampling: Sampling, stops: tuple[str, ...]) -> Generation:
        """Accepts a request, or raises ApiError."""
        ...

    def unhealthy(self) -> str | None:
        """Why no request can be served now; None when one can."""
        ...

    async def cluster_status(self) -> dict[str, Any]: ...
    def requests_in_flight(self) -> list[dict[str, object]]: ...
    def render_metrics(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class _Answer:
    """What the handlers of one accepted request share."""

    head: ResponseHead
    parsed: ParsedRequest
    model: ServedModel
    generation: Generation
    num_prompt_tokens: int

    def usage(self) -> Usage:
        return Usage(self.num_prompt_tokens, self.generation.num_tokens)

    def logprobs(self, delta: TextDelta) -> list[TokenLogprob] | None:
        if not self.parsed.logprobs:
            return None
        return [
            TokenLogprob(self.model.token_text(id), logprob)
            for id, logprob in zip(delta.ids, delta.logprobs, strict=True)
        ]


class HttpApi:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._started_at = int(time.time())

    def application(self) -> web.Application:
        app = web.Application(middlewares=[_errors_as_json])
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/v1/chat/completions", self._chat_completions)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{model:.+}", self._one_model)
        app.router.add_get("/health", self._health)
        app.router.add_get("/version", self._version)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/cluster", self._cluster)
        app.router.add_get("/requests", self._requests)
        return app

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, chat=False)

    async def _chat_completions(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, chat=True)

    async def _generate(self, request: web.Request, chat: bool) -> web.StreamResponse:
        body = await _read_body(request, self._gateway.max_body_bytes())
        model = self._gateway.model()
        parsed = parse_request(body, chat, model.limits)
        # Off the loop: a body of megabytes must not hold up the streams of others.
        prompt = await asyncio.to_thread(model.prompt_ids, parsed)
        sampling = parsed.sampling(model.limits, len(prompt), self._gateway.draw_seed())
        with self._gateway.open(prompt, sampling, parsed.stops) as generation:
            id = f"{'chatcmpl' if chat else 'cmpl'}-{generation.id}"
            head = ResponseHead(id, model.limits.name, int(time.time()), chat)
            answer = _Answer(head, parsed, model, generation, len(prompt))
            # An error before the first token has its own HTTP status, streaming or not.
            first = await generation.next()
            if parsed.stream:
                return await self._stream(request, answer, first)
            return await self._whole(request, answer, first)

    async def _whole(self, request: web.Request, answer: _Answer, delta: TextDelta) -> web.StreamResponse:
        texts = [delta.text]
        logprobs = answer.logprobs(delta)
        while not delta.finish:
            delta = await answer.generation.next()
            texts.append(delta.text)
            if logprobs is not None:
                logprobs += answer.logprobs(delta) or []
        body = openai_format.whole_response(answer.head, "".join(texts), delta.finish, logprobs, answer.usage())
        return _json(body, headers={"X-Request-Id": _request_id(request, answer.head.id)})

    async def _stream(self, request: web.Request, answer: _Answer, delta: TextDelta) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
                "X-Request-Id": _request_id(request, answer.head.id),
            }
        )
        await response.prepare(request)
        # A write fails when the client is gone, and times out when it has stopped reading.
        with contextlib.suppress(ConnectionError, TimeoutError):
            await self._write_events(response, answer, delta)
        return response

    async def _write_events(self, response: web.StreamResponse, answer: _Answer, delta: TextDelta) -> None:
        head, usage_wanted = answer.head, answer.parsed.include_usage

        async def write(body: dict[str, Any]) -> None:
            if usage_wanted:
                body.setdefault("usage", None)
            await self._write(response, b"data: " + msgspec.json.encode(body) + b"\n\n")

        if head.chat:
            await write(openai_format.role_chunk(head))
        num_characters = 0
        try:
            while True:
                logprobs = answer.logprobs(delta)
                await write(openai_format.chunk(head, delta.text, delta.finish, logprobs, num_characters))
                num_characters += sum(len(token.text) for token in logprobs or ())
                if delta.finish:
                    break
                delta = await answer.generation.next()
            if usage_wanted:
                await write(openai_format.usage_chunk(head, answer.usage()))
        except ApiError as error:
            await self._write(response, b"data: " + msgspec.json.encode(_error_body(error)) + b"\n\n")
        await self._write(response, b"data: [DONE]\n\n")
        await response.write_eof()

    async def _write(self, response: web.StreamResponse, data: bytes) -> None:
        async with asyncio.timeout(self._gateway.send_timeout_s()):
            await response.write(data)

    async def _models(self, request: web.Request) -> web.Response:
        limits = self._gateway.model().limits
        return _json(openai_format.model_list(limits.name, self._started_at, limits.max_model_len))

    async def _one_model(self, request: web.Request) -> web.Response:
        limits, name = self._gateway.model().limits, request.match_info["model"]
        if name != limits.name:
            raise ApiError(404, f"the model {name!r} does not exist; this server has {limits.name!r}", "model")
        cards = openai_format.model_list(limits.name, self._started_at, limits.max_model_len)
        return _json(cards["data"][0])

    async def _health(self, request: web.Request) -> web.Response:
        reason = self._gateway.unhealthy()
        if reason is not None:
            return _json({"status": "unavailable", "reason": reason}, status=503)
        return _json({"status": "ok"})

    async def _version(self, request: web.Request) -> web.Response:
        try:
            version = metadata.version("regrow")
        except metadata.PackageNotFoundError:  # a checkout that was not installed
            version = "unknown"
        return _json({"version": version})

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=self._gateway.render_metrics(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _requests(self, request: web.Request) -> web.Response:
        """What this router has in flight; the id is that of the answer without ``cmpl-`` or ``chatcmpl-``."""
        return _json({"requests": self._gateway.requests_in_flight()})

    async def _cluster(self, request: web.Request) -> web.Response:
        return _json(await self._gateway.cluster_status())


def make_runner(gateway: Gateway, shutdown_timeout_s: float) -> web.AppRunner:
    return web.AppRunner(
        HttpApi(gateway).application(),
        handle_signals=False,
        access_log=None,
        handler_cancellation=True,  # a handler whose client is gone is cancelled, and its request aborted
        shutdown_timeout=shutdown_timeout_s,
    )


async def listen(runner: web.AppRunner, port: int) -> web.TCPSite:
    """Serves on all interfaces. Raises OperatorError when the port is not to be had."""
    site = web.TCPSite(runner, "0.0.0.0", port)
    try:
        await site.start()
    except OSError as error:
        reason = "it is in use" if error.errno == errno.EADDRINUSE else error.strerror
        raise OperatorError(f"cannot listen on port {port}: {reason}; choose another with --port") from None
    return site


@web.middleware
async def _errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        response = await handler(request)
    except ApiError as error:
        headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
        response = _json(_error_body(error), error.status, headers)
    except web.HTTPException as error:
        message = f"{request.method} {request.path}: {error.reason}"
        response = _json(openai_format.error_body(error.status, message), error.status)
        if "Allow" in error.headers:
            response.headers["Allow"] = error.headers["Allow"]
    except ConnectionError:
        raise  # the client is gone: there is nobody to answer
    except Exception:
        log.exception("%s %s failed", request.method, request.path)
        response = _json(openai_format.error_body(500, "internal error; the router's log has the details"), 500)
    if not response.prepared:
        response.headers.setdefault("X-Request-Id", _request_id(request, ""))
    return response


async def _read_body(request: web.Request, max_bytes: int) -> bytes:
    too_large = ApiError(413, f"the body is larger than {max_bytes} bytes")
    if (request.content_length or 0) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(_READ_BODY_S):
            async for data in request.content.iter_any():
                body += data
                if len(body) > max_bytes:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {_READ_BODY_S:g} s") from None
    return bytes(body)


def _request_id(request: web.Request, otherwise: str) -> str:
    """The client's own id for the request, if it sent one of a reasonable length."""
    given = request.headers.get("X-Request-Id", "")
    return given if 0 < len(given) <= 128 and given.isprintable() else otherwise


def _error_body(error: ApiError) -> dict[str, Any]:
    return openai_format.error_body(error.status, error.message, error.param)


def _json(body: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), status=status, headers=headers, content_type="application/json")
