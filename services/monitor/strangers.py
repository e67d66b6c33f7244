"""Those who are not what they would pass for: counted one by one, told as an event now and then.

Without the key of the cluster, ZeroMQ (or the lifeline's challenge) refuses them before any word of theirs is read. In
a cluster without a key, who speaks for a process over a connection that is not its own is refused here. An event for
each would let a stranger wash every other event out of the log.
"""

from common.ids import ProcessId
from common.messages import Heartbeat, Hello, Message, RollAnswer, SlotLeft, VoidReport
from services.monitor.actions import Outbox

BEAT_SUFFIX = "#beat"  # identity of a process's heartbeat thread
EVENT_EVERY_S = 5.0


def is_impostor(peer: ProcessId, message: Message) -> bool:
    """Whether ``message`` tells of a process that is not ``peer``, the identity of the connection it came over. It
    stops who errs, not who lies: an identity is a name that anybody may give without a key."""
    match message:
        case Hello() | Heartbeat() | VoidReport() | RollAnswer() | SlotLeft():
            return message.process != peer.removesuffix(BEAT_SUFFIX)
        case _:
            return False


class Strangers:
    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._told_at: dict[tuple[str, str], float] = {}
        self.num_refused = 0

    def on_stranger(self, door: str, reason: str, now: float) -> None:
        """``door``: which of the monitor's sockets."""
        self.num_refused += 1
        told_at = self._told_at.get((door, reason))
        if told_at is None or now - told_at >= EVENT_EVERY_S:
            self._told_at[door, reason] = now
            self._outbox.emit("unauthorised", now, door=door, reason=reason, refused=self.num_refused)
