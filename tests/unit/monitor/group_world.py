"""A whole group under a virtual clock: the real monitor, the real membership of decode ranks, everything else a model.

One `World` is one seeded run. Links keep the order of what they deliver, with random delays; a word is lost now and
then, as on a reconnect. Ranks make rounds together: one completes when every member of an epoch is there and serves;
who waits for a dead or stopped one gives up after the operation's deadline. Processes are killed, stopped and
continued; lifelines flap; the monitor is killed, or stopped, and started again. `World.check` holds all the while.
"""

import heapq
import random
from collections.abc import Callable
from typing import Any

import msgspec

from common.ids import NO_RANK, Epoch, ProcessId, Rank
from common.messages import (
    Message,
    Signal,
    View,
)
from common.view import digest, orphans, ranks
from services.decode.rank_state import RankState
from services.monitor.actions import Action, Emit, Exit, Publish, Send
from services.monitor.monitor import Monitor
from services.monitor.takeover import Phase
from tests.unit.monitor.group_nodes import (
    CONFIG,
    DEADLINE_S,
    NUM_EXPERTS,
    POLL_S,
    Agent,
    Bad,
    Client,
    MonitorNode,
    RankNode,
)


class World:
    def __init__(self, seed: int, loss: float = 0.005) -> None:
        self.random, self.now, self.loss = random.Random(seed), 0.0, loss
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = self._number = 0
        self._arrival: dict[tuple[str, str], float] = {}  # links keep their order
        self.first_headers: set[tuple[int, Rank]] = set()
        self.poisoned: set[int] = set()
        self.adopted: dict[int, int] = {}  # epoch -> digest of the view that somebody is in
        self.views: list[View] = []
        self.events: list[dict[str, Any]] = []
        self.log: list[str] = []
        self.clients: dict[ProcessId, Client] = {}
        self.ranks: list[RankNode] = []
        self.monitor = MonitorNode(self)
        self.router = Client(self, "router-0")
        self.agent = Agent(self, "agent-0")
        self.clients = {client.process: client for client in (self.router, self.agent)}
        for number in range(5):
            self.start_rank(f"decode-{number}")
        self.at(POLL_S, self.rounds)

    def next_number(self) -> int:
        self._number += 1
        return self._number

    def at(self, delay_s: float, action: Callable[[], None]) -> None:
        self.at_time(self.now + delay_s, action)

    def at_time(self, time_s: float, action: Callable[[], None]) -> None:
        """Equal times keep the order in which they were asked for."""
        self._order += 1
        heapq.heappush(self._queue, (time_s, self._order, action))

    def run_until(self, end_s: float) -> None:
        while self._queue and self._queue[0][0] <= end_s:
            self.now, _, action = heapq.heappop(self._queue)
            action()
        self.now = end_s

    def start_rank(self, name: str) -> None:
        rank = RankNode(self, name)
        self.ranks.append(rank)
        self.clients[rank.process] = rank

    # The network.

    def _delay(self) -> float:
        slow = self.random.random() < 0.05
        return self.random.uniform(0.02, 0.3) if slow else self.random.uniform(0.0005, 0.01)

    def _on_link(self, source: str, target: str, action: Callable[[], None], quick: bool = False) -> None:
        delay_s = 0.001 if quick else self._delay()
        arrival = max(self.now + delay_s, self._arrival.get((source, target), 0.0) + 1e-6)
        self._arrival[source, target] = arrival
        self.at_time(arrival, action)

    def tell_monitor(
        self, client: Client | None, event: Callable[[Monitor, float], list[Action]], lossy: bool = True
    ) -> None:
        """What is sent while there is no monitor is lost, but lifelines are opened again."""
        node = self.monitor
        if lossy and self.random.random() < self.loss:
            return

        def deliver() -> None:
            if node.is_alive:
                node.run(lambda: self.perform(node, event(node.core, self.now)))
            elif client is not None and not lossy and client.is_alive:
                self.at(0.05, client.connect)

        # Lifelines are the kernel's: as quick as the wire, and not lost.
        source = client.process if client else "kernel"
        self._on_link(source if lossy else f"lifeline of {source}", node.process, deliver, quick=not lossy)

    def perform(self, node: MonitorNode, wanted: list[Action]) -> None:
        for action in wanted:
            match action:
                case Send(process=process, message=message):
                    self._send_to(node, ProcessId(process.removesuffix("#beat")), message)
                case Publish(message=View() as view):
                    self.on_published(view)
                case Publish():
                    pass
                case Emit(event=event):
                    self.on_event(node, event)
                case Exit(reason=reason):
                    self.log.append(f"{self.now:.3f} monitor exits: {reason}")
                    self.kill_monitor()
        if node.core.phase is Phase.ACTIVE and node.is_alive:
            self.check(node.core)

    def _send_to(self, node: MonitorNode, process: ProcessId, message: Message) -> None:
        client = self.clients.get(process)
        if client is None or self.random.random() < self.loss:
            return
        target = client
        self._on_link(node.process, process, lambda: target.run(lambda: target.receive(message)))

    def forward(self, source: RankNode, view: View, endpoints: tuple[str, ...]) -> None:
        for endpoint in endpoints:
            target = self.clients.get(ProcessId(endpoint))
            if target is not None:
                self._on_link(source.process, endpoint, lambda target=target: target.run(lambda: target.receive(view)))  # type: ignore[misc]

    # Faults.

    def kill_rank(self, rank: RankNode) -> None:
        if rank.is_alive:
            self.log.append(f"{self.now:.3f} {rank.process} dies")
            rank.die()
            self.agent.on_death(rank)

    def on_signal(self, signal: Signal) -> None:
        rank = self.clients.get(signal.process)
        if isinstance(rank, RankNode):
            self.kill_rank(rank)

    def kill_monitor(self, restart_s: float = 0.5) -> None:
        if self.monitor.is_alive:
            self.monitor.is_alive = False
            self.at(restart_s, self._start_monitor)

    def _start_monitor(self) -> None:
        self.log.append(f"{self.now:.3f} monitor starts")
        self.monitor = MonitorNode(self)
        for client in self.clients.values():
            # Stopped processes connect too: the kernel queues what comes later.
            client.later(self.random.uniform(0.02, 0.52), client.connect)

    # The data path: rounds of all members of an epoch.

    def rounds(self) -> None:
        by_epoch: dict[int, list[RankNode]] = {}
        for rank in self.ranks:
            if rank.is_alive and rank.membership.is_member:
                by_epoch.setdefault(rank.membership.epoch, []).append(rank)
        for epoch, present in by_epoch.items():
            self._round(epoch, present)
        self.at(POLL_S, self.rounds)

    def _round(self, epoch: int, present: list[RankNode]) -> None:
        view = present[0].membership.view
        assert view is not None
        serving = [r for r in present if r.is_running and r.membership.state is RankState.SERVING]
        here = {rank.membership.rank for rank in serving}
        missing = tuple(rank for rank in ranks(view) if rank not in here)
        if not missing and epoch not in self.poisoned:
            self._clean_round(serving)
            return
        for rank in serving:
            rank.waits_for = missing
            rank.waiting_since = self.now if rank.waiting_since is None else rank.waiting_since
            if epoch in self.poisoned:
                rank.end_round_void(())
            elif self.now - rank.waiting_since > DEADLINE_S:
                rank.end_round_void(missing)

    def _clean_round(self, serving: list[RankNode]) -> None:
        staged = {rank.membership.staged_epoch for rank in serving}
        next_epoch = staged.pop() if len(staged) == 1 else Epoch(0)
        for rank in serving:
            if rank.membership.state is not RankState.SERVING:
                continue
            if self.random.random() < 0.0005:
                rank.end_round_void(())  # a hiccup
            else:
                rank.end_round(next_epoch)

    # Promises.

    def on_published(self, view: View) -> None:
        last = self.views[-1].epoch if self.views else 0
        if view.epoch <= last:
            raise Bad(f"view {view.epoch} published after {last}")
        self.views.append(view)
        num_local = len(view.placement.physical_to_logical[0][0])
        if len(view.members) * num_local >= NUM_EXPERTS and orphans(view.placement, ranks(view), NUM_EXPERTS):
            raise Bad(f"view {view.epoch} leaves experts without a copy although there is room")

    def on_adopted(self, view: View) -> None:
        if self.adopted.setdefault(view.epoch, digest(view)) != digest(view):
            raise Bad(f"two views with epoch {view.epoch}")

    def on_event(self, node: MonitorNode, event: dict[str, Any]) -> None:
        msgspec.msgpack.encode(event)  # what is no plain map fails here
        self.events.append(event)
        self.log.append(f"{self.now:.3f} {node.process} {event}")
        if event["kind"] != "removed" or event["evidence"] in ("left its slot", "not in the group by its own word"):
            return
        rank = self.clients[event["process"]]
        if not rank.is_faulty:
            raise Bad(f"healthy rank removed: {event}")

    def check(self, core: Monitor) -> None:
        holders: dict[Rank, ProcessId] = {}
        for rank in self.ranks:
            if rank.is_alive and rank.membership.rank != NO_RANK:
                other = holders.setdefault(rank.membership.rank, rank.process)
                if other != rank.process:
                    raise Bad(f"slot {rank.membership.rank} is in the hands of {other} and {rank.process}")
        current = core.group.current
        if current is not None and core.group.prepared is not None:
            assert core.group.prepared.view.epoch > current.epoch
        for member in core.group.members:
            slot = core.slots.slots[member.rank]
            assert (slot.process, slot.incarnation) == (member.process, member.incarnation)

    def settled(self) -> str:
        """Empty when the group is whole and works; otherwise what is wrong."""
        core = self.monitor.core
        view = core.group.current
        if view is None or len(view.members) != CONFIG.decode.num_ranks:
            return f"view {view and (view.epoch, ranks(view))}, phase {core.phase}"
        for member in view.members:
            rank = self.clients[member.process]
            assert isinstance(rank, RankNode)
            if rank.membership.epoch != view.epoch or rank.membership.state is not RankState.SERVING:
                return f"{rank.process} is {rank.membership.state} in {rank.membership.epoch}, not {view.epoch}"
        if self.router.view is None or self.router.view.epoch != view.epoch:
            return f"the router is at {self.router.view and self.router.view.epoch}"
        return ""
