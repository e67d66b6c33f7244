"""The monitor as a whole: one event in, a list of actions out. Pure; `services.monitor.service` does the I/O.

It greets processes, answers them, keeps the directory, starts by learning what its predecessor left (`takeover`), and
hands everything that concerns the group to `membership`.
"""

from common.config import ClusterConfig
from common.ids import Epoch, ProcessId
from common.messages import (
    AskStatus,
    AskView,
    Exited,
    ExpertLoad,
    Heartbeat,
    HeartbeatReply,
    Hello,
    Injected,
    Message,
    PlacementPlan,
    Refusal,
    RollAnswer,
    SignalDone,
    SlotLeft,
    Status,
    VoidReport,
    Worker,
)
from services.monitor.actions import Action, Outbox
from services.monitor.cluster_status import ClusterStatus
from services.monitor.deafness import Deafness
from services.monitor.directory import DirectoryKeeper
from services.monitor.emptying import Emptying
from services.monitor.event_log import EventLog
from services.monitor.expert_load import ExpertBalance
from services.monitor.expert_map import ExpertMap
from services.monitor.failure_detector import FailureDetector
from services.monitor.fault_desk import FaultDesk
from services.monitor.fences import Fences
from services.monitor.group import Group
from services.monitor.join_paths import JoinPaths
from services.monitor.joining import Joining
from services.monitor.lifelines import Lifelines
from services.monitor.membership import Membership
from services.monitor.migration import Migration
from services.monitor.placement_status import PlacementStatus
from services.monitor.processes import Process, ProcessTable, has_moved_on
from services.monitor.reception import Reception
from services.monitor.recovery import recover
from services.monitor.removals import Removals
from services.monitor.sizing import Sizing
from services.monitor.slots import SlotTable
from services.monitor.slow_ranks import SlowRanks
from services.monitor.strangers import BEAT_SUFFIX, Strangers, is_impostor
from services.monitor.takeover import Phase, Takeover
from services.monitor.terms import EpochCounter
from services.monitor.ticks import TickClock
from services.monitor.void_rounds import VoidRounds


class Monitor:
    """``myself`` is its own directory entry, ``bus`` the addresses for people, ``num_moe_layers`` and
    ``num_logical_experts`` describe the model. Times are monotonic seconds."""

    def __init__(
        self,
        myself: Worker,
        config: ClusterConfig,
        num_moe_layers: int,
        num_logical_experts: int,
        now: float,
        wall_offset_s: float = 0.0,
        bus: dict[str, str] | None = None,
    ) -> None:
        self.id, self.config = myself.process, config
        settings = config.monitor
        self.events = EventLog(wall_offset_s)
        self._outbox = Outbox(self.events)
        self._clock = TickClock(settings.late_tick_s, now)
        self._lifelines = Lifelines(self._clock, settings.lifeline_suspicion_s)
        self.table = ProcessTable(self._clock, self._lifelines, settings.heartbeat_timeout_s)
        self.slots = SlotTable.of_size(config.decode.max_ranks, now)
        self.counter = EpochCounter()
        detector = FailureDetector(settings, self.table, self._clock)
        experts = ExpertMap(config.decode, num_moe_layers, num_logical_experts)
        self.group = Group(self.id, settings, self.counter, experts, self.table, detector, self._outbox)
        self.fences = Fences(self.table, self._outbox, self._clock)
        self.sizing = Sizing(self.id, config, self.table, self.slots, self.group, self.fences, self._outbox)
        paths = JoinPaths(settings, self.table, self._outbox, self._clock)
        self.joining = Joining(
            config, self.counter, self.table, self.slots, self.group, self.sizing,
            self.fences, paths, self._outbox, self._clock,
        )  # fmt: skip
        self.migration = Migration(self.id, config, self.counter, self.table, self.group, self._outbox, self._clock)
        emptying = Emptying(settings, self.group, self.migration, self._clock)
        self.removals = Removals(settings, self.table, self.slots, self.group, self.joining, self.fences, self._outbox)
        void_rounds = VoidRounds(
            self.id, settings, self.counter, self.group, self.joining, self.removals, self._outbox, self._clock
        )
        self.membership = Membership(
            config, self.table, self.slots, self.group, self.joining, paths, self.sizing, emptying, self.fences,
            self._lifelines, detector, self.removals, void_rounds,
            SlowRanks(settings, self.table, self._clock), Deafness(settings, self.table, self._outbox),
        )  # fmt: skip
        self._faults = FaultDesk(
            self.id, config, self.table, self.slots, self.group, self.membership, self.sizing, self._outbox, self._clock
        )
        self._takeover = Takeover(settings, self.counter, self.table, self._clock, now)
        self.directory = DirectoryKeeper(myself, self.table, self.slots, self.group)
        self._reception = Reception(
            self.id, config, self.counter, self.table, self.slots, self.group, self.joining, self.fences,
            self.membership, self._takeover, self.directory, self._outbox,
        )  # fmt: skip
        self._load = ExpertBalance(num_moe_layers, num_logical_experts, config.planner.replica_policy)
        self._strangers = Strangers(self._outbox)
        self._status = ClusterStatus(
            self.sizing, myself, bus or {}, self.table, self.slots, self.group, self.directory,
            PlacementStatus(self.group, self.table, self._load, self.migration), self.events, self._strangers,
        )  # fmt: skip
        self._given_up: dict[ProcessId, int] = {}

    @property
    def phase(self) -> Phase:
        return self._takeover.phase

    # Events.

    def on_message(self, peer: ProcessId, message: Message, now: float) -> list[Action]:
        """``peer``: the identity it came from. What is not for a monitor is ignored."""
        if is_impostor(peer, message):
            return self.on_stranger("control", "speaks for another process", now)
        process = self.table.get(ProcessId(peer.removesuffix(BEAT_SUFFIX)))
        if process is not None and not isinstance(message, Injected):  # which passes a cut network
            process.heard_at = now
        match message:
            case Heartbeat():
                self._on_heartbeat(message, peer, now)
            case Hello():
                # A word that outlived its process, or that tells of a monitor that has taken over.
                is_void = message.process in self.table.gone
                if not is_void and not (message.view is not None and self._outranked(message.view.term)):
                    self._reception.on_hello(message, now)
            case AskView():
                self.group.tell(peer, self.directory.message)
            case AskStatus(id=number):
                self._outbox.send(peer, Status(number, self._status.body(self.phase.value, self.counter.term, now)))
            case Exited():
                self._on_exited(message, now)
            case SignalDone():
                self._on_signal_done(message, now)
            case Injected():
                self._faults.on_injected(message, now)
            case PlacementPlan():
                if reason := self._on_plan(message, now):
                    self._outbox.send(peer, Refusal(f"placement plan refused: {reason}"))
            case VoidReport() | RollAnswer() | SlotLeft() if self.phase is Phase.ACTIVE:
                self._on_word_of_rank(message, now)
            case SlotLeft():
                self.table.on_slot_left(message.process)
            case _:
                pass
        return self._settle(now)

    def on_lifeline_opened(self, process: ProcessId, connection: int, now: float) -> list[Action]:
        """``connection`` numbers the streams of this monitor."""
        if process not in self.table.gone:
            self._lifelines.on_opened(process, connection)
        return self._settle(now)

    def on_lifeline_closed(self, process: ProcessId, connection: int, now: float) -> list[Action]:
        self._lifelines.on_closed(process, connection, now)
        return self._settle(now)

    def on_lifeline_timed_out(self, process: ProcessId, connection: int, now: float) -> list[Action]:
        """The network ended it, not the kernel of that process."""
        self._lifelines.on_timed_out(process, connection)
        return self._settle(now)

    def on_fault(self, payload: bytes, now: float) -> list[Action]:
        """What somebody published on topic ``fault``."""
        if self.phase is Phase.ACTIVE:
            self._faults.on_fault(payload, now)
        else:
            self._faults.defer(payload, now)
        return self._settle(now)

    def on_stranger(self, door: str, reason: str, now: float) -> list[Action]:
        """Somebody without the key of the cluster was refused at one of the monitor's sockets."""
        self._strangers.on_stranger(door, reason, now)
        return self._settle(now)

    def on_load(self, load: ExpertLoad, now: float) -> None:
        self._load.on_load(load, now)

    def on_tick(self, now: float) -> list[Action]:
        """Every tick_s, and whenever something may be due. Only ticks judge by time."""
        if self._clock.tick(now):
            self._outbox.emit("late_tick", now, epoch=self.group.epoch, text="all timers start anew")
        if self._takeover.on_tick(now):
            self._on_phase(now)
        if self.phase is Phase.ACTIVE:
            for process in self.table.lost_for_good(now):
                self._on_gone(process, "lifeline closed, and no agent knows it", now)
            self.membership.on_tick(now)
            if overdue := self.migration.on_tick(now):
                self.removals.publish_same_members(overdue, now)
            self._check_rivals()
            self.table.forget_silent({slot.process for slot in self.slots.slots}, now)
        return self._settle(now)

    # Other words.

    def _on_heartbeat(self, beat: Heartbeat, peer: ProcessId, now: float) -> None:
        if beat.process in self.table.gone or self._outranked(beat.term):
            return
        self._takeover.on_heartbeat(beat)
        process = self.table.on_heartbeat(beat, now)
        if self.phase is Phase.LISTENING:
            return  # no term yet that a reply could carry
        if process is not None:
            self._note_given_up(process, now)
            if self.phase is Phase.ACTIVE and process.hello.kind == "decode":
                self.membership.on_heartbeat(beat, now)
                self.joining.on_heartbeat(process, now)
        # Agents hold no view: telling them the epoch would make them ask for one with every heartbeat.
        epoch = Epoch(0) if process is not None and process.hello.kind == "agent" else self.group.epoch
        # must_greet: the Hello that was due may be lost, and the Welcome to an older one has ended its repetition.
        known = (
            process is not None
            and not process.must_greet
            and not (self.phase is Phase.GATHERING and has_moved_on(process))
        )
        version = self.directory.message.version
        self._outbox.send(peer, HeartbeatReply(self.id, self.counter.term, epoch, version, known))

    def _on_plan(self, plan: PlacementPlan, now: float) -> str:
        """Why it changes nothing; empty if it is carried out."""
        if plan.base_version == 0:
            return self.group.experts.on_first_plan(plan)
        return self.migration.on_plan(plan, now) if self.phase is Phase.ACTIVE else "the monitor has just started"

    def _on_word_of_rank(self, message: VoidReport | RollAnswer | SlotLeft, now: float) -> None:
        match message:
            case VoidReport():
                self.membership.on_void_report(message, now)
            case RollAnswer():
                self.membership.on_roll_answer(message, now)
            case SlotLeft():
                self.membership.on_slot_left(message, now)

    def _on_exited(self, exited: Exited, now: float) -> None:
        if exited.process not in self.table.gone:
            self._outbox.emit(
                "exited", now, epoch=self.group.epoch, name=exited.name, pid=exited.pid, reason=exited.reason
            )
            self._on_gone(exited.process, exited.reason, now)

    def _on_gone(self, process: ProcessId, proof: str, now: float) -> None:
        self.table.on_gone(process, proof)
        self._given_up.pop(process, None)
        if self.phase is Phase.ACTIVE:
            self.membership.on_gone(process, proof, now)

    def _on_signal_done(self, done: SignalDone, now: float) -> None:
        self._faults.on_signal_done(done)
        if done.ok and done.proof.startswith(("reaped", "no such process")) and done.process not in self.table.gone:
            self._on_gone(done.process, done.proof, now)

    def _note_given_up(self, process: Process, now: float) -> None:
        if process.hello.kind != "agent":
            return
        num_given_up = process.beat.counters.get("given_up", 0)
        if num_given_up > self._given_up.get(process.id, 0):
            text = f"agent {process.hello.name} no longer restarts {num_given_up} of its processes: they died too often"
            self._outbox.emit("gave_up", now, epoch=self.group.epoch, name=process.hello.name, text=text)
        self._given_up[process.id] = num_given_up

    # Other monitors.

    def _outranked(self, term: int) -> bool:
        """One monitor per term, and only the highest counts (PROTOCOL 3.3)."""
        if self.phase is not Phase.ACTIVE or term <= self.counter.term:
            return False
        self._outbox.exit(f"a monitor of term {term} has taken over; this one has term {self.counter.term}")
        return True

    def _check_rivals(self) -> None:
        """A process that follows this very term but never greets follows another monitor of it."""
        for process, stranger in self.table.strangers.items():
            is_sure = stranger.followed_s > self.config.monitor.heartbeat_timeout_s
            if is_sure and stranger.beat.term == self.counter.term:
                self._outbox.exit(f"{process} follows another monitor of term {stranger.beat.term}")

    def _on_phase(self, now: float) -> None:
        term = self.counter.term
        self.sizing.term = self.migration.term = self._faults.term = term
        self.directory.open_term(term)
        self._outbox.emit("term", now, epoch=self.group.epoch, term=term, phase=self.phase.value)
        if self.phase is Phase.ACTIVE and not self._takeover.is_fresh:
            self._take_over(now)
        decode_too = self.phase is Phase.ACTIVE
        self.joining.to_welcome += [p.id for p in self.table.all() if decode_too or p.hello.kind != "decode"]

    def _take_over(self, now: float) -> None:
        best = self._takeover.best
        if best is not None and not self.group.experts.has_shape_of(best.placement.physical_to_logical):
            self._outbox.exit("the running ranks have another model or another decode.max_ranks; stop them first")
            return
        leave_s = self.config.monitor.adopt_timeout_s
        recover(best, self.table, self.slots, self.group, self.fences, self._outbox, leave_s, now)
        self.sizing.on_take_over()
        self.joining.on_take_over(now)

    # After every event.

    def _settle(self, now: float) -> list[Action]:
        if self._takeover.outgrown():
            self._on_phase(now)
        if self.phase is Phase.ACTIVE:
            self.group.check_adopted()
            self.sizing.advance(now)
            self.membership.shrink(now)
            self.joining.advance(now)
            self.migration.advance(now)
            self._faults.advance(now)
        directory = self.directory.refresh(now)
        welcome, self.joining.to_welcome = dict.fromkeys(self.joining.to_welcome), []
        for process in welcome:
            if record := self.table.get(process):
                self._reception.welcome(record, now)
        if directory is not None and self.counter.term:
            self.group.tell_everybody(directory)
        return self._outbox.take()
