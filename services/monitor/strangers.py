"""Those who knocked without the key of the cluster: counted one by one, told as an event now and then.

ZeroMQ (or the lifeline's challenge) has refused them before any word of theirs was read, so they changed nothing. An
event for each would let a stranger wash every other event out of the log.
"""

from services.monitor.actions import Outbox

EVENT_EVERY_S = 5.0


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
