"""Ranks that sleep are woken by what is stored for them, not by the end of their sleep."""

import threading
import time
from functools import partial
from pathlib import Path

import pytest

from kernels import word_wait
from kernels.epoch_state import VoidReason
from kernels.reference import ElasticGroup
from tests.kernels.local_group import Placement, Tokens, local_group, moe_layer

LONG_S = 30.0
MEMBERS = [0, 1, 2]


def run_layer(placement: Placement, group: ElasticGroup) -> bool:
    return moe_layer(group, Tokens.random(group.rank, 3), placement) is not None


@pytest.fixture
def long_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than the test groups wait for anything: a ring that is lost is seen."""
    monkeypatch.setattr(word_wait, "_SHORT_SLEEP_S", LONG_S)


@pytest.mark.usefixtures("long_sleeps")
def test_every_word_is_rung_for(heap_dir: Path) -> None:
    with local_group(heap_dir, 3) as cluster:
        cluster.enter(1, MEMBERS)
        start = time.monotonic()
        for seed in range(30):
            assert all(cluster.run(partial(run_layer, Placement.random(seed, MEMBERS))).values())
            assert all(cluster.run(lambda group: group.clean_buffer(LONG_S)).values())
            assert all(cluster.run(lambda group: group.allgather([7])).values())
        assert time.monotonic() - start < LONG_S
        assert sum(int(group.wait_ns_by_source().sum()) for group in cluster.ranks), "nobody ever waited"


@pytest.mark.usefixtures("long_sleeps")
@pytest.mark.parametrize("by", ["a peer", "the host"])
def test_poison_wakes_whoever_sleeps_for_another(heap_dir: Path, by: str) -> None:
    with local_group(heap_dir, 3) as cluster:
        cluster.enter(1, MEMBERS)
        sleeper = cluster.ranks[0]
        sleeping_for = cluster.layout.view(cluster.heaps[0].bytes_U8, "ep_sleeper")
        waiting = threading.Thread(target=sleeper.clean_buffer, args=(LONG_S,), daemon=True)
        waiting.start()
        deadline = time.monotonic() + LONG_S
        while not sleeping_for[0] and time.monotonic() < deadline:
            time.sleep(0)
        assert sleeping_for[0] == 3, "it sleeps for the last of the members"
        start = time.monotonic()
        while waiting.is_alive() and time.monotonic() < start + LONG_S:
            # Again and again: the first may come between the look at the words and the sleep.
            cluster.ranks[1].poison_members() if by == "a peer" else sleeper.poison_self()
            cluster.ranks[1].status = 0
            waiting.join(0.05)
        assert time.monotonic() - start < LONG_S / 2
        assert sleeper.void_reason is (VoidReason.PEER_POISON if by == "a peer" else VoidReason.HOST_POISON)
