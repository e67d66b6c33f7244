"""What the monitor wants done. Frozen values, performed by the shell in order."""

from dataclasses import dataclass, field
from typing import Any

from common.ids import ProcessId
from common.messages import Directory, Message, View
from services.monitor.event_log import EventLog


@dataclass(frozen=True, slots=True)
class Send:
    """To one process; the heartbeat thread of a process has an identity of its own."""

    process: ProcessId
    message: Message


@dataclass(frozen=True, slots=True)
class Publish:
    """On bus topic ``view``."""

    message: View | Directory


@dataclass(frozen=True, slots=True)
class Emit:
    """A plain map on bus topic ``event``."""

    event: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Exit:
    """Stop being the monitor: somebody else is, or the group is not the one of this configuration."""

    reason: str


Action = Send | Publish | Emit | Exit


@dataclass(slots=True)
class Outbox:
    """Actions in the order in which they were decided, and the log of events that `Emit` passes on."""

    events: EventLog
    _actions: list[Action] = field(default_factory=list)

    def send(self, process: ProcessId, message: Message) -> None:
        self._actions.append(Send(process, message))

    def publish(self, message: View | Directory) -> None:
        self._actions.append(Publish(message))

    def emit(self, kind: str, now: float, **fields: object) -> dict[str, Any]:
        event = self.events.record(kind, now, fields)
        self._actions.append(Emit(event))
        return event

    def repeat(self, event: dict[str, Any]) -> None:
        """An event that was recorded before goes out once more, under its old number."""
        self._actions.append(Emit(event))

    def exit(self, reason: str) -> None:
        self._actions.append(Exit(reason))

    def take(self) -> list[Action]:
        actions, self._actions = self._actions, []
        return actions
