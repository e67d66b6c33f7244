"""GET /cluster: the monitor's status, asked for each time; its last one, marked as stale, when it does not answer."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

from common.messages import Status
from services.router.admission import RETRY_AFTER_S
from services.router.api_error import ApiError

_DEADLINE_S = 1.0


class ClusterStatus:
    """``ask`` sends the question with a number; the answer comes back by `on_status`."""

    def __init__(self, ask: Callable[[int], None]) -> None:
        self._ask = ask
        self._num_asked = 0
        self._pending: dict[int, asyncio.Future[str]] = {}
        self._last: dict[str, Any] | None = None

    def on_status(self, status: Status) -> None:
        answer = self._pending.get(status.id)
        if answer is not None and not answer.done():
            answer.set_result(status.body)

    async def get(self) -> dict[str, Any]:
        """Raises ApiError when the monitor has never answered."""
        self._num_asked += 1
        number = self._num_asked
        answer = self._pending[number] = asyncio.get_running_loop().create_future()
        self._ask(number)
        try:
            async with asyncio.timeout(_DEADLINE_S):
                status: dict[str, Any] = json.loads(await answer)
        except TimeoutError:
            if self._last is None:
                raise ApiError(503, "the monitor does not answer", retry_after_s=RETRY_AFTER_S) from None
            return {**self._last, "stale": True}
        finally:
            del self._pending[number]
        self._last = status
        return status
