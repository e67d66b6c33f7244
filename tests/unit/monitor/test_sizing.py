"""Scaling: the wanted size is reached, from anywhere, by one view down and by joins up, also by the next monitor.

The agent is played by its real `Supervisor`; what it starts are puppets.
"""

import json
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from common.config import ClusterConfig, DecodeConfig, PrefillConfig
from common.ids import ProcessId
from common.messages import AskStatus, SetChildren, Signal, Status
from services.agent.supervisor import Kill, Spawn, Supervisor
from services.monitor.slots import SlotState
from tests.unit.monitor.driver import Driver, Puppet

# Six experts in slots of six: two ranks have room for all, one rank has too.
CONFIG = ClusterConfig(decode=DecodeConfig(num_ranks=3, max_ranks=6), prefill=PrefillConfig(num_workers=1))
# Six experts in slots of two: fewer than three ranks have no room for all.
TIGHT = ClusterConfig(decode=DecodeConfig(num_ranks=3, max_ranks=6, num_redundant_experts=0))
STEP_S = 0.2


class Fleet(Driver):
    """A driver whose agent starts and ends puppets."""

    def __init__(self, config: ClusterConfig = CONFIG) -> None:
        super().__init__(config)
        num_children = config.decode.num_ranks + config.decode.num_standbys
        names = [f"decode-{number}" for number in range(num_children)]
        names += [f"prefill-{number}" for number in range(config.prefill.num_workers)]
        self.supervisor = Supervisor(names, config, Random(1), self.now)
        self.wanted = {"decode": num_children, "prefill": config.prefill.num_workers}
        self.agent = self.enter("agent", "agent-0")
        self.num_read = 0
        self.run(3.0)
        assert self.ranks == list(range(config.decode.num_ranks))

    def beat(self, puppet: Puppet) -> None:
        if puppet.kind == "prefill":
            puppet.state = "up"
        super().beat(puppet)

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds / STEP_S)):
            self.follow_orders()
            self.advance(STEP_S)

    def follow_orders(self) -> None:
        for order in self.agent.got(SetChildren)[self.num_read :]:
            self.num_read += 1
            self.wanted[order.kind] = order.count
            for action in self.supervisor.on_set_children(order.kind, order.count, order.retire, self.now):
                if isinstance(action, Kill) and action.signal == "TERM":
                    self.end(self.puppets[self.supervisor.children[action.name].process], "exit 0")
        for action in self.supervisor.on_tick(self.now):
            assert isinstance(action, Spawn)
            self.supervisor.on_spawned(action.name, action.process, 7, self.now)
            self.enter(action.kind, action.name, action.process)
        for kind, count in self.wanted.items():
            self.agent.counters[f"wanted_{kind}"] = count
            self.agent.counters[f"children_{kind}"] = self.supervisor.num_wanted_children(kind)

    def end(self, puppet: Puppet, reason: str) -> None:
        self.supervisor.on_exit(puppet.name, reason, self.now)
        self.exited(puppet, reason)

    def states(self) -> dict[int, str]:
        self.say(self.agent, AskStatus(self.agent.process, 1))
        body = json.loads(self.agent.got(Status)[-1].body)
        return {entry["rank"]: entry["state"] for entry in body["ranks"]}

    def alive(self, kind: str) -> list[str]:
        return sorted(child.name for child in self.supervisor.alive if child.kind == kind)


def test_growing_starts_children_that_join() -> None:
    fleet = Fleet()
    assert fleet.fault("s", "scale", decode=5) == "accepted"
    assert fleet.agent.got(SetChildren)[-1].count == 5 and "scaling" in fleet.kinds()
    fleet.run(2.0)
    assert fleet.ranks == [0, 1, 2, 3, 4] and fleet.fault_status("s") == "done"
    assert fleet.last_event("fault")["proof"].endswith("of ranks [0, 1, 2, 3, 4], adopted by all")
    assert fleet.last_event("scaled")["wanted"] == 5
    assert fleet.alive("decode") == [f"decode-{number}" for number in range(5)]


def test_a_standby_takes_a_lost_place_at_once_and_is_kept_through_scalings() -> None:
    """Also by the next monitor: the agent tells how many children it was told to have."""
    fleet = Fleet(replace(CONFIG, decode=replace(CONFIG.decode, num_standbys=1)))
    assert len(fleet.alive("decode")) == 4 and not fleet.agent.got(SetChildren)
    lost = next(puppet for puppet in fleet.puppets.values() if puppet.rank == 1)
    fleet.end(lost, "signal KILL")
    fleet.advance(0.3)
    assert fleet.ranks == [0, 1, 2] and len(fleet.alive("decode")) == 3, "its own process has not started again"
    fleet.run(1.0)
    assert len(fleet.alive("decode")) == 4 and fleet.monitor.slots.num_taken == 3
    for size, number in (("up", 5), ("down", 2)):
        fleet.fault(size, "scale", decode=number)
        fleet.run(3.0)
        assert fleet.fault_status(size) == "done" and len(fleet.ranks) == number
        assert len(fleet.alive("decode")) == number + 1
    fleet.replace_monitor("monitor-2")
    for puppet in [p for p in fleet.puppets.values() if p.is_beating]:
        fleet.open_lifeline(puppet)
        fleet.hello(puppet)
    fleet.run(2.0)
    for puppet in [p for p in fleet.puppets.values() if p.is_beating]:
        fleet.hello(puppet)
    fleet.run(6.0)
    assert len(fleet.ranks) == 2 and fleet.monitor.sizing.num_ranks == 2 and len(fleet.alive("decode")) == 3


def test_shrinking_is_one_view_without_the_highest_ranks_and_nobody_is_killed() -> None:
    fleet = Fleet()
    fleet.fault("up", "scale", decode=6)
    fleet.run(2.0)
    num_views = len(fleet.views)
    assert fleet.fault("down", "scale", decode=3) == "accepted"
    fleet.run(2.0)
    assert fleet.ranks == [0, 1, 2] and fleet.fault_status("down") == "done"
    assert len(fleet.views) == num_views + 1, "all leave in one view"
    assert len(fleet.alive("decode")) == 3 and not fleet.agent.got(Signal)
    assert fleet.monitor.slots.num_taken == 3 and not fleet.monitor.slots.in_state(SlotState.FENCING)


def test_no_process_is_ended_before_it_has_left_its_slot() -> None:
    fleet = Fleet()
    leaver = next(p for p in fleet.puppets.values() if p.kind == "decode" and p.rank == 2)
    leaver.follows = False
    fleet.fault("down", "scale", decode=2)
    fleet.run(1.0)
    assert fleet.ranks == [0, 1] and len(fleet.alive("decode")) == 3
    assert fleet.states()[2] == "draining"
    assert all(not order.retire for order in fleet.agent.got(SetChildren)) and fleet.fault_status("down") == "accepted"
    fleet.leave(leaver, fleet.epoch)
    fleet.run(1.0)
    assert len(fleet.alive("decode")) == 2 and fleet.fault_status("down") == "done"


def test_one_that_does_not_leave_is_killed_after_a_while() -> None:
    fleet = Fleet()
    leaver = next(p for p in fleet.puppets.values() if p.kind == "decode" and p.rank == 2)
    leaver.follows = False
    fleet.fault("down", "scale", decode=2)
    fleet.run(4.0)
    assert not fleet.agent.got(Signal)
    fleet.run(2.0)
    assert [signal.process for signal in fleet.agent.got(Signal)[:1]] == [leaver.process]


def test_the_same_size_again_changes_nothing() -> None:
    fleet = Fleet()
    num_views, num_orders = len(fleet.views), len(fleet.agent.got(SetChildren))
    assert fleet.fault("same", "scale", decode=3, prefill=1) == "done"
    fleet.run(1.0)
    assert (len(fleet.views), len(fleet.agent.got(SetChildren))) == (num_views, num_orders)
    assert "scaling" not in fleet.kinds()


def test_another_size_while_scaling_overrules() -> None:
    fleet = Fleet()
    fleet.fault("a", "scale", decode=6)
    fleet.fault("b", "scale", decode=2)
    assert fleet.fault_status("a") == "failed"
    fleet.run(4.0)
    assert fleet.fault_status("b") == "done" and fleet.ranks == [0, 1] and len(fleet.alive("decode")) == 2


def test_prefill_workers() -> None:
    fleet = Fleet()
    fleet.fault("up", "scale", prefill=3)
    fleet.run(1.0)
    assert fleet.fault_status("up") == "done" and len(fleet.alive("prefill")) == 3
    fleet.fault("down", "scale", prefill=1)
    fleet.run(1.0)
    assert fleet.fault_status("down") == "done" and fleet.alive("prefill") == ["prefill-0"]
    assert fleet.ranks == [0, 1, 2]


def test_what_is_masked_goes_first() -> None:
    fleet = Fleet()
    fleet.fault("m", "drain", rank=0)
    fleet.run(1.0)
    assert fleet.fault_status("m") == "done" and fleet.ranks == [1, 2]
    fleet.fault("down", "scale", decode=2)
    fleet.run(2.0)
    assert fleet.fault_status("down") == "done" and fleet.ranks == [1, 2] and len(fleet.alive("decode")) == 2


@pytest.mark.parametrize("wanted", [2, 5])
@pytest.mark.parametrize("is_told", [True, False])
def test_a_new_monitor_goes_on_to_the_size_that_the_agent_was_told(wanted: int, is_told: bool) -> None:
    """The old monitor dies right after it has told the agent, or before that."""
    fleet = Fleet()
    fleet.fault("s", "scale", decode=wanted)
    if not is_told:
        wanted, fleet.num_read = 3, len(fleet.agent.got(SetChildren))
    fleet.follow_orders()
    fleet.replace_monitor("monitor-2")
    for puppet in [p for p in fleet.puppets.values() if p.is_beating]:
        fleet.open_lifeline(puppet)
        fleet.hello(puppet)
    fleet.run(2.0)
    for puppet in [p for p in fleet.puppets.values() if p.is_beating]:
        fleet.hello(puppet)
    fleet.run(6.0)
    assert fleet.ranks == list(range(wanted)) and len(fleet.alive("decode")) == wanted
    assert fleet.fault("again", "scale", decode=wanted) == "done"


def test_an_agent_that_forgot_is_told_again() -> None:
    fleet = Fleet()
    fleet.fault("s", "scale", decode=4)
    fleet.run(2.0)
    num_orders = len(fleet.agent.got(SetChildren))
    fleet.wanted["decode"] = 3
    fleet.run(1.0)
    assert len(fleet.agent.got(SetChildren)) > num_orders and fleet.wanted["decode"] == 4


@pytest.mark.parametrize(
    ("counts", "config", "why"),
    [
        ({"decode": 7}, CONFIG, "decode.max_ranks is 6"),
        ({"decode": 2}, TIGHT, "2 ranks have no room for all experts; 3 have"),
    ],
)
def test_sizes_that_cannot_be_had_are_refused(counts: dict[str, int], config: ClusterConfig, why: str) -> None:
    fleet = Fleet(config)
    assert fleet.fault("s", "scale", **counts) == "refused"
    assert why in fleet.last_event("fault")["error"] and fleet.ranks == [0, 1, 2]


def test_without_an_agent_that_starts_children_standbys_are_the_reserve() -> None:
    driver = Driver(CONFIG)
    driver.form(4)
    assert driver.ranks == [0, 1, 2]
    assert driver.fault("p", "scale", prefill=2) == "refused" and driver.fault("d", "scale", decode=5) == "refused"
    assert "there are 4 decode processes" in driver.last_event("fault")["error"]
    for wanted in (4, 2, 4):
        driver.fault(f"s{wanted}{driver.now}", "scale", decode=wanted)
        driver.advance(4.0)
        assert driver.ranks == list(range(wanted)) and driver.last_event("fault")["status"] == "done"
    assert not driver.puppets[ProcessId("agent-0-a")].got(SetChildren)


def test_a_drain_is_done_when_the_rank_says_that_it_holds_nothing() -> None:
    fleet = Fleet()
    leaver = next(p for p in fleet.puppets.values() if p.kind == "decode" and p.rank == 2)
    leaver.follows = False
    assert fleet.fault("d", "drain", rank=2) == "accepted"
    fleet.run(1.0)
    assert fleet.ranks == [0, 1] and fleet.fault_status("d") == "accepted"
    fleet.leave(leaver, fleet.epoch)
    assert fleet.last_event("fault")["proof"].startswith("drained, view")
    leaver.follows = True
    fleet.run(2.0)
    assert fleet.ranks == [0, 1], "no slot before undrain"
    fleet.fault("u", "undrain", rank=2)
    fleet.run(1.0)
    assert fleet.fault_status("u") == "done" and fleet.ranks == [0, 1, 2]


def test_a_rank_without_which_experts_would_be_missing_is_not_drained() -> None:
    fleet = Fleet(TIGHT)
    assert fleet.fault("d", "drain", rank=2) == "refused"
    assert "no room for all experts" in fleet.last_event("fault")["error"]


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 6), st.integers(1, 4), st.floats(0.0, 1.5), st.integers(-1, 5)), min_size=1, max_size=6
    )
)
def test_every_sequence_ends_in_the_last_size(steps: list[tuple[int, int, float, int]]) -> None:
    """Each step: sizes, the time until the next one, and the place of a decode process that dies meanwhile."""
    fleet = Fleet()
    for number, (ranks, workers, seconds, victim) in enumerate(steps):
        fleet.fault(f"s{number}", "scale", decode=ranks, prefill=workers)
        fleet.run(seconds)
        alive = [child for child in fleet.supervisor.alive if child.kind == "decode"]
        if 0 <= victim < len(alive) and len(alive) > 1:
            fleet.supervisor.on_asked_to_kill(alive[victim].process)
            fleet.end(fleet.puppets[alive[victim].process], "signal KILL")
    fleet.run(15.0)
    last_ranks, last_workers = steps[-1][:2]
    assert len(fleet.ranks) == last_ranks == len(fleet.alive("decode"))
    assert len(fleet.alive("prefill")) == last_workers
    assert fleet.fault("end", "scale", decode=last_ranks, prefill=last_workers) == "done"
