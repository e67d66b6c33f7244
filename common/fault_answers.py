"""How a publisher of a fault event hears how it ended: maps of kind ``fault`` on topic ``event`` with its id. Pure."""

from collections.abc import Mapping
from typing import Any

import msgspec

REPEAT_S = 0.1  # a fresh publisher loses its first messages, and repeats are harmless
ACCEPT_S = 45.0  # for a monitor that is being started again
_FINAL = ("done", "failed", "refused")
_MARGIN_S = 15.0  # over the monitor's own deadline, which late ticks put off: it shall say what is missing


class FaultAnswers:
    """``deadline``: nothing more is to be expected after it. A monitor that accepts the event names another one."""

    def __init__(self, identifier: object, now: float, accept_s: float = ACCEPT_S) -> None:
        self._identifier = identifier
        self.deadline = now + accept_s
        self.last = ""  # status heard of last

    def on_event(self, payload: bytes, now: float) -> dict[str, Any] | None:
        """The event when it says how the fault ended."""
        try:
            event = msgspec.msgpack.decode(payload)
        except msgspec.DecodeError:
            return None
        if not isinstance(event, dict) or event.get("kind") != "fault" or event.get("id") != self._identifier:
            return None
        status = str(event.get("status", ""))
        if status in _FINAL:
            return event
        seconds = event.get("deadline_s")
        if status != self.last and isinstance(seconds, int | float):
            self.deadline = now + seconds + _MARGIN_S
        self.last = status
        return None


def proof_of(answer: Mapping[str, Any]) -> str:
    """What was seen, or why nothing was done."""
    return str(answer.get("proof") or answer.get("error", ""))
