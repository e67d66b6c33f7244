"""What every process does around its service: event loop, signals, logging, exit codes.

main thread --SIGTERM or SIGINT--> ``stop`` event set --service returns--> exit 0
            --second signal------> exit 1 at once
OperatorError or ValueError ------> one line on stderr, exit 2
"""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable

import uvloop


class OperatorError(ValueError):
    """Somebody who runs the cluster must change something; the text says what. Ends the process with exit code 2."""


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
    except* ValueError as group:
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
