"""A load generator in a process of its own: keeps a number of streams open until told to stop, and records each.

    python -m benchmarks.load_generator URL BODIES.json OUTPUT.json --streams 32

BODIES.json is a list of request bodies, used in turn. SIGTERM: no new streams, finish the open ones, write, exit. Times
are CLOCK_MONOTONIC seconds, which all processes of a host share.
"""

import argparse
import asyncio
import gc
import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.raw_stream import run_raw_stream
from services.cli.chat_client import Stream

ROOT = Path(__file__).resolve().parent.parent
_REQUEST_S = 300.0
_AFTER_ERROR_S = 0.05  # a server that is gone is not asked as often as a loop can


def bodies_for(model: str, count: int, max_tokens: int) -> list[dict[str, Any]]:
    """Greedy and seeded in turn; prompts of 5 token ids and more, no two alike."""
    bodies: list[dict[str, Any]] = []
    for number in range(count):
        sampling = {"temperature": 0.0} if number % 2 == 0 else {"temperature": 1.0, "seed": 1000 + number}
        prompt = [(7 * number + 13 * position) % 200 + 5 for position in range(5 + number)]
        request = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "logprobs": 0}
        bodies.append({**request, **sampling})
    return bodies


class LoadGenerator:
    """This module as a process that keeps the streams open."""

    def __init__(self, url: str, bodies: Path, output: Path, num_streams: int) -> None:
        self._output = output
        command = [sys.executable, "-m", "benchmarks.load_generator", url, str(bodies), str(output)]
        self._process = subprocess.Popen([*command, "--streams", str(num_streams)], cwd=ROOT)

    def finish(self) -> list[dict[str, Any]]:
        """No new streams; the records once the open ones have ended."""
        self._process.send_signal(signal.SIGTERM)
        if self._process.wait(timeout=300) != 0:
            raise RuntimeError("the load generator failed")
        records: list[dict[str, Any]] = json.loads(self._output.read_text())
        return records


async def generate(url: str, bodies: list[dict[str, Any]], num_streams: int) -> list[dict[str, Any]]:
    """One record for each request that was sent; ``body`` is its index in ``bodies``."""
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    numbers, records = itertools.count(), []
    async with asyncio.TaskGroup() as group:

        async def keep_one_open() -> None:
            index, is_lost = 0, False
            while not stopping.is_set():
                index = index if is_lost else next(numbers) % len(bodies)  # who was cut off asks the same again
                stream, sent = Stream(bodies[index]), time.monotonic()
                await run_raw_stream(url, stream, _REQUEST_S)
                records.append(_record(index, stream, sent))
                is_lost = bool(stream.error)
                if is_lost:
                    await asyncio.sleep(_AFTER_ERROR_S)

        for _ in range(num_streams):
            group.create_task(keep_one_open())
    return records


def _record(index: int, stream: Stream, sent: float) -> dict[str, Any]:
    return {
        "body": index,
        "sent": sent,
        "ended": time.monotonic(),
        "id": stream.id.partition("-")[2],
        "text": stream.text,
        "logprobs": [value.hex() for value in stream.logprobs],
        "times": stream.times,
        "sizes": stream.sizes,
        "finish": stream.finish,
        "error": stream.error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("bodies", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--streams", type=int, required=True)
    arguments = parser.parse_args()
    bodies = json.loads(arguments.bodies.read_text())
    gc.disable()  # nothing here makes cycles, and a collection holds up all streams
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        records = runner.run(generate(arguments.url, bodies, arguments.streams))
    arguments.output.write_text(json.dumps(records))


if __name__ == "__main__":
    main()
