"""Who owns which KV block. Pure: ids only, the memory lies elsewhere.

A block is free or belongs to exactly one owner; an owner gets all its blocks at once and gives them back at once, so
nothing can be freed twice or kept in part. Freeing an owner without blocks is no error: aborts may come twice.
"""

from collections.abc import Hashable
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
        wanted = self.blocks_for(num_positions)
        if wanted > len(self._free):
            return None
        table = tuple(self._free.pop() for _ in range(wanted))
        self._tables[owner] = table
        return table

    def free(self, owner: Owner) -> None:
        self._free += reversed(self._tables.pop(owner, ()))

    def table(self, owner: Owner) -> tuple[int, ...]:
        """Blocks of ``owner``; KeyError if it has none."""
        return self._tables[owner]

    def check_invariants(self) -> None:
        """Every block is free or owned, and only once."""
        blocks = self._free + [block for table in self._tables.values() for block in table]
        assert sorted(blocks) == list(range(self.num_blocks)), f"a block leaked or is shared: {sorted(blocks)}"
