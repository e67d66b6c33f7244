"""KV of prompts that were computed before, kept for those that begin alike. Pure: it knows blocks by number only.

A radix tree whose digits are whole blocks of tokens (RadixAttention, arXiv:2312.07104): a node stands for all tokens
from the root to it and owns the KV block of the last of them. A row of KV depends on the tokens up to it and on nothing
else, so a block found here holds the very bits that would be computed again.

Requests pin the nodes they read. What nobody pins is evicted when room is needed, leaves first and the longest unused
first: `_idle` is in that order, since a parent is never unpinned, nor used for the last time, before its children.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic

from common.kv_blocks import Owner


@dataclass(eq=False, slots=True)
class _Node:
    tokens: tuple[int, ...]
    block: int
    parent: "_Node | None"
    children: dict[tuple[int, ...], "_Node"] = field(default_factory=dict)
    num_pins: int = 0


@dataclass(frozen=True, slots=True)
class Insertion:
    """Blocks that belong to the cache from now on, and blocks that no longer do."""

    taken: frozenset[int]
    evicted: frozenset[int]


class PrefixCache(Generic[Owner]):
    """Never holds more than ``budget_bytes``; smaller than one block means that nothing is kept."""

    def __init__(self, budget_bytes: int, block_bytes: int, block_size: int) -> None:
        self.max_blocks = budget_bytes // block_bytes
        self._block_bytes, self._block_size = block_bytes, block_size
        self._root = _Node((), -1, None)
        self._pinned: dict[Owner, list[_Node]] = {}
        self._idle: dict[_Node, None] = {}
        self._num_blocks = 0
        self.num_hits = self.num_tokens_saved = 0

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    @property
    def num_bytes(self) -> int:
        return self._num_blocks * self._block_bytes

    def acquire(self, owner: Owner, tokens: Sequence[int]) -> tuple[int, ...]:
        """The blocks of the longest known beginning of ``tokens``, in order; they stay until ``owner`` releases them.

        At least one token is left over: somebody wants to know what comes after it.
        """
        assert owner not in self._pinned, f"{owner} holds blocks already"
        path, node = [], self._root
        for key in self._keys(tokens[:-1]):
            if (child := node.children.get(key)) is None:
                break
            node = child
            path.append(node)
        self._pin(path)
        self._pinned[owner] = path
        return tuple(node.block for node in path)

    def count(self, num_tokens: int) -> None:
        """For the counters: what was acquired has been used in place of so many computed tokens."""
        self.num_hits += num_tokens > 0
        self.num_tokens_saved += num_tokens

    def release(self, owner: Owner) -> None:
        """No error when there is nothing to release: aborts may come twice."""
        self._unpin(self._pinned.pop(owner, []))

    def insert(self, tokens: Sequence[int], table: Sequence[int]) -> Insertion:
        """Keeps what is new of the whole blocks of ``tokens``, whose KV lies in ``table``, as far as there is room."""
        path: list[_Node] = []
        taken: set[int] = set()
        evicted: set[int] = set()
        node = self._root
        for key, block in zip(self._keys(tokens), table, strict=False):
            child = node.children.get(key)
            if child is None:
                if self._num_blocks >= self.max_blocks and not self._evict(evicted):
                    break
                child = node.children[key] = _Node(key, block, node)
                self._num_blocks += 1
                taken.add(block)
            node = child
            self._pin([node])
            path.append(node)
        self._unpin(path)
        return Insertion(frozenset(taken), frozenset(evicted))

    def check_invariants(self) -> None:
        nodes = list(self._nodes(self._root))
        pins = [node for path in self._pinned.values() for node in path]
        assert len(nodes) == self._num_blocks <= max(self.max_blocks, 0), "more than the budget"
        assert len({node.block for node in nodes}) == len(nodes), "two nodes share a block"
        assert all(node.num_pins == pins.count(node) for node in nodes)
        assert {node for node in nodes if not node.num_pins} == self._idle.keys()
        order = {node: place for place, node in enumerate(self._idle)}
        for node in self._idle:
            assert all(order[child] < order[node] for child in node.children.values()), "a parent goes before its child"

    def _keys(self, tokens: Sequence[int]) -> Iterator[tuple[int, ...]]:
        size = self._block_size
        return (tuple(tokens[start : start + size]) for start in range(0, len(tokens) - size + 1, size))

    def _pin(self, path: list[_Node]) -> None:
        for node in path:
            node.num_pins += 1
            self._idle.pop(node, None)

    def _unpin(self, path: list[_Node]) -> None:
        for node in reversed(path):
            node.num_pins -= 1
            if not node.num_pins:
                self._idle[node] = None

    def _evict(self, evicted: set[int]) -> bool:
        """Forgets the leaf that was unused longest; False when all are in use."""
        node = next(iter(self._idle), None)
        if node is None or node.parent is None:
            return False
        del self._idle[node], node.parent.children[node.tokens]
        self._num_blocks -= 1
        evicted.add(node.block)
        return True

    def _nodes(self, node: _Node) -> Iterator[_Node]:
        stack = list(node.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack += node.children.values()
