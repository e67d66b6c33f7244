"""What a decode rank tells the monitor about itself: a snapshot that other threads may read. Pure."""

import msgspec

from common.ids import NO_RANK, Epoch, Incarnation, ProcessId, Rank
from common.messages import Heartbeat, Hello, View
from services.decode.membership import Membership


class RankStatus(msgspec.Struct, frozen=True):
    """Replaced as a whole, so nobody sees half of a change. ``life`` numbers the heaps of this process."""

    state: str = "standby"
    rank: Rank = NO_RANK
    incarnation: int = 0
    view: View | None = None
    out_of: int = 0
    life: int = 0
    staged_placement: int = 0
    misses: tuple[int, ...] = ()

    @classmethod
    def of(cls, membership: Membership, life: int, misses: tuple[int, ...] = ()) -> "RankStatus":
        return cls(
            "masked" if membership.masked and not membership.view else membership.state.value,
            membership.rank,
            membership.incarnation,
            membership.view,
            membership.out_of,
            life,
            membership.next_placement.staged_version,
            misses,
        )

    def heartbeat(
        self, process: ProcessId, term: int, progress: int, waits_for: tuple[int, ...], counters: dict[str, int]
    ) -> Heartbeat:
        return Heartbeat(
            process=process,
            rank=self.rank,
            incarnation=Incarnation(self.incarnation),
            term=term,
            epoch=self.view.epoch if self.view else Epoch(0),
            state=self.state,
            progress=progress,
            waits_for=waits_for if self.state == "serving" else (),
            placement_version=self.view.placement.version if self.view else 0,
            out_of=Epoch(self.out_of),
            counters=counters,
            staged_placement=self.staged_placement,
            misses=self.misses,
        )

    def hello(self, process: ProcessId, name: str, host: str, pid: int, endpoint: str, agent: str, heap: str) -> Hello:
        """A member says which slot it holds; one that was never let in has none yet."""
        return Hello(
            process=process,
            kind="decode",
            name=name,
            host=host,
            pid=pid,
            endpoint=endpoint,
            agent=agent,
            heap=heap,
            rank=self.rank if self.view else NO_RANK,
            incarnation=Incarnation(self.incarnation if self.view else 0),
            view=self.view,
            masked=self.state == "masked",
        )
