"""``POST /admin/...``: what the command line does over the bus, for those who hold the token.

The body becomes a fault event, is published until the monitor says how it ended, and the answer is the monitor's
acknowledgement with its proof. So both ways have the same checks, the same effects and the same events.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from typing import Any

import msgspec
import zmq.asyncio
from aiohttp import web

from common.admin_token import VARIABLE, is_authorised
from common.bus import BusPublisher, BusSubscriber
from common.fault import FaultRefused, parse_fault
from common.fault_answers import REPEAT_S, FaultAnswers
from common.monitor_address import MonitorAddress
from services.router.api_error import ApiError
from services.router.http_bodies import json_response, read_body
from services.router.json_fields import JsonFields

_MAX_BODY_BYTES = 64 << 10
_STATUS = {"done": 200, "refused": 409, "failed": 409}
_OFF = f"the admin API is off: start the router with --admin-token-file FILE, or with {VARIABLE} in its environment"

log = logging.getLogger("regrow.admin")


class AdminApi:
    """``token``: empty = off."""

    def __init__(self, context: zmq.asyncio.Context, address: MonitorAddress, token: str) -> None:
        self._context, self._address, self._token = context, address, token

    def add_routes(self, app: web.Application) -> None:
        for action in ("scale", "drain", "undrain"):
            app.router.add_post(f"/admin/{action}", self._handler(action))
        app.router.add_post("/admin/fault", self._handler(None))

    def _handler(self, action: str | None) -> Callable[[web.Request], Any]:
        async def handle(request: web.Request) -> web.Response:
            self._authorise(request)
            body = JsonFields.of_body(await read_body(request, _MAX_BODY_BYTES))
            answer = await self._inject(_event(action, body), request.remote)
            return json_response(answer, _STATUS[answer["status"]])

        return handle

    def _authorise(self, request: web.Request) -> None:
        """Before anything of the body is read."""
        if not self._token:
            raise ApiError(403, _OFF)
        if not is_authorised(self._token, request.headers.get("Authorization", "")):
            log.warning("%s from %s without the admin token", request.path, request.remote)
            raise ApiError(401, "send the admin token as: Authorization: Bearer TOKEN")

    async def _inject(self, event: dict[str, Any], remote: str | None) -> dict[str, Any]:
        log.info("%s by %s", event, remote)
        payload = msgspec.msgpack.encode(event)
        answers = FaultAnswers(event["id"], time.monotonic())
        publisher = BusPublisher(self._context, self._address)
        subscriber = BusSubscriber(self._context, self._address, ("event",))
        try:
            while time.monotonic() < answers.deadline:
                publisher.publish_raw("fault", payload)
                if answer := await _answer_within(REPEAT_S, subscriber, answers):
                    return answer
        finally:
            publisher.close()
            subscriber.close()
        raise ApiError(504, "the monitor did not say in time how it ended; see GET /cluster")


async def _answer_within(seconds: float, subscriber: BusSubscriber, answers: FaultAnswers) -> dict[str, Any] | None:
    try:
        async with asyncio.timeout(seconds):
            while True:
                _, payload = await subscriber.receive_raw()
                if answer := answers.on_event(payload, time.monotonic()):
                    return answer
    except TimeoutError:
        return None


def _event(action: str | None, body: JsonFields) -> dict[str, Any]:
    """Raises ApiError with what the monitor would say of it."""
    identifier = body.text("id", "") or f"http-{secrets.token_hex(8)}"
    event = {**dict(body.items()), "type": "fault", "id": identifier}
    if action is not None:
        event["action"] = action
    try:
        parse_fault(msgspec.msgpack.encode(event))
    except FaultRefused as refusal:
        raise ApiError(400, str(refusal)) from None
    return event
