"""The group: its views, how they come about, and how ranks leave them. Whole states, never differences."""

import msgspec

from common.ids import Epoch, Incarnation, ProcessId, Rank
from common.messages.tagged import TaggedStruct


class Member(msgspec.Struct, frozen=True, array_like=True):
    """One slot of a view and the process that holds it."""

    rank: Rank
    incarnation: Incarnation
    process: ProcessId
    host: str
    endpoint: str  # address of its ROUTER socket
    heap: str  # descriptor by which peers map its heap
    agent: str = ""  # name of the agent that can end it


class Placement(msgspec.Struct, frozen=True, array_like=True):
    """``physical_to_logical[layer][rank][local]``: logical expert in that expert slot, -1 = empty.

    ``layer`` counts mixture-of-experts layers only; ``rank`` runs over all max_ranks slots, members or not: the row
    of a vacant slot says what the next process in it will load. Versions come from the monitor's epoch counter.
    """

    version: int
    physical_to_logical: tuple[tuple[tuple[int, ...], ...], ...]


class View(TaggedStruct, frozen=True):
    """monitor -> everyone, also rank -> rank. Receivers ignore any view with ``epoch`` <= the one they hold."""

    monitor: ProcessId
    term: int
    epoch: Epoch
    members: tuple[Member, ...]  # sorted by rank
    placement: Placement
    reason: str = ""


class Prepare(TaggedStruct, frozen=True):
    """monitor -> members and newcomers: the view that comes next if all get ready. A higher epoch drops it."""

    view: View
    base_epoch: Epoch  # the epoch that it grows from; 0 at formation


class StagePlacement(TaggedStruct, frozen=True):
    """monitor -> members, repeated: copy the experts that this placement gives you, beside those in use.

    It binds nobody, and any other epoch ends it. That it is sent at all says that every member has reported the
    placement of ``base_epoch``: what only older placements need may be overwritten (PROTOCOL 8.3). When all have
    reported it staged, it comes into force as a prepared view of the same members.
    """

    monitor: ProcessId
    term: int
    base_epoch: Epoch
    placement: Placement


class VoidReport(TaggedStruct, frozen=True):
    """decode -> monitor: this epoch is void here; repeated by the heartbeat state."""

    process: ProcessId
    rank: Rank
    incarnation: Incarnation
    epoch: Epoch
    step: int
    accused: tuple[int, ...] = ()


class RollCall(TaggedStruct, frozen=True):
    """monitor -> members: poison your wait, drain your stream, answer."""

    monitor: ProcessId
    term: int
    epoch: Epoch


class RollAnswer(TaggedStruct, frozen=True):
    """decode -> monitor: the stream is drained."""

    process: ProcessId
    rank: Rank
    incarnation: Incarnation
    epoch: Epoch
    placement_version: int
    accused: tuple[int, ...] = ()


class SlotLeft(TaggedStruct, frozen=True):
    """decode -> monitor: stream drained, slot given back; the process goes on as a standby."""

    process: ProcessId
    rank: Rank
    incarnation: Incarnation
    epoch: Epoch


class Wake(TaggedStruct, frozen=True):
    """decode -> decode: a rank got work in this epoch; start rounds."""

    epoch: Epoch
