"""HTTP requests between the router core, which delivers tokens, and the handlers, which wait for text."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType

from common.ids import RequestId, make_request_id
from common.metrics import RouterMetrics
from services.router.api_error import ApiError
from services.router.request_actions import Deliver
from services.router.text_stream import TextDelta, TextStream

_QUIET_S = 0.2

# Bounded by max_tokens: there is at most one entry for each token of each choice.
Outbox = asyncio.Queue[tuple[int, TextDelta | ApiError]]


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
        delta = self._text.push(tokens.ids, tokens.logprobs, tokens.finish, tokens.top_logprobs, tokens.prompt_logprobs)
        histogram = self._metrics.time_to_first_token if first else self._metrics.token_gap
        histogram.observe(now - self._last_token_at)
        self._last_token_at = now
        self._metrics.output_tokens.inc(len(delta.ids))
        self._outbox.put_nowait((self._index, replace(delta, missed_experts=tokens.missed_experts)))
        if delta.finish:
            self._end("finished")

    def fail(self, error: ApiError) -> None:
        if not self.ended:
            self._outbox.put_nowait((self._index, error))
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

    async def next(self) -> tuple[int, TextDelta]:
        """The next text and the number of its choice, which it ends if it has a finish.

        Raises ApiError when one of the choices has failed. Waits no longer than the deadline of a request, which the
        core keeps.
        """
        index, delta = await self._outbox.get()
        if isinstance(delta, ApiError):
            raise delta
        return index, delta

    async def next_ones(self) -> list[tuple[int, TextDelta]]:
        """`next`, and what else has come since, so that a router that is behind writes once for all of it."""
        ready = [await self.next()]
        while not self._outbox.empty():
            index, delta = self._outbox.get_nowait()
            if isinstance(delta, ApiError):
                self._outbox.put_nowait((index, delta))  # it ends the stream, but after what came before it
                break
            ready.append((index, delta))
        return ready

    def __enter__(self) -> "Generations":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
