"""A router is replaced by another beside it, and never by nothing."""

from common.ids import ProcessId
from services.agent.supervisor import ChildState, GiveUp, Kill
from tests.unit.agent.supervised import make, start


def test_a_router_is_replaced_by_one_beside_it() -> None:
    supervisor = make("monitor", "router-0", "router-1", "decode-0")
    start(supervisor, 0.0)
    old = supervisor.children["router-0"].process
    assert supervisor.on_restart(old, 20.0) == [Kill("router-0", "USR1"), Kill("router-0", "CONT")]
    assert supervisor.on_restart(old, 20.0) == [], "once"
    assert start(supervisor, 20.0) == ["router-2"]
    assert supervisor.num_wanted_children("router") == 2
    assert supervisor.on_tick(52.0) == [], "it may wait for the successor, and then drain"
    assert supervisor.on_tick(53.1) == [Kill("router-0", "KILL")]
    assert supervisor.on_exit("router-0", "exit 0", 54.0) == []
    assert start(supervisor, 60.0) == [] and sorted(supervisor.children)[-2:] == ["router-1", "router-2"]
    assert supervisor.on_restart(supervisor.children["router-1"].process, 61.0)
    assert start(supervisor, 61.0) == ["router-0"], "the lowest free number"


def test_only_running_routers_are_replaced() -> None:
    supervisor = make("monitor", "router-0", "decode-0")
    assert supervisor.on_restart(supervisor.children["router-0"].process, 0.0) == []
    start(supervisor, 0.0)
    assert supervisor.on_restart(supervisor.children["decode-0"].process, 1.0) == []
    assert supervisor.on_restart(ProcessId("router-0-unknown"), 1.0) == []
    supervisor.on_stop(2.0)
    assert supervisor.on_restart(supervisor.children["router-0"].process, 2.0) == []


def test_routers_that_a_former_life_was_replacing_do_not_become_more() -> None:
    supervisor = make("router-0", "router-1")
    for number in (1, 2):  # router-2 had taken the place of router-0, which is gone
        name = f"router-{number}"
        if name not in supervisor.children:
            supervisor.add(name, 0.0)
        supervisor.on_spawned(name, ProcessId(f"{name}-a"), 1000 + number, 0.0)
    supervisor.keep_routers(2)
    assert sorted(supervisor.children) == ["router-1", "router-2"] and start(supervisor, 1.0) == []
    supervisor.on_exit("router-2", "signal KILL", 2.0)
    supervisor.keep_routers(2)
    assert start(supervisor, 3.0) == ["router-2"]


def test_a_replaced_router_whose_successor_was_given_up_leaves_no_cluster_without_a_router_behind() -> None:
    supervisor = make("monitor", "router-0", "decode-0")
    start(supervisor, 0.0)
    supervisor.on_restart(supervisor.children["router-0"].process, 20.0)
    assert start(supervisor, 20.0) == ["router-1"]
    assert supervisor.on_exit("router-1", "exit 2", 21.0) == []
    assert start(supervisor, 25.0) == ["router-1"]
    given_up = supervisor.on_exit("router-1", "exit 2", 26.0)
    assert given_up == [GiveUp("router-1", "exit 2 (2 deaths)", fatal=False)], "the old one still serves"
    (end,) = supervisor.on_exit("router-0", "exit 0", 40.0)
    assert isinstance(end, GiveUp) and end.fatal and end.name == "router-1"
    assert supervisor.children["router-1"].state is ChildState.GIVEN_UP
