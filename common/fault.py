"""Fault events (docs/wire-protocol.md): what an outsider may publish on topic ``fault``, checked before it is believed.

A plain MessagePack map, so that any client can write one::

    {"type": "fault", "id": "k1", "action": "kill", "rank": 2}
    {"type": "fault", "id": "k2", "action": "kill", "process": "prefill-0"}
    {"type": "fault", "id": "k3", "action": "kill", "rank": 2, "at_round": 5000}
    {"type": "fault", "id": "p1", "action": "stop", "process": "monitor", "duration_s": 5.0}
    {"type": "fault", "id": "w1", "action": "slow", "rank": 2, "factor": 4.0}
    {"type": "fault", "id": "n1", "action": "drop_network", "rank": 2, "which": "all",
     "direction": "in", "duration_s": 9.0}
    {"type": "fault", "id": "c1", "action": "corrupt_heap", "rank": 2}
    {"type": "fault", "id": "s1", "action": "scale", "decode": 6, "prefill": 2}

``id`` is the publisher's: it repeats the event until it is acknowledged on topic ``event``, and repeats are harmless.
A key that is not known, or that the action has no use for, is an error: an injector that ignores a word would make a
wrong experiment look right.
"""

from typing import Any

import msgspec

from common.network_cut import DIRECTIONS, WHICH

ACTIONS_BY_RANK = ("mask", "unmask", "drain", "undrain", "corrupt_heap")
SIGNALS = ("kill", "term", "stop", "cont", "restart")  # what an agent does to one process
SELF_INFLICTED = ("slow", "drop_network", "corrupt_heap")  # done by the process itself, on the monitor's word
ACTIONS = (*SIGNALS, *ACTIONS_BY_RANK, "slow", "drop_network", "scale")
MAX_FACTOR, MAX_DURATION_S = 1000.0, 3600.0
MAX_CHILDREN = 64  # of one kind
_MAX_ID_LENGTH = 200
_COUNTS = ("decode", "prefill")
_OPTIONS_OF = {"slow": ("factor",), "drop_network": ("which", "direction", "duration_s"), "stop": ("duration_s",)}
_OPTIONS = ("factor", "which", "direction", "duration_s")
_KEYS = ("type", "id", "action", "rank", "process", "at_round", *_OPTIONS, *_COUNTS)


class Fault(msgspec.Struct, frozen=True):
    """Exactly one of ``rank`` and ``process`` is given; -1 and "" stand for none. ``scale`` has neither, but the wanted
    numbers of decode ranks and prefill workers, or one of the two; 0 leaves that one as it is.

    ``at_round``: carried out when the group has made that many rounds, 0 = at once. ``factor`` 1 ends a slowness.
    ``duration_s`` of a stop: then it is continued, 0 = by another event.
    """

    id: str
    action: str
    rank: int = -1
    process: str = ""
    decode: int = 0
    prefill: int = 0
    at_round: int = 0
    factor: float = 1.0
    which: str = ""
    direction: str = ""
    duration_s: float = 0.0

    @property
    def counts(self) -> dict[str, int]:
        """Kind of process -> wanted number, of the kinds that ``scale`` names."""
        return {kind: count for kind, count in (("decode", self.decode), ("prefill", self.prefill)) if count}

    @property
    def target(self) -> str:
        if self.action == "scale":
            return ", ".join(f"{kind} {count}" for kind, count in self.counts.items())
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
    if action == "scale":
        return _parse_scale(identifier, event)
    if counted := [key for key in _COUNTS if key in event]:
        raise FaultRefused(f"{counted[0]} goes with scale only", event)
    if idle := [key for key in _OPTIONS if key in event and key not in _OPTIONS_OF.get(action, ())]:
        raise FaultRefused(f"{action} takes no {idle[0]}", event)
    options = _parse_options(action, event)
    rank, process = event.get("rank"), event.get("process")
    if (rank is None) == (process is None):
        raise FaultRefused("give either rank or process", event)
    if action == "restart" and process is None:
        raise FaultRefused("restart needs a process: the name of a router", event)
    if rank is not None:
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
            raise FaultRefused(f"rank must be a whole number from 0, got {str(rank)[:40]!r}", event)
        return Fault(identifier, action, rank=rank, **options)
    if not isinstance(process, str) or not 0 < len(process) <= _MAX_ID_LENGTH:
        raise FaultRefused("process must be the name of a process, like prefill-0", event)
    if action in ACTIONS_BY_RANK:
        raise FaultRefused(f"{action} needs a rank", event)
    return Fault(identifier, action, process=process, **options)


def _parse_options(action: str, event: dict[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {"at_round": _at_round(event)}
    if action == "slow":
        options["factor"] = _number(event, "factor", 1.0, MAX_FACTOR)
    if action == "drop_network":
        options["which"] = _word(event, "which", WHICH)
        options["direction"] = _word(event, "direction", DIRECTIONS)
    if action == "drop_network" or "duration_s" in event:
        options["duration_s"] = _number(event, "duration_s", 0.0, MAX_DURATION_S)
    return options


def _at_round(event: dict[str, Any]) -> int:
    number = event.get("at_round", 0)
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise FaultRefused(f"at_round must be a whole number from 0, got {str(number)[:40]!r}", event)
    return number


def _number(event: dict[str, Any], key: str, least: float, most: float) -> float:
    value = event.get(key)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not least <= value <= most or value == 0:  # type: ignore[operator]
        raise FaultRefused(f"{key} must be a number from {least:g} to {most:g}, got {str(value)[:40]!r}", event)
    return float(value)  # type: ignore[arg-type]


def _word(event: dict[str, Any], key: str, words: tuple[str, ...]) -> str:
    value = event.get(key)
    if value not in words:
        raise FaultRefused(f"{key} must be one of {', '.join(words)}, got {str(value)[:40]!r}", event)
    return str(value)


def _parse_scale(identifier: str, event: dict[str, Any]) -> Fault:
    if "rank" in event or "process" in event:
        raise FaultRefused("scale takes decode and prefill, no rank and no process", event)
    if idle := [key for key in _OPTIONS if key in event]:
        raise FaultRefused(f"scale takes no {idle[0]}", event)
    counts = {kind: event[kind] for kind in _COUNTS if kind in event}
    if not counts:
        raise FaultRefused("scale needs decode or prefill: the number that is wanted", event)
    for kind, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_CHILDREN:
            text = f"{kind} must be a whole number from 1 to {MAX_CHILDREN}, got {str(count)[:40]!r}"
            raise FaultRefused(text, event)
    return Fault(identifier, "scale", at_round=_at_round(event), **counts)
