"""A fault event on its way from its acceptance to its proof."""

from dataclasses import dataclass

from common.fault import Fault
from common.ids import ProcessId
from common.messages import Injected

_NOBODY = ProcessId("")


@dataclass(slots=True)
class PendingFault:
    """``started_at``: None while it waits for its round; ``round`` is the group's when it was carried out."""

    fault: Fault
    asked_at: float
    process: ProcessId = _NOBODY
    pid: int = 0
    deadline_s: float = 0.0
    started_at: float | None = None
    round: int = 0
    sent_at: float | None = None
    routers: frozenset[ProcessId] = frozenset()  # those that were there when a restart began
    word: str = ""  # the agent's, of a signal
    said: Injected | None = None  # the process's own, of what it does to itself
