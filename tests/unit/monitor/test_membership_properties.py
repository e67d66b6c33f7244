"""Whatever processes say, do and suffer, in any order: the promises of membership hold after every step."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from common.ids import Epoch, Incarnation, ProcessId
from common.messages import Message, RollAnswer, Signal, View, VoidReport
from common.view import orphans, ranks
from services.monitor.slots import SlotState
from services.monitor.takeover import Phase
from tests.unit.monitor.driver import CONFIG, NUM_EXPERTS, Driver, Puppet

MAX_LIVES = 14
NUMBERS = st.integers(0, 1100)


class AnyLife(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.driver = Driver()
        self.agent = self.driver.enter("agent", "agent-0")
        self.router = self.driver.enter("router", "router-0")
        self.num_lives = self.num_faults = self.num_views_checked = 0
        self.last_epoch = 0
        self.dead: set[ProcessId] = set()
        self.faulty: set[ProcessId] = set()
        self.prepared: dict[int, View] = {}
        self.num_events_checked = 0
        for _ in range(3):
            self._enter()
        self.driver.advance(1.5)

    def _enter(self) -> None:
        self.num_lives += 1
        self.driver.enter("decode", f"decode-{self.num_lives % 5}", f"decode-{self.num_lives % 5}-{self.num_lives:x}")

    def _living(self) -> list[Puppet]:
        return [p for p in self.driver.puppets.values() if p.kind == "decode" and p.process not in self.dead]

    def _pick(self, number: int) -> Puppet | None:
        living = self._living()
        return living[number % len(living)] if living else None

    @precondition(lambda self: self.num_lives < MAX_LIVES)
    @rule()
    def a_process_starts(self) -> None:
        self._enter()

    @rule(number=st.integers(0, 9), announced=st.booleans())
    def a_process_dies(self, number: int, announced: bool) -> None:
        if (puppet := self._pick(number)) is None:
            return
        self.dead.add(puppet.process)
        puppet.is_beating = puppet.follows = False
        if announced:
            self.driver.exited(puppet)
        else:
            self.driver.close_lifeline(puppet)

    @rule(number=st.integers(0, 9), is_beating=st.booleans(), seconds=st.sampled_from([0.1, 1.0, 4.0, 8.0]))
    def a_process_hangs(self, number: int, is_beating: bool, seconds: float) -> None:
        """For a while; its heartbeats may go on. It misses what is said to it meanwhile."""
        if (puppet := self._pick(number)) is None:
            return
        self.faulty.add(puppet.process)
        puppet.follows = puppet.answers_roll_calls = False
        puppet.is_beating = is_beating
        self.driver.advance(seconds)
        puppet.follows = puppet.answers_roll_calls = puppet.is_beating = True
        if puppet.rank == -1 and not puppet.view:
            self.driver.hello(puppet)
        elif self.driver.view is not None and self.driver.monitor.group.member(puppet.process) is None:
            self.driver.receive(puppet, self.driver.view)

    @rule(number=st.integers(0, 9), accused=st.lists(st.integers(0, 6), max_size=2).map(tuple))
    def a_round_is_void(self, number: int, accused: tuple[int, ...]) -> None:
        puppet = self._pick(number)
        if puppet is None or puppet.view is None or self.driver.monitor.phase is not Phase.ACTIVE:
            return
        if accused:
            self.faulty |= {p.process for p in self._living()}  # may end as a broken path
        is_current = self.driver.monitor.group.member(puppet.process) is not None
        before = self.driver.epoch
        is_current = is_current and puppet.epoch == before
        self.driver.void(puppet, accused)
        self.driver.advance(CONFIG.monitor.roll_call_s + 1.0)
        assert not is_current or self.driver.epoch > before, "a void without a new view"

    @rule(number=st.integers(0, 9))
    def a_process_leaves(self, number: int) -> None:
        puppet = self._pick(number)
        if puppet is not None and puppet.view is not None and puppet.follows:
            self.faulty.add(puppet.process)
            self.driver.leave(puppet, puppet.epoch)

    @rule(
        number=st.integers(0, 9), epoch=st.integers(0, 1100), incarnation=st.integers(0, 1100), kind=st.integers(0, 2)
    )
    def a_stale_word_comes(self, number: int, epoch: int, incarnation: int, kind: int) -> None:
        """Of an incarnation that this process never had."""
        puppet = self._pick(number)
        if puppet is None or puppet.incarnation == incarnation:
            return
        old, then = Incarnation(incarnation), Epoch(epoch)
        words: list[Message] = [
            VoidReport(puppet.process, puppet.rank, old, then, 1, (0, 1)),
            RollAnswer(puppet.process, puppet.rank, old, then, 0),
        ]
        self.driver.say(puppet, words[kind % 2])

    @rule(number=st.integers(0, 9))
    def a_heartbeat_is_doubled(self, number: int) -> None:
        if (puppet := self._pick(number)) is not None and puppet.is_beating:
            self.driver.beat(puppet)
            self.driver.beat(puppet)

    @rule(number=st.integers(0, 9))
    def a_lifeline_flaps(self, number: int) -> None:
        if (puppet := self._pick(number)) is not None:
            new = self.driver.open_lifeline(puppet)
            self.driver.close_lifeline(puppet)
            assert new

    @rule(action=st.sampled_from(["mask", "unmask", "kill"]), rank=st.integers(0, 5))
    def a_fault_event_comes(self, action: str, rank: int) -> None:
        self.num_faults += 1
        for slot in self.driver.monitor.slots.slots:
            if slot.rank == rank and slot.process:
                self.faulty.add(slot.process)
        self.driver.fault(f"f{self.num_faults}", action, rank=rank)
        self.driver.advance(0.2)

    @rule(seconds=st.sampled_from([0.05, 0.3, 1.0, 5.0]))
    def time_passes(self, seconds: float) -> None:
        self.driver.advance(seconds)

    @rule(seconds=st.sampled_from([0.4, 0.6, 5.0, 100.0]))
    def the_monitor_is_stopped_for_a_while(self, seconds: float) -> None:
        self.driver.sleep(seconds)
        self.driver.advance(0.1)

    @rule()
    def the_monitor_is_restarted(self) -> None:
        if self.driver.monitor.phase is not Phase.ACTIVE:
            return
        self.driver.replace_monitor(f"monitor-{self.driver.now}")
        for puppet in (*self._living(), self.agent, self.router):
            self.driver.open_lifeline(puppet)
        self.driver.advance(1.2)
        self.faulty |= {p.process for p in self._living() if p.view is None}
        for puppet in (*self._living(), self.agent, self.router):
            puppet.term = self.driver.monitor.counter.term
            self.driver.hello(puppet, children=tuple(self._living()) if puppet is self.agent else ())
        self.driver.advance(0.6)

    @invariant()
    def epochs_only_rise(self) -> None:
        for view in self.driver.views[self.num_views_checked :]:
            assert view.epoch > self.last_epoch
            self.last_epoch = view.epoch
            num_local = len(view.placement.physical_to_logical[0][0])
            if len(view.members) * num_local >= NUM_EXPERTS:
                assert orphans(view.placement, ranks(view), NUM_EXPERTS) == []
        self.num_views_checked = len(self.driver.views)

    @invariant()
    def a_prepared_number_is_never_another_view(self) -> None:
        if (prepared := self.driver.monitor.group.prepared) is not None:
            assert prepared.view.epoch > self.driver.epoch
            assert self.prepared.setdefault(prepared.view.epoch, prepared.view) == prepared.view

    @invariant()
    def a_slot_is_in_one_hand_and_a_process_in_one_slot(self) -> None:
        slots = self.driver.monitor.slots
        holders = [slot.process for slot in slots.slots if slot.state is not SlotState.FREE]
        assert len(set(holders)) == len(holders) and ProcessId("") not in holders
        held = {(slot.rank, slot.process, slot.incarnation) for slot in slots.in_state(SlotState.HELD)}
        members = {(m.rank, m.process, m.incarnation) for m in self.driver.monitor.group.members}
        assert members <= held
        assert slots.num_taken <= CONFIG.decode.num_ranks

    @invariant()
    def the_healthy_stay(self) -> None:
        for event in self.driver.events[self.num_events_checked :]:
            if event["kind"] == "removed" and event["evidence"] != "left its slot":
                assert event["process"] in self.dead | self.faulty, event
        self.num_events_checked = len(self.driver.events)
        assert self.driver.exits == []

    def teardown(self) -> None:
        """When all is quiet again, the group is as large as it can be."""
        for rank in range(CONFIG.decode.max_ranks):
            self.driver.fault(f"end{rank}", "unmask", rank=rank)
        for slot in self.driver.monitor.slots.slots:
            if slot.process in self.dead:
                self.driver.exited(self.driver.puppets[slot.process])
        waited_s = 0.0
        while (missing := self._num_missing()) and waited_s < 90.0:
            self.driver.advance(2.0)
            waited_s += 2.0
        assert missing == 0, self.driver.kinds()[-20:]

    def _num_missing(self) -> int:
        for signal in self.agent.got(Signal):  # a real agent would kill them, and say so
            self.dead.add(signal.process)
            if signal.process not in self.driver.monitor.table.gone:
                self.driver.exited(self.driver.puppets[signal.process])
        return max(0, min(len(self._living()), CONFIG.decode.num_ranks) - len(self.driver.ranks))


TestAnyLife = AnyLife.TestCase
TestAnyLife.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
