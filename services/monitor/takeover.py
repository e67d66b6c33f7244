"""The start of a monitor: is there a group already, and what do those who live it say? (PROTOCOL 3.3, 3.4)

    LISTENING --LISTEN_S--> GATHERING --all heard, or heartbeat_timeout_s--> ACTIVE
                   (no word of an earlier term: straight to ACTIVE)

No number is given out before ACTIVE: neither slot nor view.

Why `LISTEN_S` suffices to tell a fresh cluster: a survivor of an earlier monitor sends heartbeats every heartbeat_s =
0.1 s from a thread of its own, and its socket tries to reconnect at least every 0.5 s plus jitter of 0.02 s; the
heartbeats that piled up meanwhile go out at once. So every survivor that runs at all is heard within 0.6 s. One that
was stopped in that very second reports a term that is not below this monitor's when it wakes, and then this monitor
exits for one that opens a higher term. A second costs a fresh cluster nothing: its ranks still import torch.

GATHERING is needed because views come with Hello only, and a process greets again only when it has seen the new term,
or when it is told that it is not known: so it is as long as its heartbeats show a view that its Hello did not.
"""

from enum import Enum

from common.config import MonitorConfig
from common.ids import Epoch
from common.messages import Heartbeat, Hello, View
from common.state_machine import StateMachine, transition_table
from services.monitor.processes import ProcessTable, has_moved_on
from services.monitor.terms import EpochCounter
from services.monitor.ticks import TickClock

LISTEN_S = 1.0
_GATHER_AT_LEAST_S = 0.3  # a few heartbeats: each is answered with the new term, and that with a Hello


class Phase(Enum):
    LISTENING = "listening"
    GATHERING = "gathering"
    ACTIVE = "active"


MOVES = transition_table(
    {
        Phase.LISTENING: {Phase.GATHERING, Phase.ACTIVE},
        Phase.GATHERING: {Phase.ACTIVE},
        Phase.ACTIVE: set(),
    }
)


class Takeover:
    def __init__(
        self, config: MonitorConfig, counter: EpochCounter, table: ProcessTable, clock: TickClock, now: float
    ) -> None:
        self._config, self._counter, self._table, self._clock = config, counter, table, clock
        self._machine = StateMachine("start of the monitor", MOVES, Phase.LISTENING, now)
        self._started_at = self._opened_at = now
        self._heard_term, self._heard_epoch = 0, Epoch(0)
        self.best: View | None = None  # highest view that anybody has shown

    @property
    def phase(self) -> Phase:
        return self._machine.state

    @property
    def is_fresh(self) -> bool:
        """Nobody knows of an earlier monitor."""
        return self._heard_term == 0 and self._heard_epoch == 0 and self.best is None

    def on_heartbeat(self, beat: Heartbeat) -> None:
        highest = max(beat.epoch, beat.out_of, beat.incarnation, beat.placement_version, beat.staged_placement)
        self._heard(beat.term, Epoch(highest))

    def on_hello(self, hello: Hello) -> None:
        view = hello.view
        if view is not None:
            self._heard(view.term, max(view.epoch, Epoch(view.placement.version)))
            if self.best is None or view.epoch > self.best.epoch:
                self.best = view
        self._heard(0, Epoch(hello.incarnation))

    def _heard(self, term: int, epoch: Epoch) -> None:
        self._heard_term, self._heard_epoch = max(self._heard_term, term), max(self._heard_epoch, epoch)
        self._counter.heard(term)
        self._counter.heard(epoch)

    def on_tick(self, now: float) -> bool:
        """True when the phase has changed; the term is then open."""
        if self.phase is Phase.LISTENING and self._clock.elapsed(self._started_at, now) >= LISTEN_S:
            self._counter.open_term()
            self._opened_at = now
            self._machine.move(Phase.ACTIVE if self.is_fresh else Phase.GATHERING, now)
            return True
        if self.phase is Phase.GATHERING and self._has_gathered(now):
            self._machine.move(Phase.ACTIVE, now)
            return True
        return False

    def outgrown(self) -> bool:
        """GATHERING: somebody knows a term or number that the open term is not above. Opens a higher one."""
        term = self._counter.term
        if self.phase is not Phase.GATHERING or (self._heard_term <= term and self._heard_epoch < term):
            return False
        self._counter.open_term()
        return True

    def _has_gathered(self, now: float) -> bool:
        waited_s = self._clock.elapsed(self._opened_at, now)
        if waited_s >= self._config.heartbeat_timeout_s:
            return True
        unshown = any(has_moved_on(process) for process in self._table.of_kind("decode"))
        if waited_s < _GATHER_AT_LEAST_S or self._table.strangers or unshown:
            return False
        if self.best is None:
            return self._heard_epoch == 0
        known = set(self._table.gone) | {process.id for process in self._table.all()}
        return all(member.process in known for member in self.best.members)
