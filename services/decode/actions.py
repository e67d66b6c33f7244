"""What the cores ask the shell to do. Frozen values, so that tests compare lists of them."""

from dataclasses import dataclass

from common.ids import Epoch, Incarnation, ProcessId, Rank
from common.messages import Message, Placement, View


@dataclass(frozen=True, slots=True)
class Send:
    """To a router or prefill worker that has written to us, by its identity."""

    peer: ProcessId
    message: Message


@dataclass(frozen=True, slots=True)
class Tell:
    """To the monitor."""

    message: Message


@dataclass(frozen=True, slots=True)
class ForwardView:
    """To the endpoints of other members, once: PUB/SUB loses messages (PROTOCOL 3.5)."""

    view: View
    endpoints: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SayHello:
    """Something that Hello carries has changed."""


@dataclass(frozen=True, slots=True)
class OpenSlot:
    """Make the end of the group for this slot, in the heap of this life."""

    rank: Rank
    incarnation: Incarnation


@dataclass(frozen=True, slots=True)
class CloseSlot:
    """Forget the slot. ``was_member``: poison the members, drop all requests, unlink the heap."""

    was_member: bool


@dataclass(frozen=True, slots=True)
class PoisonMembers:
    """End this rank's part in the current epoch: void from now on, and everybody told."""


@dataclass(frozen=True, slots=True)
class MapHeaps:
    """Map the heaps of all members of ``view``; the answer is the event `Membership.on_heaps_mapped`."""

    view: View


@dataclass(frozen=True, slots=True)
class LoadExperts:
    """Make every own expert slot equal to the view's placement."""

    view: View


@dataclass(frozen=True, slots=True)
class StageExperts:
    """Copy the experts of this placement beside those in use, in slices; the end is `NextPlacement.on_staged`."""

    placement: Placement


@dataclass(frozen=True, slots=True)
class Announce:
    """Write the first header of the prepared view into every member's heap (PROTOCOL 4.1)."""

    view: View


@dataclass(frozen=True, slots=True)
class Adopt:
    """Enter the epoch of ``view``. ``in_band``: at a round boundary together with all others, nobody is poisoned."""

    view: View
    in_band: bool


@dataclass(frozen=True, slots=True)
class WakeMembers:
    """This rank got work while all were at rest."""

    epoch: Epoch
    endpoints: tuple[str, ...]


# For the memory of this rank itself (`rank_life`); all others leave the process.
OwnAction = OpenSlot | CloseSlot | PoisonMembers | MapHeaps | LoadExperts | StageExperts | Announce | Adopt
Action = Send | Tell | ForwardView | SayHello | WakeMembers | OwnAction
