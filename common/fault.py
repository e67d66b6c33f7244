"""Fault events: what an outsider may publish on topic ``fault``, checked before anything believes it (DESIGN 10).

A plain MessagePack map, so that any client can write one::

    {"type": "fault", "id": "k1", "action": "kill", "rank": 2}
    {"type": "fault", "id": "k2", "action": "kill", "process": "prefill-0"}

``id`` is the publisher's: it repeats the event until it is acknowledged on topic ``event``, and repeats are harmless.
A key that is not known is an error: an injector that ignores ``at_round`` would make a wrong experiment look right.
"""

from typing import Any

import msgspec

ACTIONS_BY_RANK = ("mask", "unmask")
ACTIONS = ("kill", "term", "stop", "cont", *ACTIONS_BY_RANK)
_MAX_ID_LENGTH = 200
_KEYS = ("type", "id", "action", "rank", "process")


class Fault(msgspec.Struct, frozen=True):
    """Exactly one of ``rank`` and ``process`` is given; -1 and "" stand for none."""

    id: str
    action: str
    rank: int = -1
    process: str = ""

    @property
    def target(self) -> str:
        return f"rank {self.rank}" if self.rank >= 0 else self.process


class FaultRefused(ValueError):
    """The event changes nothing; the text says why. ``id`` and ``action`` as far as they could be read."""

    def __init__(self, reason: str, event: dict[str, Any] | None = None) -> None:
        super().__init__(reason)
        self.id, self.action = (_short(event or {}, key) for key in ("id", "action"))


def _short(event: dict[str, Any], key: str) -> str:
    value = event.get(key)
    return value[:_MAX_ID_LENGTH] if isinstance(value, str) else ""


def parse_fault(payload: bytes) -> Fault:
    """Raises `FaultRefused` on anything but a well-formed fault event."""
    try:
        event = msgspec.msgpack.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FaultRefused(f"not MessagePack: {error}") from None
    if not isinstance(event, dict) or event.get("type") != "fault":
        raise FaultRefused('a fault event is a map with "type": "fault"')
    if unknown := sorted(str(key)[:40] for key in event if key not in _KEYS):
        raise FaultRefused(f"unknown key {unknown[0]!r}; known: {', '.join(_KEYS)}", event)
    identifier, action = event.get("id"), event.get("action")
    if not isinstance(identifier, str) or not 0 < len(identifier) <= _MAX_ID_LENGTH:
        raise FaultRefused(f"id must be a string of 1 to {_MAX_ID_LENGTH} characters", event)
    if action not in ACTIONS:
        raise FaultRefused(f"unknown action {str(action)[:40]!r}; known: {', '.join(ACTIONS)}", event)
    rank, process = event.get("rank"), event.get("process")
    if (rank is None) == (process is None):
        raise FaultRefused("give either rank or process", event)
    if rank is not None:
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
            raise FaultRefused(f"rank must be a whole number from 0, got {str(rank)[:40]!r}", event)
        return Fault(identifier, action, rank=rank)
    if not isinstance(process, str) or not 0 < len(process) <= _MAX_ID_LENGTH:
        raise FaultRefused("process must be the name of a process, like prefill-0", event)
    if action in ACTIONS_BY_RANK:
        raise FaultRefused(f"{action} needs a rank", event)
    return Fault(identifier, action, process=process)
