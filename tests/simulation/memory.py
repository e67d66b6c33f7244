"""Heaps as memory of the world, and the windows through which other ranks write into them.

Every store into another rank's heap is a step: the writer may die, be stopped or pause before it. So a crash falls
between payload and word, or between the word to one member and that to the next, and a zombie's late store lands when
the zombie wakes. A store wakes whoever waits on that heap.
"""

from pathlib import Path
from typing import Any

import torch

from kernels.heap_layout import HeapLayout
from kernels.heap_window import HeapWindow
from kernels.symmetric_memory.base import HeapError
from tests.simulation.stream_task import StreamTask
from tests.simulation.world import Node, World


class MemoryHeap:
    """Own or a peer's; the bytes are shared."""

    def __init__(self, name: str, bytes_U8: torch.Tensor) -> None:
        self.descriptor, self._bytes_U8 = name, bytes_U8

    @property
    def nbytes(self) -> int:
        return self._bytes_U8.numel()

    @property
    def bytes_U8(self) -> torch.Tensor:
        return self._bytes_U8

    def close(self) -> None:
        pass


class Memory:
    """All heaps of a world, also those that are unlinked: somebody may still map them."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.files: dict[str, torch.Tensor] = {}
        self.tasks: dict[str, StreamTask] = {}  # by process
        self._owners: dict[int, tuple[torch.Tensor, Node]] = {}

    def make(self, name: str, nbytes: int, owner: Node) -> torch.Tensor:
        if name in self.files:
            raise HeapError(f"heap {name} exists already")
        heap = torch.zeros(nbytes, dtype=torch.uint8)
        self.files[name] = heap
        owner.life += 1
        self._owners[heap.data_ptr()] = (heap, owner)
        return heap

    def owner_of(self, bytes_U8: torch.Tensor) -> Node:
        return self._owners[bytes_U8.data_ptr()][1]

    def remove_files_of(self, node: Node) -> None:
        """Its agent has reaped it."""
        for name in [name for name in self.files if name.startswith(f"{node.process}.")]:
            del self.files[name]

    def window(self, layout: HeapLayout, bytes_U8: torch.Tensor) -> Any:
        """What stands in for `HeapWindow(layout, bytes_U8)`."""
        writer, owner = self.world.running, self.owner_of(bytes_U8)
        assert writer is not None, "heaps are mapped by streams"
        window = HeapWindow(layout, bytes_U8)
        if owner is writer:
            return window
        return RemoteWindow(window, _Writer(writer, self.tasks[writer.process], owner, self.tasks))


class MemoryProvider:
    """A `HeapProvider` of the process that is running."""

    def __init__(self, memory: Memory) -> None:
        assert memory.world.running is not None
        self._memory, self._node = memory, memory.world.running

    def allocate(self, name: str, nbytes: int) -> MemoryHeap:
        return MemoryHeap(name, self._memory.make(name, nbytes, self._node))

    def map_peer(self, descriptor: str) -> MemoryHeap:
        name = Path(descriptor.split(":", 2)[2]).name
        if name not in self._memory.files:
            raise HeapError(f"heap {name} does not exist")
        return MemoryHeap(name, self._memory.files[name])

    def unlink(self, name: str) -> None:
        if self._node.is_alive:
            self._memory.files.pop(name, None)


class _Writer:
    """One process as it writes into another's heap."""

    def __init__(self, node: Node, task: StreamTask, owner: Node, tasks: dict[str, StreamTask]) -> None:
        self.node, self.task, self._owner, self._tasks = node, task, owner, tasks

    @property
    def reaches(self) -> bool:
        """A path that has failed once stays so until the two are connected anew; a cable, until it is mended."""
        node, owner = self.node, self._owner
        world = node.world
        is_cut = world.broken_cables.get((node.name, owner.name), 0.0) > world.now
        is_broken = world.broken_paths.get((node.process, owner.process)) == (node.life, owner.life)
        return node.is_alive and not is_cut and not is_broken

    def notify(self) -> None:
        self._tasks[self._owner.process].notify(by_memory=True)


class RemoteArray:
    """A word row or payload array of another rank's heap."""

    __slots__ = ("_array", "_writer")

    def __init__(self, array: Any, writer: _Writer) -> None:
        self._array, self._writer = array, writer

    def __setitem__(self, index: Any, value: Any) -> None:
        writer = self._writer
        writer.task.step()
        if writer.reaches:
            self._array[index] = value
            writer.notify()

    def __getitem__(self, index: Any) -> Any:
        """Payload is written through a view of the array: a step before it, and nothing at all by the dead."""
        writer = self._writer
        writer.task.step()
        return self._array[index] if writer.reaches else self._array[index].copy()


class RemoteWindow:
    """The names of `HeapWindow`."""

    def __init__(self, window: HeapWindow, writer: _Writer) -> None:
        def remote(array: Any) -> RemoteArray:
            return RemoteArray(array, writer)

        self.poison = remote(window.poison)
        self.barrier_word = [remote(row) for row in window.barrier_word]
        self.combine_word = remote(window.combine_word)
        self.dispatch_word = remote(window.dispatch_word)
        self.dispatch_num_rows = remote(window.dispatch_num_rows)
        self.header_word = [remote(row) for row in window.header_word]
        self.header_data = remote(window.header_data)
        self.dispatch_rows = remote(window.dispatch_rows)
        self.combine_rows = remote(window.combine_rows)
