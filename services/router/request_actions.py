"""What the router core asks its shell to do. Frozen values, so that tests compare lists with ``==``."""

from dataclasses import dataclass

import msgspec

from common.ids import ProcessId, RequestId
from common.messages import Message, TopLogprobs


@dataclass(frozen=True, slots=True)
class Send:
    """Put ``message`` on the link to ``peer``; if there is no such link, drop it."""

    peer: ProcessId
    message: Message


class Deliver(msgspec.Struct, frozen=True):
    """Outputs [start, start + len(ids)) of ``request``, each handed over exactly once and in order.

    ``logprobs`` and ``top_logprobs`` are empty or as long as ``ids``; ``prompt_logprobs``, if asked for, come with
    output 0 and cover all of the prompt but its first token. A non-empty ``finish`` ("stop" or "length") ends the
    request.
    """

    request: RequestId
    start: int
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: str = ""
    top_logprobs: tuple[TopLogprobs, ...] = ()
    prompt_logprobs: tuple[tuple[float, TopLogprobs], ...] = ()
    missed_experts: bool = False  # these outputs, or earlier ones, were computed without an expert


@dataclass(frozen=True, slots=True)
class Replaced:
    """The request lost or left its place and waits for attempt number ``attempt``. For logs and counters."""

    request: RequestId
    attempt: int
    reason: str


@dataclass(frozen=True, slots=True)
class Fail:
    """The request ends without its remaining tokens; ``status`` is an HTTP status."""

    request: RequestId
    status: int
    message: str


Action = Send | Deliver | Replaced | Fail
