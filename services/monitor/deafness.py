"""Nothing from any member, any member's agent, or any prefill worker: that says more about the monitor than about them.

Its network may be cut. Then silence, and what was last said before it, are no evidence; nor are they right afterwards,
since TCP sends again ever more seldom: the first word of some comes as late as the cut was long.
"""

from common.config import MonitorConfig
from common.messages import View
from services.monitor.actions import Outbox
from services.monitor.processes import ProcessTable


class Deafness:
    def __init__(self, config: MonitorConfig, table: ProcessTable, outbox: Outbox) -> None:
        self._config, self._table, self._outbox = config, table, outbox
        self._since: float | None = None
        self._until = 0.0

    def look(self, view: View, now: float) -> bool:
        """To be called at every tick. Whether silence has to be forgiven."""
        if self._hears_nobody(view, now):
            if self._since is None:
                self._since = now
                self._outbox.emit(
                    "deaf", now, epoch=view.epoch, text="nobody is heard, so nobody is blamed for silence"
                )
            self._until = now + (now - self._since) + self._config.heartbeat_timeout_s
        elif now >= self._until:
            self._since = None
        return now < self._until

    def _hears_nobody(self, view: View, now: float) -> bool:
        """For half the time that makes one of them suspect."""
        members = [process for member in view.members if (process := self._table.get(member.process))]
        names = {process.hello.agent for process in members}
        agents = [agent for agent in self._table.of_kind("agent") if agent.hello.name in names]
        patience_s = self._config.heartbeat_timeout_s / 2
        others = [*members, *agents, *self._table.of_kind("prefill")]
        return bool(members) and all(self._table.silence_s(process, now) > patience_s for process in others)
