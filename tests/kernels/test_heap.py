"""Layout of a heap, and heaps in shared memory."""

import os
from pathlib import Path

import pytest
import torch

from kernels.heap_layout import ALIGNMENT_BYTES, EpShape, HeapLayout
from kernels.symmetric_memory.base import HeapError
from kernels.symmetric_memory.shm import ShmProvider

SHAPE = EpShape(max_ranks=4, max_tokens=8, top_k=2, hidden_size=16)


def test_regions_are_aligned_apart_and_named() -> None:
    layout = HeapLayout.build(SHAPE, {"tags": ((3, 5), torch.int32), "weights": ((2, 7), torch.bfloat16)})
    end = ALIGNMENT_BYTES
    for region in layout.regions.values():
        assert region.offset % ALIGNMENT_BYTES == 0
        assert region.offset >= end
        end = region.offset + region.nbytes
    assert layout.nbytes >= end
    heap = torch.zeros(layout.nbytes, dtype=torch.uint8)
    layout.view(heap, "tags").fill_(-1)
    layout.view(heap, "weights").fill_(1.5)
    assert layout.view(heap, "tags").shape == (3, 5)
    assert int((heap == 255).sum()) == 3 * 5 * 4
    assert int((heap != 0).sum()) == 3 * 5 * 4 + 2 * 7 * 2


def test_only_equal_layouts_go_together() -> None:
    layout = HeapLayout.build(SHAPE, {"tags": ((3,), torch.int32)})
    heap = torch.zeros(layout.nbytes, dtype=torch.uint8)
    with pytest.raises(ValueError, match="rank 1 is not a heap of this version"):
        layout.verify(heap, "the heap of rank 1")
    layout.format(heap)
    layout.verify(heap, "the heap of rank 1")
    for other in ({"tags": ((3,), torch.int64)}, {"tag": ((3,), torch.int32)}, {"tags": ((4,), torch.int32)}):
        with pytest.raises(ValueError, match="rank 1 has another layout"):
            HeapLayout.build(SHAPE, other).verify(heap, "the heap of rank 1")
    with pytest.raises(ValueError, match="bytes, its layout needs"):
        layout.format(heap[:-1])
    with pytest.raises(ValueError, match="one of the EP regions"):
        HeapLayout.build(SHAPE, {"ep_poison": ((1,), torch.int32)})
    with pytest.raises(ValueError, match=r"EpShape\.top_k must be at least 1"):
        EpShape(4, 8, 0, 16)
    with pytest.raises(ValueError, match=r"EpShape\.dtype"):
        EpShape(4, 8, 1, 16, dtype=torch.int32)


def test_a_heap_is_shared_and_outlives_its_owner(heap_dir: Path) -> None:
    provider = ShmProvider(heap_dir)
    heap = provider.allocate("rank0", 10_000)
    assert (heap.nbytes, int(heap.bytes_U8.sum())) == (10_000, 0)
    peer = ShmProvider(heap_dir).map_peer(heap.descriptor)
    peer.bytes_U8[9_999] = 7
    assert heap.bytes_U8[9_999] == 7
    kept = heap.bytes_U8[9_990:]
    provider.close()
    assert kept[9] == 7  # a view outlives close: it cannot fault
    with pytest.raises(HeapError, match="is closed"):
        _ = heap.bytes_U8
    with pytest.raises(HeapError, match="still owned"):
        provider.attach("rank0")  # the view could still write
    del kept
    reborn = provider.attach("rank0")
    assert reborn.bytes_U8[9_999] == 7
    assert reborn.descriptor == heap.descriptor
    reborn.close()
    provider.unlink("rank0")
    provider.unlink("rank0")


def test_one_owner_at_a_time(heap_dir: Path) -> None:
    provider, other = ShmProvider(heap_dir), ShmProvider(heap_dir)
    heap = provider.allocate("rank0", 4096)
    with pytest.raises(HeapError, match="still owned by a living process"):
        other.attach("rank0")
    with pytest.raises(HeapError, match="exists already"):
        other.allocate("rank0", 4096)
    heap.close()
    other.attach("rank0")
    other.close()
    provider.unlink("rank0")


def test_errors_say_what_to_do(heap_dir: Path) -> None:
    provider = ShmProvider(heap_dir)
    with pytest.raises(HeapError, match="does not exist: create it"):
        ShmProvider(heap_dir / "nowhere")
    with pytest.raises(HeapError, match="its owner has unlinked it"):
        provider.attach("rank0")
    with pytest.raises(HeapError, match="not a descriptor"):
        provider.map_peer("vmm:12:/x")
    for name in ("", "../x", ".hidden"):
        with pytest.raises(HeapError, match="bad heap name"):
            provider.allocate(name, 4096)
    with pytest.raises(HeapError, match="nbytes must be positive"):
        provider.allocate("rank0", 0)
    with pytest.raises(HeapError, match=r"no room for heap .* MiB wanted, .* MiB free"):
        provider.allocate("rank0", 1 << 50)
    assert os.listdir(heap_dir) == []
    stale = provider.allocate("rank0", 4096).descriptor
    provider.close()
    provider.unlink("rank0")
    provider.allocate("rank0", 8192)
    with pytest.raises(HeapError, match="8192 bytes, its descriptor says 4096"):
        provider.map_peer(stale)
    provider.close()
    (heap_dir / "rank0").write_bytes(b"")
    with pytest.raises(HeapError, match="is empty"):
        provider.attach("rank0")
    provider.unlink("rank0")


def test_mappings_go_away(heap_dir: Path) -> None:
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(str(heap_dir))

    provider = ShmProvider(heap_dir)
    heap = provider.allocate("rank0", 4096)
    peer = provider.map_peer(heap.descriptor)
    assert mapped() == 2
    peer.close()
    assert mapped() == 1
    provider.close()
    assert mapped() == 0
    provider.unlink("rank0")
