"""What goes wrong in a story, and when. Two or more faults may fall together; afterwards everything is mended."""

from collections.abc import Callable, Sequence
from random import Random

import msgspec

from common.network_cut import DIRECTIONS, WHICH
from tests.simulation.client import ClientNode
from tests.simulation.decode_node import DecodeNode
from tests.simulation.world import MONITOR, ON_A_BROKEN_CABLE, Node, World

_REPEAT_S = 0.5


class Faults:
    """``plan`` draws them; ``end`` mends what does not mend by itself, and may be called again. ``chosen``: the only
    ones that happen, each as often as it is named."""

    def __init__(self, world: World, random: Random, chosen: Sequence[str] = ()) -> None:
        self._world, self._random = world, random
        self._num_events = 0
        self._unmask_at = 0.0
        self._kinds: list[tuple[float, Callable[[], None]]] = [
            (3.0, self._kill_rank),
            (1.5, self._kill_rank_at_a_step),
            (1.5, self._stop_rank),
            (1.5, self._stop_rank_at_a_step),
            (0.7, self._hang_stream),
            (0.7, self._slow_rank),
            (0.3, self._break_path),
            (0.7, self._kill_prefill),
            (0.3, self._kill_all_prefill),
            (0.4, self._stop_prefill),
            (0.7, self._kill_monitor),
            (0.7, self._kill_monitor_at_a_step),
            (0.7, self._stop_monitor),
            (0.5, self._stop_agent),
            (0.5, self._kill_agent),
            (0.4, self._kill_router),
            (0.3, self._stop_router),
            (0.7, self._flap),
            (1.2, self._cut_data_link),
            (0.5, self._cut_monitor_link),
            (1.5, self._mask),
            (0.7, self._drain),
            (2.5, self._scale),
            (0.2, self._stop_everything),
            (0.5, self._zombie),
        ]
        if chosen:
            methods = [getattr(self, "_" + name.replace(" ", "_")) for name in chosen]
            self._kinds = [(1.0, method) for method in methods]

    def plan(self, from_s: float, to_s: float) -> None:
        random = self._random
        for _ in range(random.choice((1, 1, 2, 3, 5))):
            at_s = random.uniform(from_s, to_s)
            self._world.at_time(at_s, self._any)
            while random.random() < 0.35:  # a second one while the first is being dealt with
                at_s = min(at_s + random.choice((0.0, 0.02, 0.1, 0.5, 2.0)) * random.random(), to_s)
                self._world.at_time(at_s, self._any)

    def end(self) -> None:
        """Unmasks whatever is masked, again and again, as an operator with a script would."""
        monitor = self._world.monitor
        if monitor is None or not monitor.is_running or self._world.now < self._unmask_at:
            return
        self._unmask_at = self._world.now + 2.0
        for slot in monitor.core.slots.slots:
            if slot.state.value == "masked":
                self._publish("unmask", rank=slot.rank)

    def _any(self) -> None:
        weights = [weight for weight, _ in self._kinds]
        _, fault = self._random.choices(self._kinds, weights)[0]
        num_lines = len(self._world.lines)
        fault()
        if len(self._world.lines) > num_lines:  # it was told, so it took effect
            self._world.num_faults[fault.__name__.strip("_").replace("_", " ")] += 1

    def _pick(self, kind: str) -> Node | None:
        found = [node for node in self._world.of_kind(kind) if node.is_running]
        return self._random.choice(found) if found else None

    def _pick_member(self) -> DecodeNode | None:
        """A rank that is in the group or on its way, if there is one."""
        ranks = [node for node in self._world.of_kind("decode") if isinstance(node, DecodeNode) and node.is_running]
        placed = [node for node in ranks if node.stream._membership.rank >= 0]
        return self._random.choice(placed or ranks) if ranks else None

    def _seconds(self) -> float:
        return self._random.choice((0.05, 0.3, self._random.uniform(0.5, 2.5), self._random.uniform(2.0, 9.0)))

    # Ranks.

    def _kill_rank(self) -> None:
        if node := self._pick_member():
            node.die()

    def _kill_rank_at_a_step(self) -> None:
        if node := self._pick_member():
            node.task.steps_to_live = self._random.randint(1, 60)
            node.excuse = node.excuse or "killed"
            self._world.tell(f"{node.process} will die at its {node.task.steps_to_live}. store")

    def _stop_rank(self) -> None:
        if node := self._pick_member():
            node.stop_for(self._seconds())

    def _stop_rank_at_a_step(self) -> None:
        if node := self._pick_member():
            node.task.steps_to_stop = (self._random.randint(1, 60), self._seconds())
            self._world.tell(f"{node.process} will stop at its {node.task.steps_to_stop[0]}. store")

    def _slow_rank(self) -> None:
        """Everything that it waits for takes longer to be noticed."""
        if node := self._pick_member():
            factor, seconds = self._random.choice((2.0, 5.0, 10.0, 40.0)), self._seconds()
            node.task.slowness, node.excuse = factor, node.excuse or "slow"
            self._world.tell(f"{node.process} is {factor:g} times slower for {seconds:.2f} s")
            self._world.at(seconds, lambda: setattr(node.task, "slowness", 1.0))

    def _break_path(self) -> None:
        """What one rank writes no longer arrives in the memory of another until one of them has another heap; or both
        ways."""
        one, other = self._pick_member(), self._pick_member()
        if one is None or other is None or one is other:
            return
        pairs = [(one, other), (other, one)][: self._random.choice((1, 2))]
        for writer, owner in pairs:
            self._world.broken_paths[writer.process, owner.process] = (writer.life, owner.life)
            self._world.tell(f"what {writer.process} writes no longer reaches {owner.process}")
        for node in (one, other):
            node.excuse = node.excuse or "on a broken path"

    def _break_cable(self) -> None:
        """What one rank writes no longer arrives in the memory of another, nor what their next lives write, for longer
        than it takes both to come back; or both ways."""
        one, other = self._pick_member(), self._pick_member()
        if one is None or other is None or one is other:
            return
        until = self._world.now + self._random.uniform(10.0, 40.0)
        for writer, owner in [(one, other), (other, one)][: self._random.choice((1, 2))]:
            self._world.broken_cables[writer.name, owner.name] = until
            self._world.tell(f"what {writer.name} writes will not reach {owner.name} until {until:.2f}")
        for node in self._world.of_kind("decode"):
            if node.name in (one.name, other.name):
                node.excuse = node.excuse or ON_A_BROKEN_CABLE

    def _hang_stream(self) -> None:
        """Heartbeats go on."""
        if node := self._pick_member():
            node.task.is_hung, node.excuse = True, node.excuse or "hung"
            seconds = self._seconds()
            self._world.tell(f"the stream of {node.process} hangs for {seconds:.2f} s")
            self._world.at(seconds, lambda: setattr(node.task, "is_hung", False))

    def _zombie(self) -> None:
        """A rank stopped in mid-store whose agent is away: nobody can fence it, and it wakes up late."""
        node, agent = self._pick_member(), self._pick("agent")
        if node is not None and agent is not None:
            seconds = self._random.uniform(4.0, 9.0)
            node.task.steps_to_stop = (self._random.randint(1, 40), seconds)
            self._world.tell(f"{node.process} will stop at its {node.task.steps_to_stop[0]}. store")
            agent.stop_for(seconds + self._random.uniform(0.1, 3.0))

    def _mask(self) -> None:
        self._put_out("mask", "unmask")

    def _drain(self) -> None:
        self._put_out("drain", "undrain")

    def _put_out(self, do: str, undo: str) -> None:
        monitor = self._world.monitor
        if monitor is None or not monitor.core.group.members:
            return
        member = self._random.choice(monitor.core.group.members)
        self._world.nodes[member.process].excuse = "masked"
        self._publish(do, rank=member.rank)
        self._world.at(self._random.uniform(0.2, 4.0), lambda: self._publish(undo, rank=member.rank))

    def _scale(self) -> None:
        """To any size that there is room for, often in the middle of another scaling."""
        monitor, random = self._world.monitor, self._random
        if monitor is None:
            return
        sizes = {"decode": random.randint(2, monitor.config.decode.max_ranks)}
        if random.random() < 0.4:
            sizes["prefill"] = random.randint(1, 3)
        if random.random() < 0.2:
            del sizes["decode"]
            sizes["prefill"] = random.randint(1, 3)
        for node in self._world.of_kind("decode"):
            node.excuse = node.excuse or "not wanted any more"
        self._world.checker.on_scale(sizes)
        self._publish("scale", **sizes)

    def _publish(self, action: str, **fields: int | float | str) -> None:
        """A fault event, repeated until it is answered."""
        self._num_events += 1
        id = f"{action}-{self._num_events}"
        self._world.tell(f"fault event {id}: {action} {fields}")
        payload = msgspec.msgpack.encode({"type": "fault", "id": id, "action": action, **fields})

        def publish(again: int) -> None:
            if again and not self._world.checker.fault_status(id):
                if self._world.monitor is not None and self._world.random.random() < 0.7:
                    self._world.monitor.on_fault(payload)
                self._world.at(_REPEAT_S, lambda: publish(again - 1))

        publish(10)

    # Others.

    def _kill_prefill(self) -> None:
        if node := self._pick("prefill"):
            node.die()

    def _kill_all_prefill(self) -> None:
        for node in self._world.of_kind("prefill"):
            node.die()

    def _stop_prefill(self) -> None:
        if node := self._pick("prefill"):
            node.stop_for(self._seconds())

    def _kill_monitor(self) -> None:
        if node := self._pick(MONITOR):
            node.die()

    def _kill_monitor_at_a_step(self) -> None:
        """Some of the next words that it wants to say leave it, and the others never do."""
        monitor = self._world.monitor
        if monitor is not None and monitor.is_running:
            monitor.steps_to_live = self._random.randint(0, 40)
            self._world.tell(f"{monitor.process} will die after {monitor.steps_to_live} more words")

    def _stop_monitor(self) -> None:
        if node := self._pick(MONITOR):
            node.stop_for(self._seconds())

    def _stop_agent(self) -> None:
        if node := self._pick("agent"):
            node.stop_for(self._seconds())

    def _kill_agent(self) -> None:
        """Its children go on without it."""
        if node := self._pick("agent"):
            node.die()

    def _kill_router(self) -> None:
        if node := self._pick("router"):
            node.die()

    def _stop_router(self) -> None:
        if node := self._pick("router"):
            node.stop_for(self._seconds())

    def _replace_router(self) -> None:
        """As ``regrow restart`` does."""
        if self._world.monitor is not None and (node := self._pick("router")):
            self._publish("restart", process=node.name)

    def _corrupt_heap(self) -> None:
        self._hurt_itself("corrupt_heap")

    def _drop_network(self) -> None:
        which, direction = self._random.choice(WHICH), self._random.choice(DIRECTIONS)
        self._hurt_itself("drop_network", which=which, direction=direction, duration_s=self._random.uniform(0.5, 5.0))

    def _hurt_itself(self, action: str, **fields: str | float) -> None:
        monitor = self._world.monitor
        if monitor is not None and monitor.core.group.members:
            self._publish(action, rank=self._random.choice(monitor.core.group.members).rank, **fields)

    def _stop_everything(self) -> None:
        seconds = self._random.uniform(0.5, 6.0)
        for node in list(self._world.nodes.values()):
            if node.is_alive:
                node.stop_for(seconds + self._random.uniform(0.0, 0.2))

    def _flap(self) -> None:
        node = self._pick("decode") or self._pick("prefill")
        if isinstance(node, ClientNode):
            node.flap()

    def _cut_data_link(self) -> None:
        """One way or both, between any two that talk to each other."""
        kinds = [("router", "decode"), ("prefill", "decode"), ("decode", "decode"), ("router", "prefill")]
        one, other = (self._pick(kind) for kind in self._random.choice(kinds))
        if one is not None and other is not None and one is not other:
            self._cut(one.process, other.process)

    def _cut_monitor_link(self) -> None:
        node = self._pick(self._random.choice(("router", "prefill", "decode", "decode", "agent")))
        if node is not None:
            node.excuse = node.excuse or "cut off"
            self._cut(node.process, MONITOR)

    def _cut(self, one: str, other: str) -> None:
        seconds, way = self._seconds(), self._random.random()
        if way < 0.7:
            self._world.cut(one, other, seconds)
        if way > 0.3:
            self._world.cut(other, one, seconds)
