"""The promises, checked while the world runs, and what must hold when the faults are over.

* A client gets the tokens of an undisturbed model: exact, in order, once; and every accepted request completes.
* No observer's epoch falls within a life; two views never share a number.
* A slot has one living holder, and who held it before never commits again.
* A member is put out of the group only if something had happened to it.
* A rank tells of its tokens in time, whatever it waits for.
* Nobody waits for ever: some time after the last fault the group is whole and nobody holds anything.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from common.ids import NO_RANK, ProcessId, Rank, RequestId
from common.messages import Message, RollAnswer, TokenBatch, View, VoidReport
from common.view import digest, orphans, ranks
from services.decode.rank_state import RankState
from services.monitor.slots import SlotState
from services.monitor.takeover import Phase
from services.router.request_actions import Deliver
from tests.simulation.decode_node import DecodeNode
from tests.simulation.monitor_node import MonitorNode
from tests.simulation.prefill_node import PrefillNode
from tests.simulation.router_node import RouterNode
from tests.simulation.symbolic_model import NUM_EXPERTS, whole_output
from tests.simulation.world import Bad, World

_COUNTED = (
    "joined",
    "removed",
    "masked",
    "released",
    "roll_call",
    "term",
    "scaling",
    "scaled",
    "migration",
    "degraded",
    "join_paused",
)
_LATE_S = 0.6  # the pauses of a process apart; it may have been in one of up to 0.3 when its tokens became due
# By its own word, or of a process that the new monitor cannot know.
_NO_BLAME = ("left its slot", "not in the group by its own word")


@dataclass
class Client:
    router: ProcessId
    expected: tuple[int, ...]
    expected_finish: str
    received: list[int] = field(default_factory=list)
    finish: str = ""
    missed_experts: bool = False  # and was told so: its tokens from then on may be others


class Checker:
    def __init__(self, world: World, num_layers: int) -> None:
        self._world, self._num_layers = world, num_layers
        self.clients: dict[RequestId, Client] = {}
        self.counts: Counter[str] = Counter()  # of what happened in this story
        self._published = 0
        self._num_prompt_tokens: dict[ProcessId, int] = {}
        self._newcomers: dict[int, tuple[ProcessId, ...]] = {}  # of each view that was prepared
        self._digests: dict[int, int] = {}
        self._epochs: dict[str, int] = {}
        self._last_incarnation: dict[Rank, int] = {}  # that has committed
        self._last_event: dict[str, Any] = {}
        self._slot_given_at: dict[ProcessId, float] = {}
        self.longest_join_s = 0.0  # from its slot into the group, of those to whom nothing has happened
        self.sizes: dict[str, set[int]] = {}  # that were ever asked for, of the kinds whose number an agent keeps
        self._roll_call: tuple[int, tuple[ProcessId, ...]] | None = None  # epoch, who was called
        self._answered: dict[ProcessId, int] = {}  # epoch of the last answer or report
        # News that were due: when, since when it is known, and how long the process had paused by then.
        self._kept_back: dict[ProcessId, tuple[float, float, float]] = {}

    # Requests.

    def on_submit(self, request: RequestId, router: ProcessId, prompt: tuple[int, ...], max_tokens: int) -> None:
        self.clients[request] = Client(router, *whole_output(prompt, max_tokens, self._num_layers))

    def on_router_gone(self, router: ProcessId) -> None:
        """Its clients have lost their connection."""
        for request in [request for request, client in self.clients.items() if client.router == router]:
            if not self.clients[request].finish:
                self.on_client_gone(request)

    def on_client_gone(self, request: RequestId) -> None:
        del self.clients[request]
        self.counts["clients gone"] += 1

    def on_deliver(self, tokens: Deliver) -> None:
        client = self.clients.get(tokens.request)
        if client is None:
            raise Bad(f"tokens for {tokens.request}, whose client is gone")
        have = len(client.received)
        if client.finish:
            raise Bad(f"{tokens.request} got tokens after its end")
        if tokens.start != have:
            raise Bad(f"{tokens.request} got tokens from {tokens.start}, it had {have}")
        client.received += tokens.ids
        if tokens.missed_experts:
            self._on_missed_experts(client)
        for number in range(have, len(client.received)):
            if client.missed_experts:
                break
            if client.received[number : number + 1] != list(client.expected[number : number + 1]):
                raise Bad(f"WRONG TOKEN number {number} of {tokens.request}")
        client.finish = tokens.finish
        self.counts["tokens"] += len(tokens.ids)
        self.counts["requests"] += bool(tokens.finish)
        if tokens.finish:
            self._world.tell(f"{tokens.request[-4:]} done: {len(client.received)} tokens")
            exact = (client.expected, client.expected_finish)
            if not client.missed_experts and (tuple(client.received), tokens.finish) != exact:
                raise Bad(f"{tokens.request} ended after {len(client.received)} tokens with {tokens.finish}")

    def _on_missed_experts(self, client: Client) -> None:
        if not self.counts["degraded"]:
            raise Bad("tokens are marked as lacking experts, and no view ever lacked one")
        client.missed_experts = True
        self.counts["pieces that lack experts"] += 1

    # Commands.

    def on_scale(self, sizes: dict[str, int]) -> None:
        for kind, size in sizes.items():
            self.sizes.get(kind, set()).add(size)

    # Ranks.

    def on_tell(self, message: Message) -> None:
        """A rank tells the monitor something."""
        if isinstance(message, RollAnswer | VoidReport):
            self._answered[message.process] = max(self._answered.get(message.process, 0), message.epoch)

    def on_commit(self, node: DecodeNode, batch: TokenBatch) -> None:
        """Tokens leave a rank."""
        self.counts["commits"] += 1
        last = self._last_incarnation.get(batch.rank, 0)
        if batch.incarnation < last:
            raise Bad(f"{node.process} commits as {batch.rank}.{batch.incarnation} after {batch.rank}.{last}")
        self._last_incarnation[batch.rank] = batch.incarnation

    def on_beat(self, node: DecodeNode) -> None:
        """As often as a heartbeat: whatever can be seen of a rank."""
        membership = node.stream._membership
        if (view := membership.view) is not None:
            self._note_view(view)
            self.on_epoch(f"{node.process}/{membership.incarnation}", view.epoch)
        if node.stream._rank is not None:
            node.stream._rank.delivery.check_invariants()
            self._check_news(node, node.stream._rank.delivery.due_at)
            num_tokens = node.stream._rank.delivery.num_prompt_tokens
            self.counts["prompt tokens computed by ranks"] += num_tokens - self._num_prompt_tokens.get(node.process, 0)
            self._num_prompt_tokens[node.process] = num_tokens

    def _check_news(self, node: DecodeNode, due_at: float) -> None:
        """What was due at a beat has left at the next ones, unless the rank stands still."""
        now = self._world.now
        stands_still = node.task.is_hung or node.task.slowness > 1.0 or node.stopped_until > now
        if due_at > now or stands_still:
            self._kept_back.pop(node.process, None)
            return
        same, since, paused_s = self._kept_back.setdefault(node.process, (due_at, now, node.task.paused_s))
        if same != due_at:
            self._kept_back[node.process] = (due_at, now, node.task.paused_s)
        elif now - max(since, node.stopped_until) - (node.task.paused_s - paused_s) > _LATE_S:
            raise Bad(f"{node.process} has kept tokens back since {due_at:.3f}")

    def on_epoch(self, observer: str, epoch: int) -> None:
        """``observer``: a process, or a rank's life in one incarnation."""
        last = self._epochs.get(observer, 0)
        if epoch < last:
            raise Bad(f"{observer} went from epoch {last} back to {epoch}")
        self._epochs[observer] = epoch

    def _note_view(self, view: View) -> None:
        mine = digest(view)
        if self._digests.setdefault(view.epoch, mine) != mine:
            raise Bad(f"two views with epoch {view.epoch}")

    # The monitor.

    def on_published(self, view: View) -> None:
        self.counts["views"] += 1
        self._note_view(view)
        if view.epoch <= self._published:
            raise Bad(f"view {view.epoch} published after {self._published}")
        self._published = view.epoch
        self._check_roll_call(view)
        self._check_newcomers(view)
        num_local = len(view.placement.physical_to_logical[0][0])
        if len(view.members) * num_local >= NUM_EXPERTS and orphans(view.placement, ranks(view), NUM_EXPERTS):
            raise Bad(f"view {view.epoch} leaves experts without a copy although there is room")

    def _check_roll_call(self, view: View) -> None:
        """Whoever stays after a roll call has answered it, unless something else made this view meanwhile. A prepared
        view that comes into force during a roll call is not what ends it."""
        if self._roll_call is None or view.epoch in self._newcomers:
            return
        (epoch, called), self._roll_call = self._roll_call, None
        members = tuple(member.process for member in view.members)
        silent = [process for process in called if self._answered.get(process, 0) < epoch]
        if members == called and silent:
            raise Bad(f"view {view.epoch} keeps {silent}, who did not answer the roll call of {epoch}")

    def _check_newcomers(self, view: View) -> None:
        """A newcomer is told of only when it serves."""
        for member in view.members:
            entered = self._epochs.get(f"{member.process}/{member.incarnation}", 0)
            if member.process in self._newcomers.get(view.epoch, ()) and entered < view.epoch:
                raise Bad(f"view {view.epoch} is in force, and its newcomer {member.process} has not entered it")

    def on_event(self, monitor: MonitorNode, event: dict[str, Any]) -> None:
        shown = " ".join(f"{k}={v}" for k, v in event.items() if k not in ("type", "time", "kind", "since", "term"))
        self._world.tell(f"{monitor.process[:12]} {event['kind']}: {shown}")
        if event["kind"] in _COUNTED:
            self.counts[f"{event['kind']} {event.get('status', '')}".strip()] += 1
        if event["kind"] == "fault":
            self._last_event[event.get("id", "")] = event
        elif event["kind"] == "roll_call":
            self._roll_call = event["epoch"], tuple(member.process for member in monitor.core.group.members)
        elif event["kind"] == "term":
            self._roll_call = None
        elif event["kind"] == "slot_given":
            self._slot_given_at[event["process"]] = self._world.now
        elif event["kind"] == "joined" and not self._world.nodes[event["process"]].excuse:
            given_at = self._slot_given_at.get(event["process"], self._world.now)
            self.longest_join_s = max(self.longest_join_s, self._world.now - given_at)
        if event["kind"] != "removed" or event["evidence"] in _NO_BLAME:
            return
        if not self._world.nodes[event["process"]].excuse:
            raise Bad(f"healthy rank removed: {event['process']}, {event['evidence']}")

    def fault_status(self, id: str) -> str:
        return str(self._last_event.get(id, {}).get("status", ""))

    def on_monitor(self, monitor: MonitorNode) -> None:
        """After everything that the monitor has done."""
        core = monitor.core
        if core.phase is not Phase.ACTIVE:
            return
        current, prepared = core.group.current, core.group.prepared
        if prepared is not None:
            self._newcomers[prepared.view.epoch] = tuple(prepared.newcomers)
        if current is not None and prepared is not None and prepared.view.epoch <= current.epoch:
            raise Bad(f"prepared {prepared.view.epoch} while {current.epoch} is in force")
        for member in core.group.members:
            slot = core.slots.slots[member.rank]
            if (slot.process, slot.incarnation) != (member.process, member.incarnation):
                raise Bad(f"member {member.process} is not the holder of slot {member.rank}, {slot.process} is")

    def check_slots(self) -> None:
        """As often as is worth it: nobody living holds what another living process holds."""
        holders: dict[Rank, ProcessId] = {}
        for node in self._world.of_kind("decode"):
            assert isinstance(node, DecodeNode)
            membership = node.stream._membership
            if membership.rank == NO_RANK:
                continue
            other = holders.setdefault(membership.rank, node.process)
            if other != node.process:
                raise Bad(f"slot {membership.rank} is in the hands of {other} and {node.process}")

    # The end.

    def unsettled(self) -> str:
        """Empty when everything is done and everybody at rest; otherwise what is not."""
        return self._unsettled_requests() or self._unsettled_group() or self._leaks()

    def _unsettled_requests(self) -> str:
        for request, client in self.clients.items():
            if not client.finish:
                return f"{request} has {len(client.received)} of {len(client.expected)} tokens: {self._where(request)}"
        return ""

    def _where(self, request: RequestId) -> str:
        for node in self._world.of_kind("router"):
            if isinstance(node, RouterNode) and node.table and (found := node.table.request(request)):
                return f"{found.place}; " + "; ".join(found.machine.story()[-3:])
        return "no router knows it"

    def _unsettled_group(self) -> str:
        monitor = self._world.monitor
        if monitor is None or not monitor.is_running:
            return "no monitor"
        core = monitor.core
        view = core.group.current
        if core.phase is not Phase.ACTIVE or view is None or core.group.prepared or not core.group.is_adopted:
            return f"monitor {core.phase}, view {view and (view.epoch, ranks(view))}, prepared {core.group.prepared}"
        slots = [(slot.rank, slot.state.value, slot.process) for slot in core.slots.slots]
        if core.slots.in_state(SlotState.MASKED) or core.slots.in_state(SlotState.FENCING):
            return f"slots {slots}"
        if wrong := self._wrong_sizes(monitor):
            return wrong
        if len(view.members) != core.sizing.num_ranks:
            return f"view {view.epoch} has ranks {ranks(view)}; slots {slots}"
        for member in view.members:
            node = self._world.nodes[member.process]
            assert isinstance(node, DecodeNode)
            membership = node.stream._membership
            if membership.epoch != view.epoch or membership.state is not RankState.SERVING:
                return f"{node.process} is {membership.state} in {membership.epoch}, not {view.epoch}"
        for node in self._world.of_kind("router"):
            if isinstance(node, RouterNode) and (node.table is None or node.table.epoch != view.epoch):
                return f"{node.process} is at {node.table and node.table.epoch}, not {view.epoch}"
        return ""

    def _wrong_sizes(self, monitor: MonitorNode) -> str:
        """A scaling ends in a size that somebody has asked for, never in between, and so many processes run."""
        for kind, asked in self.sizes.items():
            wanted, num_running = monitor.core.sizing.wanted[kind], len(self._world.of_kind(kind))
            if wanted not in asked or num_running != wanted:
                return f"{num_running} of {kind} run, {wanted} are wanted; asked for were {sorted(asked)}"
        return ""

    def _leaks(self) -> str:
        for node in self._world.of_kind("decode"):
            rank = node.stream._rank if isinstance(node, DecodeNode) else None
            scheduler = rank.scheduler if rank else None
            if scheduler and (scheduler.num_running or scheduler.num_waiting or scheduler.blocks.num_used):
                return f"{node.process} still has {scheduler.num_running} running, {scheduler.num_waiting} waiting"
        for node in self._world.of_kind("prefill"):
            assert isinstance(node, PrefillNode)
            if (queue := node.queue) and queue.blocks.num_used > queue.prefixes.num_blocks:
                return f"{node.process} still has {queue.num_running} running"
        return ""
