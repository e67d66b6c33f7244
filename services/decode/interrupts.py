"""What must not wait for the end of a round. Pure.

The event loop's thread writes down what it hears; the stream's thread asks, in the wait for headers.
"""

from common.ids import Epoch
from common.messages import Message, Prepare, RollCall, View
from services.decode.membership import Membership


class Interrupts:
    """``is_stopping``: the process is asked to leave the group and end."""

    def __init__(self, membership: Membership) -> None:
        self._membership = membership
        self._newest_view = self._newest_roll_call = Epoch(0)
        self.is_stopping = False

    def on_message(self, message: Message) -> Epoch | None:
        """The last epoch in which waits have become pointless; None when none has."""
        match message:
            case View(epoch=epoch) | Prepare(view=View(epoch=epoch), base_epoch=0):
                self._newest_view = max(self._newest_view, epoch)
                return Epoch(epoch - 1)
            case RollCall(epoch=epoch):
                self._newest_roll_call = max(self._newest_roll_call, epoch)
                # Read before the question: an epoch that is entered in between must not be poisoned by its answer.
                current = self._membership.epoch
                return current if self._membership.counts_roll_call(epoch) else None
            case _:
                return None

    def must_stop(self, now: float) -> bool:
        """Whether the wait of the current epoch has to end."""
        membership = self._membership
        return (
            self.is_stopping
            or self._newest_view > membership.epoch
            or membership.counts_roll_call(self._newest_roll_call)
            or membership.is_lonely(now)
        )
