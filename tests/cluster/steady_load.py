"""Clients whose streams are open all the time: a fault cannot come too late for them, however fast the cluster is.

Each asks for its request again as soon as it is answered; every third one for a few tokens only, so that there are
streams at every point of their lives. When what is done to the cluster is over, every client waits for some more
tokens, which shows that its stream goes on, and hangs up: requests may be long by a wide margin and cost nothing.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, TypeVar

import aiohttp

from services.cli.chat_client import Stream, new_session, run_stream
from tests.cluster.harness import STREAMS_S, outcome

_SHORT_TOKENS = 30
_BEFORE_TOKENS, _AFTER_TOKENS = 8, 16
_RUNNING_S, _GO_ON_S = 120.0, 120.0

Result = TypeVar("Result")


class Watched(Protocol):
    """A running cluster; `tests.cluster.harness.Cluster` is one."""

    @property
    def url(self) -> str: ...

    async def wait_status(self, what: Callable[[dict[str, Any]], bool], within_s: float = ...) -> dict[str, Any]: ...


@dataclass
class SteadyLoad:
    """``expected``: the fault-free streams, one for each client. ``begun_at``: of what was done, monotonic seconds."""

    url: str
    expected: list[Stream]
    begun_at: float = 0.0

    def __post_init__(self) -> None:
        self.of_client: list[list[Stream]] = [[] for _ in self.expected]

    @property
    def streams(self) -> list[Stream]:
        return [stream for streams in self.of_client for stream in streams]

    @property
    def num_in_course(self) -> int:
        """Streams that had tokens when it began, and got more afterwards."""
        return sum(1 for stream in self.streams if stream.times and stream.times[0] < self.begun_at < stream.times[-1])

    @property
    def largest_gap_s(self) -> float:
        return max((b - a for stream in self.streams for a, b in pairwise(stream.times)), default=0.0)

    async def ask_on(self, session: aiohttp.ClientSession, client: int) -> None:
        """Until it is cancelled, or a stream has failed."""
        body = self.expected[client].body
        if client % 3 == 2:
            body = {**body, "max_tokens": _SHORT_TOKENS}
        while not (self.of_client[client] and self.of_client[client][-1].error):
            self.of_client[client].append(Stream(body))
            await run_stream(session, self.url, self.of_client[client][-1])

    async def more_tokens(self, number: int, within_s: float) -> None:
        """Returns when every client has got that many from now on, or its stream has failed."""
        deadline, before = time.monotonic() + within_s, [self._num_tokens(client) for client in self._clients]
        while missing := [c for c in self._clients if self._num_tokens(c) < before[c] + number and not self._failed(c)]:
            assert time.monotonic() < deadline, f"the streams of clients {missing} got no {number} tokens more"
            await asyncio.sleep(0.005)

    @property
    def _clients(self) -> range:
        return range(len(self.expected))

    def _num_tokens(self, client: int) -> int:
        return sum(len(stream.logprobs) for stream in self.of_client[client])

    def _failed(self, client: int) -> bool:
        return any(stream.error for stream in self.of_client[client])

    def check(self) -> None:
        """Every stream is the fault-free one, or as much of it as its client has waited for; some were in course."""
        for client, wanted in enumerate(self.expected):
            for stream in self.of_client[client]:
                assert stream.error == "", f"a stream of client {client} failed: {stream.error}"
                assert is_as_far(stream, wanted), f"a stream of client {client} differs from the fault-free run"
        assert self.num_in_course > 0, "it met no stream in its course"


def is_as_far(stream: Stream, wanted: Stream) -> bool:
    """``stream`` ended as it should, or its client hung up; until then it was ``wanted``, bit by bit."""
    if stream.finish and len(stream.logprobs) == len(wanted.logprobs):
        return outcome(stream) == outcome(wanted)
    is_whole = not stream.finish or (stream.finish, len(stream.logprobs)) == ("length", stream.body["max_tokens"])
    hexes, wanted_hexes = outcome(stream)[1], outcome(wanted)[1]
    return is_whole and wanted_hexes[: len(hexes)] == hexes and wanted.text.startswith(stream.text)


async def under_load(
    cluster: Watched, expected: list[Stream], act: Callable[[], Awaitable[Result]], idle_ranks: Sequence[int] = ()
) -> tuple[Result, SteadyLoad]:
    """Does ``act`` while every rank (but perhaps ``idle_ranks``) runs streams; what that returned, and the load,
    with its streams checked."""
    load = SteadyLoad(cluster.url, expected)
    async with new_session(STREAMS_S) as session, asyncio.TaskGroup() as group:
        clients = [group.create_task(load.ask_on(session, client)) for client in range(len(expected))]
        await load.more_tokens(_BEFORE_TOKENS, _RUNNING_S)
        # Told by heartbeats, which come later than tokens do.
        await cluster.wait_status(
            lambda status: all(
                entry["running"] > 0 or entry["state"] != "serving" or entry["rank"] in idle_ranks
                for entry in status["ranks"]
            )
        )
        load.begun_at = time.monotonic()
        result = await act()
        await load.more_tokens(_AFTER_TOKENS, _GO_ON_S)
        for client in clients:
            client.cancel()
    load.check()
    return result, load
