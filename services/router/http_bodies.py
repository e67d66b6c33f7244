"""Bodies and headers of HTTP: reading within bounds, JSON, errors as JSON, and the name of each request."""

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import web

from services.router import openai_format
from services.router.api_error import ApiError

REQUEST_ID = "X-Request-Id"
_READ_BODY_S = 30.0
_MAX_REQUEST_ID = 128

log = logging.getLogger("regrow.http")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def read_body(request: web.Request, max_bytes: int) -> bytes:
    """Raises ApiError when it is too large or too slow."""
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


def json_response(body: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), status=status, headers=headers, content_type="application/json")


def error_body(error: ApiError) -> dict[str, Any]:
    return openai_format.error_body(error.status, error.message, error.param)


def request_id(request: web.Request, otherwise: str) -> str:
    """The client's own id for the request, if it sent one of a reasonable length."""
    given = request.headers.get(REQUEST_ID, "")
    return given if 0 < len(given) <= _MAX_REQUEST_ID and given.isascii() and given.isprintable() else otherwise


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every answer, errors too, names its request."""
    try:
        response = await handler(request)
    except ApiError as error:
        headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
        response = json_response(error_body(error), error.status, headers)
    except web.HTTPException as error:
        message = f"{request.method} {request.path}: {error.reason}"
        response = json_response(openai_format.error_body(error.status, message), error.status)
        if "Allow" in error.headers:
            response.headers["Allow"] = error.headers["Allow"]
    except ConnectionError:
        raise  # the client is gone: there is nobody to answer
    except Exception:
        log.exception("%s %s failed", request.method, request.path)
        body = openai_format.error_body(500, "internal error; the router's log has the details")
        response = json_response(body, 500)
    if not response.prepared:
        response.headers.setdefault(REQUEST_ID, request_id(request, uuid.uuid4().hex))
    return response
