"""HTTP requests between the router core, which delivers tokens, and the handlers, which wait for text."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType

from common.ids import RequestId, make_request_id
from common.metrics import RouterMetrics
from services.router.api_error import ApiError
from services.router.request_actions import Deliver
from services.router.text_stream import TextDelta, TextStream

_QUIET_S = 0.2


Item = tuple[int, TextDelta | ApiError]


class Outbox:
    """What the core delivers for all choices of one request: number of the choice, and its next text or its error.
    Bounded by max_tokens: there is at most one entry for each token of each choice.

    A task that wakes for each token of each stream is what a router would spend most on. So a handler may name a
    ``direct`` way for what needs nothing of it; whatever that does not take, and all that comes before the handler has
    seen it, waits for the handler. Nothing overtakes anything.
    """

    def __init__(self) -> None:
        self._items: deque[Item] = deque()
        self._filled = asyncio.Event()
        self.direct: Callable[[int, TextDelta], bool] | None = None

    def put(self, index: int, item: TextDelta | ApiError) -> None:
        if self.direct and not self._items and isinstance(item, TextDelta) and self.direct(index, item):
            return
        self._items.append((index, item))
        self._filled.set()

    async def take(self) -> list[tuple[int, TextDelta]]:
        """All that waits, at least one. Raises ApiError when a choice has failed, after what came before that."""
        await self._filled.wait()
        ready: list[tuple[int, TextDelta]] = []
        while self._items:
            index, item = self._items[0]
            if isinstance(item, ApiError):
                if ready:
                    return ready
                raise item
            self._items.popleft()
            ready.append((index, item))
        self._filled.clear()
        return ready


class Generation:
    """One choice: a request of the core. What it delivers goes into an outbox that all choices share."""

    def __init__(
        self, id: RequestId, index: int, text: TextStream, outbox: Outbox, metrics: RouterMetrics, now: float
    ) -> None:
        self.id, self._index, self._text, self._outbox, self._metrics = id, index, text, outbox, metrics
        self._last_token_at = now
        self.ended = False

    def deliver(self, tokens: Deliver, now: float) -> None:
        """Hands text to the waiting handler. `ended` is set when the text is complete, be it by a stop string."""
        if self.ended:
            return
        first = self._text.num_tokens == 0
        delta = self._text.push(
            tokens.ids,
            tokens.logprobs,
            tokens.finish,
            tokens.top_logprobs,
            tokens.prompt_logprobs,
            tokens.missed_experts,
        )
        histogram = self._metrics.time_to_first_token if first else self._metrics.token_gap
        histogram.observe(now - self._last_token_at)
        self._last_token_at = now
        self._metrics.output_tokens.inc(len(delta.ids))
        self._outbox.put(self._index, delta)
        if delta.finish:
            self._end("finished")

    def fail(self, error: ApiError) -> None:
        if not self.ended:
            self._outbox.put(self._index, error)
            self._end("failed")

    def cancel(self) -> None:
        if not self.ended:
            self._end("cancelled")

    def _end(self, outcome: str) -> None:
        self.ended = True
        self._metrics.requests.labels(outcome=outcome).inc()


class Generations:
    """The choices of one HTTP request, as a context manager: leaving the block before the end tells the cluster that
    the client is gone."""

    def __init__(self, choices: Sequence[Generation], outbox: Outbox, on_close: Callable[[RequestId], None]) -> None:
        self._choices, self._outbox, self._on_close = choices, outbox, on_close

    @property
    def id(self) -> RequestId:
        """That of the first choice."""
        return self._choices[0].id

    async def next_ones(self) -> list[tuple[int, TextDelta]]:
        """The next texts, each with the number of its choice, which it ends if it has a finish; all that have come, so
        that a router that is behind writes once for all of it.

        Raises ApiError when one of the choices has failed. Waits no longer than the deadline of a request, which the
        core keeps.
        """
        return await self._outbox.take()

    def go_direct(self, way: Callable[[int, TextDelta], bool]) -> None:
        """See `Outbox`: ``way`` says whether it took the text."""
        self._outbox.direct = way

    def __enter__(self) -> "Generations":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._outbox.direct = None
        for choice in self._choices:
            choice.cancel()
            self._on_close(choice.id)


class OpenGenerations:
    """All that are open in this router. ``nonce`` sets its requests apart from those of others."""

    def __init__(self, nonce: int) -> None:
        self._nonce, self._num_ids = nonce, 0
        self._open: dict[RequestId, Generation] = {}
        self._none = asyncio.Event()  # set while none is open
        self._none.set()

    def new_id(self) -> RequestId:
        self._num_ids += 1
        return make_request_id(self._nonce, self._num_ids)

    def add(self, generation: Generation) -> None:
        self._open[generation.id] = generation
        self._none.clear()

    def get(self, id: RequestId) -> Generation | None:
        return self._open.get(id)

    def remove(self, id: RequestId) -> None:
        self._open.pop(id, None)
        if not self._open:
            self._none.set()

    def fail_all(self, error: ApiError) -> None:
        for generation in list(self._open.values()):
            generation.fail(error)

    async def wait_until_none(self, seconds: float) -> None:
        """Returns after ``seconds`` all the same."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._none.wait()

    async def wait_until_quiet(self, seconds: float) -> None:
        """None open, and none again for as long as a client needs to send its next request. Returns after ``seconds``
        all the same."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                num_ids = -1
                while num_ids != self._num_ids:
                    num_ids = self._num_ids
                    await self._none.wait()
                    await asyncio.sleep(_QUIET_S)
