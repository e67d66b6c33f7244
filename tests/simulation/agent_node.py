"""The agent's shell: starts, reaps and signals the processes of the world with the real cores of `services.agent`."""

from collections.abc import Callable, Sequence

from common.config import ClusterConfig
from common.ids import ProcessId
from common.messages import Exited, Heartbeat, Hello, Message, SetChildren, Signal, Welcome
from services.agent import signal_requests, supervisor
from services.agent.exit_reports import ExitReports
from services.agent.signal_requests import Answer, Deliver, SignalRequests
from services.agent.supervisor import GiveUp, Kill, Spawn, Supervisor
from tests.simulation.client import ClientNode
from tests.simulation.router_node import RouterNode
from tests.simulation.world import Bad, Frames, Node, World

_TICK_S = 0.05
_PIDFD_S = 0.002

Start = Callable[[str, str, ProcessId], Node]


class AgentNode(ClientNode):
    """``start_process``: (name, kind, process) -> node. ``wanted``: the file in which it writes down how many children
    of a kind there should be; empty where it may not change their number."""

    kind = "agent"

    def __init__(
        self, world: World, names: Sequence[str], config: ClusterConfig, start_process: Start, wanted: dict[str, int]
    ) -> None:
        super().__init__(world, "agent-0")
        self._start_process, self._wanted = start_process, wanted
        self._supervisor = Supervisor(names, config, world.random, world.now)
        self._requests, self._reports = SignalRequests(), ExitReports()
        self._num_routers = sum(name.startswith("router-") for name in names)
        self._take_over()
        for kind, count in wanted.items():
            self._perform(self._supervisor.on_set_children(kind, count, (), world.now))
        self._supervisor.keep_routers(self._num_routers)
        world.death_watchers.append(self._on_pidfd)
        self._tick()

    def _take_over(self) -> None:
        """Children and heaps that a former life of this agent left."""
        for node in self.world.nodes.values():
            if not node.is_alive:
                self.world.memory.remove_files_of(node)
                continue
            if node.name not in self._supervisor.children and (node.kind in self._wanted or node.kind == "router"):
                self._supervisor.add(node.name, self.world.now)
            if node.name in self._supervisor.children:
                self._supervisor.on_spawned(node.name, node.process, self.world.next_pid(), self.world.now)

    def hello(self) -> Hello:
        children = tuple((child.process, child.name, child.pid) for child in self._supervisor.alive)
        return Hello(self.process, "agent", self.name, "h", 1, "", children=children)

    def heartbeat(self) -> Heartbeat:
        counters: dict[str, int] = {}
        for kind, count in self._wanted.items():
            children = self._supervisor.num_wanted_children(kind)
            counters |= {f"wanted_{kind}": count, f"children_{kind}": children}
        return Heartbeat(self.process, term=self.obedience.term, counters=counters)

    def on_message(self, peer: ProcessId, message: Message, frames: Frames) -> None:
        match message:
            case Signal(process=process):
                is_alive = self._supervisor.by_process(process) is not None
                self._answer(self._requests.on_request(message, is_alive, self.world.now))
            case SetChildren(kind=kind, count=count, retire=retire) if kind in self._wanted:
                self._wanted[kind] = count
                self._perform(self._supervisor.on_set_children(kind, count, retire, self.world.now))
            case Welcome(config=config):
                self._supervisor.configure(config)
            case _:
                pass

    def _tick(self) -> None:
        now = self.world.now
        self._answer(self._requests.on_tick(now))
        for report in self._reports.on_tick(now):
            self.tell_monitor(report)
        self._perform(self._supervisor.on_tick(now))
        self.later(_TICK_S, self._tick)

    def _perform(self, wanted: Sequence[supervisor.Action]) -> None:
        for action in wanted:
            match action:
                case Spawn(name=name, kind=kind, process=process):
                    self._supervisor.on_spawned(name, process, self.world.next_pid(), self.world.now)
                    self.world.tell(f"{process} starts")
                    self._start_process(name, kind, process)
                case Kill(name=name, signal=signal):
                    self._signal(self._supervisor.children[name].process, signal)
                case GiveUp(name=name, reason=reason):
                    raise Bad(f"the agent gives {name} up: {reason}")

    def _signal(self, process: ProcessId, signal: str) -> None:
        """Stops of processes are the schedule's business, which knows their end."""
        node = self.world.nodes.get(process)
        if node is None:
            return
        if signal == "KILL":
            node.die(f"signal {signal}")
        elif signal == "TERM":
            node.run(node.terminate)
        elif signal == "USR1":
            assert isinstance(node, RouterNode)
            node.run(node.retire)
        elif signal == "CONT":
            node.stopped_until = self.world.now
        else:
            raise Bad(f"the agent is asked for signal {signal}")

    def _on_pidfd(self, node: Node, reason: str) -> None:
        self.later(_PIDFD_S, lambda: self._on_exit(node, reason))

    def _on_exit(self, node: Node, reason: str) -> None:
        child = self._supervisor.by_process(node.process)
        if child is None:
            return
        now, reason = self.world.now, reason.partition(",")[0]
        for report in self._reports.on_exit(Exited(self.name, node.process, node.name, child.pid, reason), now):
            self.tell_monitor(report)
        self._answer(self._requests.on_exit(node.process, reason))
        self.world.memory.remove_files_of(node)
        self._perform(self._supervisor.on_exit(node.name, reason, now))
        self._supervisor.keep_routers(self._num_routers)

    def _answer(self, wanted: Sequence[signal_requests.Action]) -> None:
        for action in wanted:
            match action:
                case Answer(message=message):
                    self.tell_monitor(message)
                case Deliver(process=process, signal=signal_requests.RESTART):
                    self._perform(self._supervisor.on_restart(process, self.world.now))
                case Deliver(process=process, signal=signal):
                    if signal in ("KILL", "TERM"):
                        self._supervisor.on_asked_to_kill(process)
                    self._signal(process, signal)
