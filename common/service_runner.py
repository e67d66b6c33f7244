"""What every process does around its service: event loop, signals, logging, exit codes.

main thread --SIGTERM or SIGINT--> ``stop`` event set --service returns--> exit 0
            --second signal------> exit 1 at once
OperatorError --------------------> one line on stderr, exit 2: somebody must change something
any other exception --------------> traceback, exit 1: the agent tries again
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator

import uvloop


class OperatorError(ValueError):
    """Somebody who runs the cluster must change something; the text says what. Ends the process with exit code 2."""


@contextlib.contextmanager
def for_the_operator() -> Iterator[None]:
    """What is refused in here with a ValueError (a file, a checkpoint, a port) somebody who runs the cluster must mend:
    it becomes an `OperatorError`."""
    try:
        yield
    except OperatorError:
        raise
    except ValueError as error:
        raise OperatorError(str(error)) from error


def run_service(name: str, serve: Callable[[asyncio.Event], Awaitable[None]]) -> int:
    """Runs ``serve(stop)`` until it returns; it is asked to return by setting ``stop``. Returns the exit code."""
    logging.basicConfig(
        level=os.environ.get("REGROW_LOG", "INFO").upper(),
        format=f"%(asctime)s {name} %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve_until_signalled(serve))
    except* OperatorError as group:
        logging.getLogger("regrow").debug("refused", exc_info=True)
        print(f"regrow {name}: error: {_first_leaf(group)}", file=sys.stderr)
        return_code = 2
    else:
        return_code = 0
    return return_code


def _first_leaf(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def _serve_until_signalled(serve: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(1)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    await serve(stop)


def event_of_signal(number: signal.Signals) -> asyncio.Event:
    """Set when ``number`` comes. For the main thread."""
    event = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(number, event.set)
    return event


async def first_of(*events: asyncio.Event) -> None:
    """Waits until one of them is set."""
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
