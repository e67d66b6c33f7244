"""Whom a process obeys, when it greets again, when it asks for what it missed."""

import pytest

from common.config import ClusterConfig
from common.ids import Epoch, ProcessId
from common.messages import (
    Directory,
    Exited,
    HeartbeatReply,
    Message,
    Placement,
    Prepare,
    RollCall,
    SetChildren,
    View,
    Welcome,
)
from common.obedience import Obedience

OLD, NEW = (ProcessId("old"), 1024), (ProcessId("new"), 2048)


def words(monitor: ProcessId, term: int) -> list[Message]:
    """All words that name a monitor, its heartbeat replies apart."""
    view = View(monitor, term, Epoch(term + 1), (), Placement(0, ()))
    directory = Directory(monitor, term, 7, ())
    return [
        view,
        directory,
        Welcome(monitor, term, ClusterConfig(), directory),
        RollCall(monitor, term, Epoch(term + 1)),
        SetChildren(monitor, term, "decode", 2, ()),
        Prepare(view, Epoch(0)),
    ]


@pytest.mark.parametrize("index", range(6))
def test_after_a_word_of_a_later_term_no_word_of_the_old_monitor_counts(index: int) -> None:
    obedience = Obedience()
    assert all(obedience.on_message(word) for word in words(*OLD))
    assert obedience.on_message(words(*NEW)[index])
    num_words = obedience.num_words
    assert not any(obedience.on_message(word) for word in words(*OLD))
    assert not any(obedience.on_message(word) for word in words(ProcessId("rival"), NEW[1]))
    assert (obedience.monitor, obedience.term, obedience.num_words) == (*NEW, num_words)


def test_words_without_a_monitor_are_for_everybody() -> None:
    assert Obedience().on_message(Exited("agent-0", ProcessId("decode-0-a"), "decode-0", 7, "exit 0"))


def test_it_greets_again_when_the_monitor_is_new_or_does_not_know_it() -> None:
    obedience = Obedience()
    obedience.on_message(words(*OLD)[2])
    assert obedience.is_welcomed
    assert not obedience.on_reply(HeartbeatReply(*OLD, Epoch(0), 7, known=False), Epoch(0))
    assert not obedience.is_welcomed
    obedience.on_message(words(*OLD)[2])
    assert not obedience.on_reply(HeartbeatReply(*NEW, Epoch(0), 0), Epoch(0))
    assert not obedience.is_welcomed
    assert not obedience.on_reply(HeartbeatReply(*OLD, Epoch(5000), 9), Epoch(0))


def test_it_asks_when_it_lacks_a_view_or_a_directory() -> None:
    obedience = Obedience()
    obedience.on_message(words(*OLD)[2])
    assert not obedience.on_reply(HeartbeatReply(*OLD, Epoch(1030), 7), Epoch(1030))
    assert obedience.on_reply(HeartbeatReply(*OLD, Epoch(1031), 7), Epoch(1030))
    assert obedience.on_reply(HeartbeatReply(*OLD, Epoch(1030), 8), Epoch(1030))


def test_who_has_the_view_and_is_not_in_it_asks_now_and_then() -> None:
    obedience = Obedience()
    for word in (words(*OLD)[2], words(*OLD)[0]):
        obedience.on_message(word)
    asked = [obedience.on_reply(HeartbeatReply(*OLD, Epoch(1025), 7), Epoch(0)) for _ in range(40)]
    assert sum(asked) == 4
    assert not asked[0]
    assert obedience.on_reply(HeartbeatReply(*OLD, Epoch(1026), 7), Epoch(0)), "a newer one is asked for at once"
