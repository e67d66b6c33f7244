"""No KV block leaks or is shared, whatever is allocated and freed in whatever order."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.kv_blocks import BlockAllocator


def test_example() -> None:
    blocks: BlockAllocator[str] = BlockAllocator(num_blocks=4, block_size=16)
    assert blocks.allocate("a", 17) == (0, 1)
    assert blocks.allocate("b", 33) is None
    assert blocks.allocate("b", 32) == (2, 3)
    blocks.free("a")
    blocks.free("a")
    assert (blocks.num_free, blocks.num_used, blocks.table("b")) == (2, 2, (2, 3))


def test_one_owner_allocates_once() -> None:
    blocks: BlockAllocator[str] = BlockAllocator(4, 16)
    blocks.allocate("a", 1)
    with pytest.raises(ValueError, match="owns blocks already"):
        blocks.allocate("a", 1)


def test_an_owner_grows_and_gives_away() -> None:
    blocks: BlockAllocator[str] = BlockAllocator(4, 16)
    blocks.allocate("a", 1)
    assert blocks.grow("a", 16) and blocks.table("a") == (0,)
    assert blocks.grow("a", 48) and blocks.table("a") == (0, 1, 2)
    assert not blocks.grow("a", 65) and blocks.table("a") == (0, 1, 2)
    blocks.give("a", {1, 2}, "b")
    blocks.give("a", {0}, "b")
    assert blocks.table("b") == (1, 2, 0)
    with pytest.raises(ValueError, match="belong to b"):
        blocks.free_some("b", {3})
    blocks.free_some("b", {2})
    blocks.check_invariants()
    assert (blocks.table("a"), blocks.table("b"), blocks.num_free) == ((), (1, 0), 2)


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 70)), max_size=60))
def test_blocks_are_free_or_owned_once(operations: list[tuple[str, int]]) -> None:
    blocks: BlockAllocator[str] = BlockAllocator(8, 10)
    owned: dict[str, tuple[int, ...]] = {}
    for owner, num_positions in operations:
        if owner in owned:
            blocks.free(owner)
            del owned[owner]
        elif (table := blocks.allocate(owner, num_positions)) is not None:
            assert len(table) == blocks.blocks_for(num_positions)
            owned[owner] = table
        else:
            assert blocks.blocks_for(num_positions) > blocks.num_free
        assert blocks.num_used == sum(map(len, owned.values()))
        blocks.check_invariants()
