"""Each promise by itself, broken: the checker says so. (That shipped code keeps them is shown by the stories.)"""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from common.ids import Epoch, Incarnation, ProcessId, Rank, RequestId
from common.messages import Placement, RollAnswer, TokenBatch, View
from services.router.request_actions import Deliver
from tests.simulation.checker import Checker
from tests.simulation.decode_node import DecodeNode
from tests.simulation.monitor_node import MonitorNode
from tests.simulation.symbolic_model import whole_output
from tests.simulation.world import Bad, Node, Weather, World

PROMPT, MAX_TOKENS = (5, 6, 7), 6
REQUEST, ROUTER = RequestId("ab.1"), ProcessId("router-0-a")
IDS, FINISH = whole_output(PROMPT, MAX_TOKENS, 1)


@pytest.fixture
def checker() -> Checker:
    world = World(0, Weather(), Weather())
    world.checker = Checker(world, 1)
    world.checker.on_submit(REQUEST, ROUTER, PROMPT, MAX_TOKENS)
    return world.checker


def deliver(checker: Checker, start: int, ids: tuple[int, ...], finish: str = "") -> None:
    checker.on_deliver(Deliver(REQUEST, start, ids, (), finish, (), ()))


def test_the_right_tokens_once_and_in_order_are_fine(checker: Checker) -> None:
    assert "0 of 6 tokens" in checker.unsettled()
    deliver(checker, 0, IDS[:2])
    deliver(checker, 2, IDS[2:], FINISH)
    assert "tokens" not in checker.unsettled()


@pytest.mark.parametrize(
    ("start", "ids", "finish", "says"),
    [
        (2, IDS[2:4], "", "it had 1"),
        (0, IDS[:1], "", "it had 1"),
        (1, (IDS[1], IDS[2] + 1), "", "WRONG TOKEN number 2"),
        (1, (*IDS[1:], 4), "", "WRONG TOKEN number 6"),
        (1, IDS[1:3], "length", "ended after 3 tokens"),
        (1, IDS[1:], "stop", "ended after 6 tokens with stop"),
    ],
)
def test_lost_doubled_wrong_extra_and_missing_tokens(
    checker: Checker, start: int, ids: tuple[int, ...], finish: str, says: str
) -> None:
    deliver(checker, 0, IDS[:1])
    with pytest.raises(Bad, match=says):
        deliver(checker, start, ids, finish)


def test_tokens_that_lack_experts_must_be_marked_and_have_a_reason(checker: Checker) -> None:
    marked = Deliver(REQUEST, 0, (IDS[0] + 1,), (), "", (), (), missed_experts=True)
    with pytest.raises(Bad, match="no view ever lacked one"):
        checker.on_deliver(marked)
    checker.clients[REQUEST].received.clear()
    checker.counts["degraded"] += 1
    checker.on_deliver(marked)
    deliver(checker, 1, (4, 4))
    with pytest.raises(Bad, match="it had 3"):
        deliver(checker, 1, (4, 4))


def test_tokens_after_the_end_or_without_a_client(checker: Checker) -> None:
    deliver(checker, 0, IDS, FINISH)
    with pytest.raises(Bad, match="after its end"):
        deliver(checker, 6, (5,))
    checker.on_client_gone(REQUEST)
    with pytest.raises(Bad, match="client is gone"):
        deliver(checker, 6, (5,))


def test_an_epoch_that_falls(checker: Checker) -> None:
    checker.on_epoch("decode-0-a/7", 12)
    checker.on_epoch("decode-0-a/9", 11)
    with pytest.raises(Bad, match="from epoch 12 back to 11"):
        checker.on_epoch("decode-0-a/7", 11)


def test_two_views_of_one_number_and_a_number_that_falls(checker: Checker) -> None:
    checker.on_published(_view(5, 1))
    with pytest.raises(Bad, match="two views with epoch 5"):
        checker._note_view(_view(5, 2))
    with pytest.raises(Bad, match="published after"):
        checker.on_published(_view(5, 1))


def test_a_former_holder_that_commits(checker: Checker) -> None:
    node = cast(DecodeNode, SimpleNamespace(process="decode-0-a"))
    checker.on_commit(node, TokenBatch(Rank(1), Incarnation(7), Epoch(8), ()))
    checker.on_commit(node, TokenBatch(Rank(1), Incarnation(9), Epoch(10), ()))
    with pytest.raises(Bad, match=r"commits as 1\.7 after 1\.9"):
        checker.on_commit(node, TokenBatch(Rank(1), Incarnation(7), Epoch(8), ()))


def test_a_slot_in_two_hands(checker: Checker) -> None:
    for name in ("a", "b"):
        holder = Node.__new__(DecodeNode)
        holder.process, holder.is_alive = ProcessId(f"decode-0-{name}"), True
        cast(Any, holder).stream = SimpleNamespace(_membership=SimpleNamespace(rank=Rank(2)))
        checker._world.nodes[holder.process] = holder
    with pytest.raises(Bad, match="slot 2 is in the hands"):
        checker.check_slots()


def test_the_removal_of_a_healthy_rank(checker: Checker) -> None:
    node = Node(checker._world, "decode-0", ProcessId("decode-0-a"))
    event = {"kind": "removed", "process": node.process, "evidence": "no heartbeat"}
    monitor = cast(MonitorNode, SimpleNamespace(process="monitor-a"))
    with pytest.raises(Bad, match="healthy rank removed"):
        checker.on_event(monitor, event)
    node.excuse = "killed"
    checker.on_event(monitor, event)


def test_a_roll_call_that_forgives_silence(checker: Checker) -> None:
    members = tuple(SimpleNamespace(process=ProcessId(f"decode-{n}-a")) for n in range(2))
    core = SimpleNamespace(group=SimpleNamespace(members=members))
    monitor = cast(MonitorNode, SimpleNamespace(process="monitor-a", core=core))
    checker.on_event(monitor, {"kind": "roll_call", "epoch": 5})
    checker.on_tell(RollAnswer(members[0].process, Rank(0), Incarnation(1), Epoch(5), 0, ()))
    with pytest.raises(Bad, match=r"decode-1-a.*did not answer"):
        checker._check_roll_call(cast(View, SimpleNamespace(epoch=6, members=members)))


def _view(epoch: int, term: int) -> View:
    return View(ProcessId("m"), term, Epoch(epoch), (), Placement(term, (((0,),),)))
