"""``regrow demo``: what this project is for, in one minute.

1. start a cluster, stream all requests side by side without a fault, keep text and log-probabilities;
2. stream them again, and in the middle kill, over the bus, the rank that serves most of them;
3. watch the view without it, its successor join, all streams end; compare every stream with the first run.

Clients are not told which streams were on the killed rank. Its number of running requests right before the kill is
known, and as many streams with the longest gaps after the kill are counted as its own.
"""

import asyncio
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.fault_answers import proof_of
from common.messages import View
from services.cli.chat_client import Stream, model_name, new_session, run_streams
from services.cli.cluster_state import fetch_cluster
from services.cli.fault import FaultClient, fault_event
from services.cli.run_directory import monitor_address
from services.cli.temporary_cluster import ClusterDidNotStart, temporary_cluster
from services.cli.view_watch import watch_views

_STREAMS_S = 240.0
_REJOIN_S = 120.0
_PROGRESS_S = 0.5


@dataclass(frozen=True, slots=True)
class DemoOptions:
    decode_ranks: int
    num_streams: int
    model: Path


class DemoFailed(Exception):
    """Something took too long or went wrong before streams could be compared; the text says what."""


def demo(options: DemoOptions) -> int:
    """0 only if every stream of the run with the fault equals that of the run without."""
    signal.signal(signal.SIGTERM, _exit_in_order)
    code = 1
    with tempfile.TemporaryDirectory(prefix="regrow-demo-") as directory:
        run_dir = Path(directory).resolve() / "run"
        try:
            _say(f"starts a cluster with {options.decode_ranks} decode ranks")
            with temporary_cluster(run_dir, options.model, options.decode_ranks, 1) as url:
                _say(f"ready: {url}")
                code = asyncio.run(_show(options, url, run_dir))
        except* (DemoFailed, ClusterDidNotStart) as failures:
            print(f"regrow demo: error: {_first(failures)}", file=sys.stderr)
    return code


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _exit_in_order(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


async def _show(options: DemoOptions, url: str, run_dir: Path) -> int:
    async with new_session(30.0) as session:
        model = await model_name(session, url)
    bodies = _bodies(model, options)
    expected = [Stream(body) for body in bodies]
    _say(f"{len(bodies)} requests side by side, without a fault")
    await run_streams(url, expected, len(bodies), _STREAMS_S)
    if failed := [stream.error for stream in expected if stream.error]:
        raise DemoFailed(f"a request failed without any fault: {failed[0]}")
    actual = [Stream(body) for body in bodies]
    _say("the same requests again, and a kill in the middle")
    address = monitor_address(run_dir)
    async with watch_views(address) as views:
        show = _Show(url, FaultClient(address), expected, actual, views)
        async with asyncio.TaskGroup() as group:
            group.create_task(run_streams(url, actual, len(bodies), _STREAMS_S))
            group.create_task(show.progress())
            group.create_task(show.kill_and_watch())
    return show.report()


def _bodies(model: str, options: DemoOptions) -> list[dict[str, Any]]:
    """Greedy and seeded ones in turn. The embedded model counts, so that a lost token shows; another one just talks."""
    bodies = []
    for number in range(options.num_streams):
        sampling = {"temperature": 0.0} if number % 2 == 0 else {"temperature": 1.0, "seed": 1000 + number}
        if model == "abacus":
            first = 100 + 17 * number
            prompt = f"count from {first} to {first + 139}"
            task: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}], "logprobs": True}
        else:
            ids = [(7 * number + 13 * position) % 200 + 5 for position in range(5 + number)]
            task = {"prompt": ids, "logprobs": 0, "ignore_eos": True}
        bodies.append({"model": model, "max_tokens": 500, **task, **sampling})
    return bodies


class _Show:
    """The run with the fault: what is done to it, and what is seen of it."""

    def __init__(
        self,
        url: str,
        bus: FaultClient,
        expected: Sequence[Stream],
        actual: Sequence[Stream],
        views: list[tuple[float, View]],
    ) -> None:
        self._url, self._bus, self._expected, self._actual, self._views = url, bus, expected, actual, views
        self._killed_at = 0.0
        self._num_on_victim = 0
        self._removed_s = self._back_s = 0.0
        self._is_done = False

    async def progress(self) -> None:
        total, started = sum(stream.num_tokens for stream in self._expected), time.monotonic()
        while not self._is_done:
            await asyncio.sleep(_PROGRESS_S)
            done = sum(stream.num_tokens for stream in self._actual)
            num_open = sum(not stream.is_over for stream in self._actual)
            members = f", {len(self._views[-1][1].members)} ranks" if self._views else ""
            _say(f"{time.monotonic() - started:5.1f} s  {done}/{total} tokens, {num_open} streams open{members}")

    async def kill_and_watch(self) -> None:
        try:
            with self._bus:
                await self._kill_and_watch()
        finally:
            self._is_done = True

    async def _kill_and_watch(self) -> None:
        await _until(self._is_in_the_middle, _STREAMS_S, "streams did not get going")
        cluster = await asyncio.to_thread(fetch_cluster, self._url)
        victim = max((r for r in cluster["ranks"] if r["state"] == "serving"), key=lambda rank: int(rank["running"]))
        rank, incarnation, self._num_on_victim = victim["rank"], victim["incarnation"], int(victim["running"])
        _say(f"kills rank {rank} (pid {victim['pid']}), which serves {self._num_on_victim} of the streams")
        self._killed_at = time.monotonic()
        answer = await asyncio.to_thread(self._bus.inject, fault_event("kill", rank, None))
        if answer["status"] != "done":
            raise DemoFailed(f"the kill did not take effect: {proof_of(answer)}")

        def seen(is_it: Callable[[View], bool]) -> float | None:
            return next((at for at, view in self._views if at > self._killed_at and is_it(view)), None)

        def is_removed(view: View) -> bool:
            return all(member.incarnation != incarnation for member in view.members)

        def is_back(view: View) -> bool:
            return any(member.rank == rank and member.incarnation > incarnation for member in view.members)

        await _until(lambda: seen(is_removed) is not None, 30.0, f"rank {rank} stayed in the view")
        self._removed_s = (seen(is_removed) or 0.0) - self._killed_at
        _say(f"rank {rank} is out of the view after {_ms(self._removed_s)}; proof: {proof_of(answer)}")
        await _until(lambda: seen(is_back) is not None, _REJOIN_S, f"rank {rank} did not come back")
        self._back_s = (seen(is_back) or 0.0) - self._killed_at
        _say(f"rank {rank} serves again after {self._back_s:.1f} s")
        await _until(lambda: all(stream.is_over for stream in self._actual), _STREAMS_S, "streams did not end")

    def _is_in_the_middle(self) -> bool:
        pairs = zip(self._expected, self._actual, strict=True)
        return all(actual.is_over or actual.num_tokens * 5 >= expected.num_tokens for expected, actual in pairs)

    def report(self) -> int:
        gaps = sorted((stream.largest_gap_s(self._killed_at) for stream in self._actual), reverse=True)
        on_victim, elsewhere = gaps[: self._num_on_victim], gaps[self._num_on_victim :]
        same = sum(a.is_same(e) for a, e in zip(self._actual, self._expected, strict=True))
        fault_free = max(stream.largest_gap_s(0.0) for stream in self._expected)
        print()
        print(f"kill -> view without the rank        {_ms(self._removed_s)}")
        print(f"largest gap, streams of that rank    {_ms(max(on_victim, default=0.0))}  ({len(on_victim)} streams)")
        print(f"largest gap, all other streams       {_ms(max(elsewhere, default=0.0))}  ({len(elsewhere)} streams)")
        print(f"largest gap without a fault          {_ms(fault_free)}")
        print(f"kill -> the rank serves again        {self._back_s:.1f} s")
        print(f"streams equal to the fault-free run  {same} of {len(self._actual)}")
        for number, (actual, expected) in enumerate(zip(self._actual, self._expected, strict=True)):
            if not actual.is_same(expected):
                print(f"stream {number}: {actual.error or _first_difference(actual.text, expected.text)}")
        return 0 if same == len(self._actual) else 1


def _first_difference(actual: str, expected: str) -> str:
    position = next((i for i, (a, b) in enumerate(zip(actual, expected, strict=False)) if a != b), None)
    if position is None:
        if len(actual) == len(expected):
            return "same text, other log-probabilities"
        position = min(len(actual), len(expected))
    around = slice(max(0, position - 20), position + 20)
    return f"differs at character {position}: {actual[around]!r} in place of {expected[around]!r}"


async def _until(condition: Callable[[], bool], within_s: float, otherwise: str) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            raise DemoFailed(f"{otherwise} within {within_s:.0f} s")
        await asyncio.sleep(0.005)


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"


def _say(text: str) -> None:
    print(text, flush=True)
