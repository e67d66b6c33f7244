"""Restarts, backoff, giving up, and the order of the stop."""

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import AgentConfig, ClusterConfig
from common.ids import ProcessId
from services.agent.supervisor import STABLE_S, Action, ChildState, GiveUp, Kill, Spawn, Supervisor
from tests.unit.agent.supervised import CONFIG, make, start


def test_starts_everything_at_once_and_once() -> None:
    supervisor = make("monitor", "decode-0", "decode-1")
    spawns = supervisor.on_tick(0.0)
    assert [(s.name, s.kind) for s in spawns if isinstance(s, Spawn)] == [
        ("monitor", "monitor"),
        ("decode-0", "decode"),
        ("decode-1", "decode"),
    ]
    assert start(supervisor, 0.0) == ["monitor", "decode-0", "decode-1"]
    assert start(supervisor, 1.0) == []


def test_every_life_has_a_new_process_id() -> None:
    supervisor = make("decode-0")
    seen = set()
    for now in (0.0, 20.0, 40.0):
        assert start(supervisor, now) == ["decode-0"]
        seen.add(supervisor.children["decode-0"].process)
        supervisor.on_exit("decode-0", "signal KILL", now + 15.0)
    assert len(seen) == 3


def test_backoff_doubles_and_a_stable_life_resets_it() -> None:
    supervisor = make("decode-0")
    start(supervisor, 0.0)
    assert supervisor.on_exit("decode-0", "exit 1", 1.0) == []
    assert start(supervisor, 1.09) == []
    assert start(supervisor, 1.11) == ["decode-0"]
    supervisor.on_exit("decode-0", "exit 1", 2.0)
    assert start(supervisor, 2.19) == []
    assert start(supervisor, 2.21) == ["decode-0"]
    supervisor.on_exit("decode-0", "exit 1", 2.3 + STABLE_S)
    assert start(supervisor, 2.41 + STABLE_S) == ["decode-0"]


def test_backoff_has_a_largest_value() -> None:
    config = ClusterConfig(agent=AgentConfig(restart_backoff_s=1.0, restart_backoff_max_s=3.0, give_up_after=50))
    supervisor = Supervisor(["decode-0"], config, Random(1), now=0.0)
    now = 0.0
    for _ in range(10):
        assert start(supervisor, now) == ["decode-0"]
        supervisor.on_exit("decode-0", "exit 1", now)
        now += 3.0


def test_a_child_whose_start_takes_long_is_given_up_too() -> None:
    """It dies each time that it is ready: on a busy machine that was a stable life, and nobody ever gave it up."""
    supervisor = make("decode-0", "decode-1")
    start(supervisor, 0.0)
    now, actions = 0.0, list[Action]()
    for number in range(4):
        assert actions == [], number
        now += STABLE_S + 2.0
        actions = supervisor.on_exit("decode-0", "signal KILL", now)
        now += 0.2
        assert start(supervisor, now) == ([] if actions else ["decode-0"]), "no longer a pause than after the first"
    assert isinstance(actions[0], GiveUp) and "4 deaths" in actions[0].reason


def test_gives_up_after_too_many_deaths_and_says_how_many() -> None:
    supervisor = make("decode-0", "decode-1")
    start(supervisor, 0.0)
    now, actions = 0.0, list[Action]()
    for _ in range(4):
        now += 5.0
        actions = supervisor.on_exit("decode-0", "exit 1", now)
        now += 5.0
        start(supervisor, now)
    assert actions == [GiveUp("decode-0", "exit 1 (4 deaths)", fatal=False)]
    assert supervisor.children["decode-0"].state is ChildState.GIVEN_UP
    assert start(supervisor, 1e6) == []


def test_deaths_outside_the_window_are_forgotten() -> None:
    supervisor = make("decode-0")
    now = 0.0
    for _ in range(20):
        start(supervisor, now)
        assert supervisor.on_exit("decode-0", "exit 1", now + 1.0) == []
        now += 25.0


def test_the_last_of_an_essential_kind_is_fatal_and_a_planner_is_not() -> None:
    supervisor = make("decode-0", "decode-1", "planner")
    start(supervisor, 0.0)
    last: list[Action] = []
    for name in ("decode-0", "planner", "decode-1"):
        supervisor.on_exit(name, "exit 2", 1.0)
        start(supervisor, 2.0)
        last = supervisor.on_exit(name, "exit 2", 3.0)
        assert last == [GiveUp(name, "exit 2 (2 deaths)", fatal=name == "decode-1")]


def test_an_operators_error_is_retried_once_only() -> None:
    supervisor = make("router-0")
    start(supervisor, 0.0)
    assert supervisor.on_exit("router-0", "exit 2", 1.0) == []
    start(supervisor, 2.0)
    assert supervisor.on_exit("router-0", "exit 1", 3.0) == []
    start(supervisor, 4.0)
    assert supervisor.on_exit("router-0", "exit 2", 5.0) == []


def test_deaths_that_were_asked_for_count_for_nothing() -> None:
    supervisor = make("decode-0")
    now = 0.0
    for _ in range(20):
        assert start(supervisor, now) == ["decode-0"]
        supervisor.on_asked_to_kill(supervisor.children["decode-0"].process)
        assert supervisor.on_exit("decode-0", "signal KILL", now + 0.5) == []
        now += 0.61


def test_a_death_that_was_asked_for_after_a_long_life_ends_the_backing_off_of_before() -> None:
    supervisor = make("decode-0")
    now = 0.0
    for _ in range(3):
        start(supervisor, now)
        supervisor.on_exit("decode-0", "signal SEGV", now + 0.1)
        now += 5.0
    start(supervisor, now)
    supervisor.on_asked_to_kill(supervisor.children["decode-0"].process)
    now += STABLE_S
    supervisor.on_exit("decode-0", "signal KILL", now)
    assert start(supervisor, now + 0.11) == ["decode-0"]


def test_an_asked_for_death_excuses_no_start_that_fails_after_it() -> None:
    supervisor = make("decode-0")
    start(supervisor, 0.0)
    supervisor.on_asked_to_kill(supervisor.children["decode-0"].process)
    assert supervisor.on_exit("decode-0", "signal KILL", 1.0) == []
    given_up: list[Action] = []
    for number in range(4):
        now = 10.0 + 5.0 * number
        assert len(supervisor.on_tick(now)) == 1
        given_up = supervisor.on_exit("decode-0", "cannot start: no memory", now)
    assert [type(action) for action in given_up] == [GiveUp]


def test_a_child_that_cannot_be_started_backs_off_and_is_given_up() -> None:
    supervisor = make("decode-0")
    now = 0.0
    for _ in range(3):
        assert len(supervisor.on_tick(now)) == 1
        assert supervisor.on_exit("decode-0", "cannot start: no such file", now) == []
        assert supervisor.on_tick(now) == []
        now += 5.0
    supervisor.on_tick(now)
    assert [type(action) for action in supervisor.on_exit("decode-0", "cannot start", now)] == [GiveUp]


def test_stops_routers_first_and_the_monitor_last() -> None:
    supervisor = make("monitor", "planner", "router-0", "decode-0", "prefill-0")
    start(supervisor, 0.0)
    assert supervisor.on_stop(10.0) == [Kill("router-0", "TERM"), Kill("router-0", "CONT")]
    assert supervisor.on_stop(10.1) == []
    second = supervisor.on_exit("router-0", "exit 0", 11.0)
    assert {a.name for a in second if isinstance(a, Kill)} == {"planner", "decode-0", "prefill-0"}
    assert supervisor.on_exit("planner", "exit 0", 11.1) == []
    assert supervisor.on_exit("decode-0", "exit 0", 11.1) == []
    third = supervisor.on_exit("prefill-0", "exit 0", 11.2)
    assert third == [Kill("monitor", "TERM"), Kill("monitor", "CONT")]
    assert not supervisor.is_stopped
    assert supervisor.on_exit("monitor", "exit 0", 11.3) == []
    assert supervisor.is_stopped


def test_who_does_not_stop_in_time_is_killed_and_routers_get_time_to_drain() -> None:
    supervisor = make("router-0", "decode-0")
    start(supervisor, 0.0)
    supervisor.on_stop(10.0)
    assert supervisor.on_tick(27.9) == []
    assert supervisor.on_tick(28.0) == [Kill("router-0", "KILL")]
    assert supervisor.on_tick(28.5) == []
    assert supervisor.on_tick(29.0) == [Kill("router-0", "KILL")]
    supervisor.on_exit("router-0", "signal KILL", 29.1)
    assert supervisor.on_tick(37.0) == []
    assert supervisor.on_tick(37.1) == [Kill("decode-0", "KILL")]


def test_nothing_starts_while_stopping() -> None:
    supervisor = make("decode-0", "decode-1")
    start(supervisor, 0.0)
    supervisor.on_exit("decode-0", "exit 1", 1.0)
    supervisor.on_stop(1.05)
    assert supervisor.on_tick(5.0) == []
    supervisor.on_exit("decode-1", "exit 0", 6.0)
    assert supervisor.is_stopped


def test_a_child_that_was_taken_over_is_not_started_again() -> None:
    supervisor = make("decode-0")
    supervisor.on_spawned("decode-0", ProcessId("decode-0-old"), 77, 0.0)
    assert supervisor.on_tick(0.0) == []
    assert supervisor.by_process(ProcessId("decode-0-old")) is supervisor.children["decode-0"]


@given(
    st.lists(
        st.tuples(st.sampled_from(["tick", "exit 1", "exit 2", "signal KILL", "stop"]), st.integers(0, 3)), max_size=60
    )
)
@settings(max_examples=200)
def test_any_order_of_events_ends_in_a_complete_stop(events: list[tuple[str, int]]) -> None:
    names = ["monitor", "router-0", "decode-0", "decode-1"]
    supervisor, now = make(*names), 0.0
    for event, number in events:
        now += 0.3
        child = supervisor.children[names[number]]
        if event == "tick":
            start(supervisor, now)
        elif event == "stop":
            supervisor.on_stop(now)
        elif child in supervisor.alive:
            supervisor.on_exit(child.name, event, now)
    supervisor.on_stop(now)
    for _ in range(4):
        now += 100.0
        for action in supervisor.on_tick(now):
            assert isinstance(action, Kill) and action.signal == "KILL"
            supervisor.on_exit(action.name, "signal KILL", now)
    assert supervisor.is_stopped
    assert supervisor.on_tick(now) == []


def names(supervisor: Supervisor) -> list[str]:
    return sorted(supervisor.children)


def test_more_children_take_the_lowest_free_numbers() -> None:
    supervisor = make("monitor", "decode-0", "decode-2")
    start(supervisor, 0.0)
    assert supervisor.on_set_children("decode", 4, (), 1.0) == []
    assert start(supervisor, 1.0) == ["decode-1", "decode-3"]
    assert supervisor.on_set_children("decode", 4, (), 1.0) == [] and supervisor.num_wanted_children("decode") == 4


def test_fewer_children_end_only_those_that_may_and_only_as_many_as_are_too_many() -> None:
    supervisor = make("decode-0", "decode-1", "decode-2")
    start(supervisor, 0.0)
    everybody = [child.process for child in supervisor.alive]
    assert supervisor.on_set_children("decode", 2, (), 1.0) == []
    actions = supervisor.on_set_children("decode", 2, everybody, 1.0)
    assert actions == [Kill("decode-0", "TERM"), Kill("decode-0", "CONT")]
    assert supervisor.on_set_children("decode", 2, everybody, 1.0) == [], "said twice, done once"
    assert supervisor.num_wanted_children("decode") == 2
    supervisor.on_exit("decode-0", "exit 0", 2.0)
    assert names(supervisor) == ["decode-1", "decode-2"] and start(supervisor, 60.0) == []


def test_a_child_that_does_not_run_is_the_first_to_go() -> None:
    supervisor = make("decode-0", "decode-1", "decode-2")
    start(supervisor, 0.0)
    everybody = [child.process for child in supervisor.alive]
    supervisor.on_exit("decode-1", "signal KILL", 1.0)
    assert supervisor.on_set_children("decode", 2, everybody, 1.0) == []
    assert names(supervisor) == ["decode-0", "decode-2"]


def test_a_child_that_does_not_end_when_it_is_not_wanted_is_killed() -> None:
    supervisor = make("prefill-0", "prefill-1")
    start(supervisor, 0.0)
    process = supervisor.children["prefill-1"].process
    assert supervisor.on_set_children("prefill", 1, [process], 1.0)[0] == Kill("prefill-1", "TERM")
    assert supervisor.on_tick(1.0 + CONFIG.agent.stop_s - 0.1) == []
    assert supervisor.on_tick(1.0 + CONFIG.agent.stop_s) == [Kill("prefill-1", "KILL")]


def test_a_stop_while_children_are_being_ended_waits_for_them() -> None:
    supervisor = make("decode-0", "decode-1")
    start(supervisor, 0.0)
    supervisor.on_set_children("decode", 1, [supervisor.children["decode-1"].process], 1.0)
    supervisor.on_stop(1.5)
    assert supervisor.on_set_children("decode", 5, (), 1.6) == [] and len(names(supervisor)) == 2
    supervisor.on_exit("decode-1", "exit 0", 2.0)
    supervisor.on_exit("decode-0", "exit 0", 2.0)
    assert supervisor.is_stopped


def test_only_decode_ranks_and_prefill_workers_are_counted_and_never_none_of_them() -> None:
    supervisor = make("monitor", "decode-0")
    start(supervisor, 0.0)
    everybody = [child.process for child in supervisor.alive]
    for kind, count in (("monitor", 2), ("router", 1), ("decode", 0), ("decode", 10_000)):
        assert supervisor.on_set_children(kind, count, everybody, 1.0) == []
    assert names(supervisor) == ["decode-0", "monitor"]
