"""One request between the router core, which delivers tokens, and the HTTP handler, which waits for text."""

import asyncio
from collections.abc import Callable
from types import TracebackType

from common.ids import RequestId
from common.metrics import RouterMetrics
from services.router.request_actions import Deliver
from services.router.request_parsing import ApiError
from services.router.text_stream import TextDelta, TextStream


class Generation:
    """Use it as a context manager: leaving the block before the end tells the cluster that the client is gone."""

    def __init__(
        self,
        id: RequestId,
        text: TextStream,
        metrics: RouterMetrics,
        now: float,
        on_close: Callable[[RequestId], None],
    ) -> None:
        self.id, self._text, self._metrics, self._on_close = id, text, metrics, on_close
        # Bounded by max_tokens: there is at most one entry for each token.
        self._queue: asyncio.Queue[TextDelta | ApiError] = asyncio.Queue()
        self._last_token_at = now
        self.ended = False

    @property
    def num_tokens(self) -> int:
        return self._text.num_tokens

    def deliver(self, tokens: Deliver, now: float) -> None:
        """Hands text to the waiting handler. `ended` is set when the text is complete, be it by a stop string."""
        if self.ended:
            return
        first = self._text.num_tokens == 0
        delta = self._text.push(tokens.ids, tokens.logprobs, tokens.finish)
        histogram = self._metrics.time_to_first_token if first else self._metrics.token_gap
        histogram.observe(now - self._last_token_at)
        self._last_token_at = now
        self._metrics.output_tokens.inc(len(delta.ids))
        self._queue.put_nowait(delta)
        if delta.finish:
            self._end("finished")

    def fail(self, error: ApiError) -> None:
        if not self.ended:
            self._queue.put_nowait(error)
            self._end("failed")

    async def next(self) -> TextDelta:
        """The next text, which ends the request if it has a finish. Raises ApiError when there will be no more.

        Waits no longer than the request's deadline, which the core keeps.
        """
        delta = await self._queue.get()
        if isinstance(delta, ApiError):
            raise delta
        return delta

    def __enter__(self) -> "Generation":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.ended:
            self._end("cancelled")
        self._on_close(self.id)

    def _end(self, outcome: str) -> None:
        self.ended = True
        self._metrics.requests.labels(outcome=outcome).inc()
