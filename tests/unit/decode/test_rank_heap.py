"""Heaps of peers: mapped once for each incarnation, and not before they are whole."""

from pathlib import Path

import pytest

from common.config import DecodeConfig
from common.ids import Incarnation, ProcessId, Rank
from common.messages import Member
from common.model.checkpoint import Checkpoint
from kernels.symmetric_memory.base import HeapError
from kernels.symmetric_memory.shm import ShmProvider
from services.decode.rank_heap import PeerHeaps, heap_name, rank_heap_layout

TINY = Path(__file__).parents[2] / "fixtures" / "tiny-random"


def test_layout_follows_from_model_and_configuration() -> None:
    checkpoint, decode = Checkpoint.open(TINY), DecodeConfig(num_kv_blocks=8)
    layout = rank_heap_layout(checkpoint, decode)
    assert layout.regions["expert_weights"].shape[0] == 2 * 24 + 24, "slots, and room for as many as a layer has"
    assert layout.digest == rank_heap_layout(checkpoint, decode).digest
    assert layout.digest != rank_heap_layout(checkpoint, DecodeConfig(num_kv_blocks=9)).digest


def test_peer_heaps(tmp_path: Path) -> None:
    layout = rank_heap_layout(Checkpoint.open(TINY), DecodeConfig(num_kv_blocks=8, max_ranks=4))
    name = heap_name(ProcessId("decode-1"), 0)
    path = tmp_path / name
    owner, provider = ShmProvider(tmp_path), ShmProvider(tmp_path)
    peers = PeerHeaps(provider, layout)
    member = Member(Rank(1), Incarnation(5), ProcessId("decode-1"), "h", "tcp://1", str(path))
    with pytest.raises(HeapError):
        peers.map(member)
    heap = owner.allocate(name, layout.nbytes)
    with pytest.raises(HeapError):
        peers.map(member)
    layout.format(heap.bytes_U8)
    assert peers.map(member) is not None
    assert peers.map(member) is None, "mapped already"
    again = Member(Rank(1), Incarnation(9), ProcessId("decode-1b"), "h", "tcp://1", str(path))
    assert peers.map(again) is not None, "another incarnation is another heap"
    assert peers.ranks() == (1,)
    peers.close()
    assert peers.ranks() == ()
    for each in (owner, provider):
        each.close()
    owner.unlink(name)
