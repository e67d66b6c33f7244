"""Questions that everybody asks of a view. Pure: a view is a value, and these are functions of it."""

import zlib
from itertools import chain

from common.ids import ProcessId, Rank
from common.messages import Member, Placement, View, encode


def member_of(view: View, process: ProcessId) -> Member | None:
    """The slot that ``process`` holds in ``view``, or None."""
    return next((member for member in view.members if member.process == process), None)


def ranks(view: View) -> tuple[Rank, ...]:
    return tuple(member.rank for member in view.members)


def newcomers(view: View, base: View | None) -> tuple[Member, ...]:
    """Members of ``view`` that are not in ``base`` under the same incarnation."""
    old = {(member.rank, member.incarnation) for member in base.members} if base else set()
    return tuple(member for member in view.members if (member.rank, member.incarnation) not in old)


def digest(view: View) -> int:
    """31 bits that differ when epoch, members or placement differ; every round header carries it (PROTOCOL 1.3)."""
    core = View(ProcessId(""), 0, view.epoch, view.members, view.placement)
    return zlib.crc32(encode(core)) & 0x7FFFFFFF


def has_orphans(view: View) -> bool:
    """Whether an expert that the placement knows, be it in the row of a vacant slot, has no copy on a member."""
    known = [set(chain.from_iterable(rows)) - {-1} for rows in view.placement.physical_to_logical]
    held = [
        {expert for member in view.members for expert in rows[member.rank]}
        for rows in view.placement.physical_to_logical
    ]
    return any(experts - copies for experts, copies in zip(known, held, strict=True))


def orphans(placement: Placement, members: tuple[Rank, ...], num_logical_experts: int) -> list[tuple[int, int]]:
    """(layer, logical expert) pairs without a copy on any of ``members``, in order."""
    missing = []
    for layer, rows in enumerate(placement.physical_to_logical):
        held = {expert for rank in members for expert in rows[rank]}
        missing += [(layer, expert) for expert in range(num_logical_experts) if expert not in held]
    return missing
