"""Nothing from any member, any member's agent, or any prefill worker: that says more about the monitor than about them.

Its network may be cut. Then silence, and what was last said before it, are no evidence; nor are they right afterwards,
since TCP sends again ever more seldom: the first word of some comes as late as the cut was long, up to two minutes.
"""

from common.config import MonitorConfig
from common.messages import View
from services.monitor.actions import Outbox
from services.monitor.processes import ProcessTable

_TCP_AGAIN_S = 120.0  # at least so often TCP sends again what was not acknowledged (TCP_RTO_MAX of Linux)


class Deafness:
    def __init__(self, config: MonitorConfig, table: ProcessTable, outbox: Outbox) -> None:
        self._config, self._table, self._outbox = config, table, outbox
        self._since: float | None = None
        self._last_at = self._until = 0.0

    def look(self, view: View, now: float) -> bool:
        """To be called at every tick. Whether silence has to be forgiven."""
        if self._hears_nobody(view, now):
            if self._since is None:
                self._since = now
                self._outbox.emit(
                    "deaf", now, epoch=view.epoch, text="nobody is heard, so nobody is blamed for silence"
                )
            self._last_at = now
            self._until = now + min(now - self._since, _TCP_AGAIN_S) + self._config.heartbeat_timeout_s
        elif now >= self._until or self._are_all_back(view, now):
            self._since, self._until = None, now
        return now < self._until

    def _are_all_back(self, view: View, now: float) -> bool:
        """From then on silence speaks for itself again."""
        members = [process for member in view.members if (process := self._table.get(member.process))]
        return all(p.heard_at > self._last_at and self._table.is_live(p, now) for p in members)

    def _hears_nobody(self, view: View, now: float) -> bool:
        """For half the time that makes one of them suspect."""
        members = [process for member in view.members if (process := self._table.get(member.process))]
        names = {process.hello.agent for process in members}
        agents = [agent for agent in self._table.of_kind("agent") if agent.hello.name in names]
        patience_s = self._config.heartbeat_timeout_s / 2
        others = [*members, *agents, *self._table.of_kind("prefill")]
        return bool(members) and all(self._table.silence_s(process, now) > patience_s for process in others)
