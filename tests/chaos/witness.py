"""What happened in a run, in order: faults, and the cluster's events from the bus, also of monitors that have died."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from common.bus import BusSubscriber
from common.monitor_address import MonitorAddress
from common.transport import open_context

_BEFORE_S, _AFTER_S = 3.0, 1.0
_SHOWN_ELSEWHERE = ("type", "kind", "seq", "time", "since", "term", "epoch")


class Witness:
    """``lines``: (seconds since the start, text)."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.lines: list[tuple[float, str]] = []
        self._events: set[str] = set()  # an answer is told again whenever it is asked for

    @property
    def now_s(self) -> float:
        return time.monotonic() - self.started

    def tell(self, text: str) -> None:
        self.lines.append((self.now_s, text))

    def story(self, from_s: float = 0.0, to_s: float = float("inf")) -> list[str]:
        """What was told from a moment before ``from_s`` to a moment after ``to_s``."""
        chosen = [(at, text) for at, text in sorted(self.lines) if from_s - _BEFORE_S <= at <= to_s + _AFTER_S]
        return [f"{at:8.2f} s  {text}" for at, text in chosen]

    @contextlib.asynccontextmanager
    async def watching(self, address: MonitorAddress) -> AsyncIterator[None]:
        with open_context(address.key) as context:
            subscriber = BusSubscriber(context, address, ("event",))
            task = asyncio.create_task(self._listen(subscriber))
            try:
                yield
            finally:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
                subscriber.close()

    async def _listen(self, subscriber: BusSubscriber) -> None:
        while True:
            _, payload = await subscriber.receive_raw()
            with contextlib.suppress(msgspec.DecodeError):
                text = _shown(msgspec.msgpack.decode(payload))
                if text not in self._events:
                    self._events.add(text)
                    self.tell(f"    {text}")


def _shown(event: dict[str, Any]) -> str:
    fields = " ".join(f"{key}={value}" for key, value in event.items() if key not in _SHOWN_ELSEWHERE)
    return f"epoch {event.get('epoch', 0)} {event.get('kind')}: {fields}"[:400]
