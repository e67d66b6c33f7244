"""The placement that may come next: its experts are copied while the present one serves. Pure.

nothing --StagePlacement of this epoch, or a prepared view with another placement--> wanted --all copied--> staged
wanted, staged --a newer one--> wanted
wanted, staged --this rank enters another epoch, or leaves--> nothing
"""

from common.messages import Placement, StagePlacement, View


class NextPlacement:
    def __init__(self) -> None:
        self.wanted: Placement | None = None
        self.staged_version = 0

    @property
    def is_pending(self) -> bool:
        return self.wanted is not None and self.staged_version != self.wanted.version

    def on_stage(self, message: StagePlacement, view: View) -> bool:
        """True when there is something new to copy. What was sent in another epoch is dropped."""
        return message.base_epoch == view.epoch and self.want(message.placement)

    def want(self, placement: Placement) -> bool:
        if self.wanted is not None and placement.version <= self.wanted.version:
            return False
        self.wanted, self.staged_version = placement, 0
        return True

    def on_staged(self) -> None:
        """Every expert of the wanted placement that this rank is to hold is here."""
        if self.wanted is not None:
            self.staged_version = self.wanted.version

    def forget(self) -> None:
        self.wanted, self.staged_version = None, 0
