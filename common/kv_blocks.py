"""Who owns which KV block. Pure: ids only, the memory lies elsewhere.

A block is free or belongs to exactly one owner, whose table lists its blocks in the order of the positions in them.
Freeing an owner without blocks is no error: aborts may come twice.
"""

from collections.abc import Collection, Hashable
from typing import Generic, TypeVar

Owner = TypeVar("Owner", bound=Hashable)


class BlockAllocator(Generic[Owner]):
    """Blocks 0..num_blocks-1 of ``block_size`` positions each."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._tables: dict[Owner, tuple[int, ...]] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_positions: int) -> int:
        return -(-num_positions // self.block_size)

    def allocate(self, owner: Owner, num_positions: int) -> tuple[int, ...] | None:
        """Blocks for ``num_positions`` positions, in order; None, and nothing changed, when there are too few."""
        if owner in self._tables:
            raise ValueError(f"{owner} owns blocks already")
        self._tables[owner] = ()
        if self.grow(owner, num_positions):
            return self._tables[owner]
        del self._tables[owner]
        return None

    def grow(self, owner: Owner, num_positions: int) -> bool:
        """Adds blocks to those of ``owner`` until they hold that many positions; False, and nothing changed, when there
        are too few."""
        table = self._tables[owner]
        wanted = self.blocks_for(num_positions) - len(table)
        if wanted <= 0:
            return True
        if wanted > len(self._free):
            return False
        self._tables[owner] = table + tuple(self._free.pop() for _ in range(wanted))
        return True

    def free(self, owner: Owner) -> None:
        self._free += reversed(self._tables.pop(owner, ()))

    def free_some(self, owner: Owner, blocks: Collection[int]) -> None:
        """Only these of its blocks."""
        self._free += self._take_away(owner, blocks)

    def give(self, owner: Owner, blocks: Collection[int], to: Owner) -> None:
        """These blocks of ``owner`` belong to another from now on, behind those that it has."""
        self._tables[to] = self._tables.get(to, ()) + tuple(self._take_away(owner, blocks))

    def table(self, owner: Owner) -> tuple[int, ...]:
        """Blocks of ``owner``; KeyError if it has none."""
        return self._tables[owner]

    def _take_away(self, owner: Owner, blocks: Collection[int]) -> list[int]:
        table = self._tables[owner]
        taken = [block for block in table if block in blocks]
        if len(taken) != len(blocks):
            raise ValueError(f"not all of {sorted(blocks)} belong to {owner}")
        self._tables[owner] = tuple(block for block in table if block not in blocks)
        return taken

    def check_invariants(self) -> None:
        """Every block is free or owned, and only once."""
        blocks = self._free + [block for table in self._tables.values() for block in table]
        assert sorted(blocks) == list(range(self.num_blocks)), f"a block leaked or is shared: {sorted(blocks)}"
