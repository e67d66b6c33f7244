"""How a publisher of a fault event hears how it ended: the map of kind ``fault`` on topic ``event`` with its id."""

from collections.abc import Mapping
from typing import Any

import msgspec

REPEAT_S = 0.1  # a fresh publisher loses its first messages, and repeats are harmless
DEADLINE_S = 45.0
SCALE_DEADLINE_S = 150.0  # longer than the monitor's own, which says what is missing
_FINAL = ("done", "failed", "refused")


def final_answer(payload: bytes, identifier: object) -> dict[str, Any] | None:
    """The event when it says how the fault with this id ended."""
    try:
        event = msgspec.msgpack.decode(payload)
    except msgspec.DecodeError:
        return None
    is_final = (
        isinstance(event, dict)
        and event.get("kind") == "fault"
        and event.get("id") == identifier
        and event.get("status") in _FINAL
    )
    return event if is_final else None


def proof_of(answer: Mapping[str, Any]) -> str:
    """What was seen, or why nothing was done."""
    return str(answer.get("proof") or answer.get("error", ""))
