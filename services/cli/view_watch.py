"""The views on the bus, as they come."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from common.bus import BusSubscriber
from common.messages import View
from common.monitor_address import MonitorAddress
from common.transport import open_context


@contextlib.asynccontextmanager
async def watch_views(address: MonitorAddress) -> AsyncIterator[list[tuple[float, View]]]:
    """A list that grows by (monotonic seconds, view) with every view on the bus."""
    views: list[tuple[float, View]] = []
    with open_context(address.key) as context:
        subscriber = BusSubscriber(context, address, ("view",))

        async def receive() -> None:
            while True:
                _, message = await subscriber.receive()
                if isinstance(message, View):
                    views.append((time.monotonic(), message))

        task = asyncio.create_task(receive())
        try:
            yield views
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            subscriber.close()
