"""One rank's membership, status and waits: what every implementation of the operations shares on the host. PROTOCOL
section 2.

    adopt(e) --> CLEAN --a wait without all its words, leave, poison_members--> VOID --adopt(e' > e)--> CLEAN

A VOID rank publishes nothing more in that epoch, neither payload nor words, only poison: so a word always stands for
complete data, and whoever finishes a round CLEAN has received complete data.

Threads: one thread makes the calls; only ``poison_self`` may come from another.

Legend: W max_ranks.
"""

import threading
import time
from collections.abc import Callable, Sequence
from enum import Enum

import numpy as np
import torch

from kernels.doorbell import Doorbell
from kernels.elastic_mode import ElasticMode, LateRanksError
from kernels.heap_layout import HeapLayout
from kernels.heap_window import HeapWindow, OwnWords, require_ordered_stores
from kernels.peer_windows import LinkFault, PeerWindows
from kernels.step_words import epoch_floor
from kernels.symmetric_memory.base import PeerHeap, SymmetricHeap
from kernels.word_wait import Clock, Pause, WaitEnd, WordWait

CLEAN = 0
VOID = 1


class VoidReason(Enum):
    """What made the rank void; DEADLINE is the only one that accuses (``observation_mask``)."""

    DEADLINE = "deadline"
    PEER_POISON = "peer_poison"
    HOST_POISON = "host_poison"
    STOPPED = "stopped"
    FUTURE_WORD = "future_word"
    DIGEST = "digest"
    ROUTING = "routing"
    LEFT = "left"


class EpochState:
    """Base of ``ElasticGroup``. Raises ValueError for arguments that no group could accept, RuntimeError for calls
    out of order.

    ``status``, ``void_reason``, ``epoch``, ``members`` (sorted slots) and ``digest`` may be read at any time;
    ``deadline_s`` may be set between operations.
    """

    def __init__(
        self,
        layout: HeapLayout,
        heap: SymmetricHeap,
        rank: int,
        *,
        deadline_s: float,
        elastic: ElasticMode = ElasticMode.VIEWS,
        clock: Clock = time.monotonic,
        pause: Pause | None = None,
    ) -> None:
        require_ordered_stores()
        max_ranks = layout.ep.max_ranks
        if not 0 <= rank < max_ranks:
            raise ValueError(f"rank {rank} is not in 0..{max_ranks - 1}")
        if elastic is ElasticMode.BARE:
            raise ValueError("elastic: the CPU data path has no bare form")
        layout.verify(heap.bytes_U8, "the own heap")
        self.layout = layout
        self.rank = rank
        self.deadline_s = deadline_s
        self.elastic = elastic
        self.status = CLEAN
        self.void_reason: VoidReason | None = None
        self.epoch = 0
        self.members: tuple[int, ...] = ()
        self.digest = 0
        self._own = HeapWindow(layout, heap.bytes_U8)
        self._windows = PeerWindows(layout, rank, self._own)
        # What an earlier process of this slot said to itself; its poison of others is old by its epoch.
        self._own.poison[rank] = 0
        self._poison_lock = threading.Lock()
        self._bell = Doorbell(rank, self._windows)
        self._rings = pause is None  # nobody sleeps where tests let time pass
        self._wait: WordWait = WordWait(rank, self._own.poison, self._bell, clock, pause)
        self._floor = 0
        self._n = 0
        self._observed = [0] * max_ranks
        self._unheard: tuple[int, ...] = ()
        self._routable_W = np.zeros(max_ranks, dtype=bool)
        self._masked_W = np.ones(max_ranks, dtype=bool)

    @property
    def step(self) -> int:
        """Step word of the last operation begun; the lowest of the epoch before the first."""
        return self._floor | self._n

    @property
    def missing(self) -> tuple[int, ...]:
        """Ranks whose word this rank lacks right now, or lacked when the last wait ended, for whatever reason it ended.
        Evidence, not an accusation. May be read from any thread.
        """
        return self._wait.missing

    @property
    def unheard(self) -> tuple[int, ...]:
        """Ranks whose word was missing when something else than an own deadline ended a wait of this epoch: for the
        roll call. Of a wait without a deadline also when a peer's poison ended it, less those who sent that poison:
        they wait for somebody themselves.
        """
        return self._unheard

    def wait_ns_by_source(self) -> torch.Tensor:
        """int64 [W]: nanoseconds that this rank has waited for each slot since this object was made. From any thread.

        Only grows. A word that was there at the first look costs nothing, so the slowest rank stands out at all
        others.
        """
        return torch.tensor(self._wait.waited_ns(), dtype=torch.int64)

    def set_link_fault(self, fault: LinkFault) -> None:
        """From now on ``fault`` says which words between this rank and the others are lost."""
        self._windows.fault = self._wait.fault = fault

    def set_while_waiting(self, call: Callable[[], None]) -> None:
        """From now on ``call`` is called every few milliseconds of a wait. It must return at once."""
        self._wait.while_waiting = call

    def map_peer(self, rank: int, peer_heap: PeerHeap) -> None:
        """Use ``peer_heap`` for slot ``rank`` from now on, also in place of an earlier one. ValueError if its layout
        differs.
        """
        if rank == self.rank or not 0 <= rank < self.layout.ep.max_ranks:
            raise ValueError(f"cannot map rank {rank} as a peer of rank {self.rank}")
        self.layout.verify(peer_heap.bytes_U8, f"the heap of rank {rank}")
        self._windows[rank] = HeapWindow(self.layout, peer_heap.bytes_U8)

    def unmap_peer(self, rank: int) -> None:
        """Forget the heap of a slot that is no member (no error if it is not mapped). The caller closes the peer
        heap.
        """
        if rank in self.members or rank == self.rank:
            raise ValueError(f"rank {rank} is a member of epoch {self.epoch}: adopt a view without it first")
        self._windows.pop(rank, None)

    def adopt(self, epoch: int, members: Sequence[int], digest: int, *, in_band: bool = False) -> None:
        """Leave the current epoch and enter ``epoch``: status, observation, masks and step counter begin anew.

        Only between operations. Poisons all members of the old epoch first, whether this rank was waiting or not
        (PROTOCOL 2.6); not so ``in_band``, when all members do the same after a clean round: a slower one may still
        read the last words of that round, and poison would make it void. ``digest``: 32 bits of the view and of the
        active placement. Set ``digest`` anew when a placement becomes active in mid-epoch.
        """
        floor = epoch_floor(epoch)
        if epoch <= self.epoch:
            raise ValueError(f"epoch {epoch} is not above the current epoch {self.epoch}")
        if self.rank not in members:
            raise ValueError(f"rank {self.rank} is not in the view of epoch {epoch}: call leave()")
        unmapped = sorted(set(members) - set(self._windows))
        if unmapped:
            raise ValueError(f"epoch {epoch} has members whose heaps are not mapped here: {unmapped}")
        if not in_band:
            self._poison_peers()
        self.members = tuple(sorted(set(members)))
        self.epoch, self._floor, self._n = epoch, floor, 0
        self.digest = digest
        self.status, self.void_reason = CLEAN, None
        self._wait.missing = self._unheard = ()
        self._observed = [0] * len(self._observed)
        self._masked_W[:] = True
        self._masked_W[list(self.members)] = False
        self._routable_W[:] = ~self._masked_W

    def leave(self) -> None:
        """This rank is out of the group: poison its members and publish nothing more until it adopts a view again."""
        self.status, self.void_reason = VOID, VoidReason.LEFT
        self._poison_peers()
        self.members = ()

    def observation_mask(self) -> torch.Tensor:
        """int32 [W]: 1 = was late at an own deadline in this epoch. Kernels observe, the monitor decides."""
        return torch.tensor(self._observed, dtype=torch.int32)

    def query_mask_buffer(self) -> torch.Tensor:
        """int32 [W]: 1 = neither sent to nor waited for."""
        return torch.from_numpy(self._masked_W.astype(np.int32))

    def update_mask_buffer(self, rank: int, masked: bool) -> None:
        """Mask or unmask a mapped rank without a view, for engines that have no monitor.

        All ranks must do the same between the same two operations. Entries routed to a rank masked in this way are
        dropped; those routed to a rank outside the view stay an error.
        """
        if rank == self.rank or rank not in self._windows:
            raise ValueError(f"rank {rank} is not a mapped peer")
        self._masked_W[rank] = masked
        self._routable_W[rank] |= not masked
        self.members = tuple(np.flatnonzero(~self._masked_W).tolist())

    def poison_self(self, epoch: int | None = None) -> None:
        """End this rank's own waits in ``epoch`` (default: the current one) and before, at once, accusing nobody.
        From any thread.

        A host thread should name the epoch it means: by the time this runs, the stream may be in the next one.
        """
        word = epoch_floor(self.epoch if epoch is None else epoch) | 1
        with self._poison_lock:
            self._own.poison[self.rank] = max(self._own.poison[self.rank], word)
        self._bell.rouse([self.rank])

    def poison_members(self) -> None:
        """Make this rank void, accusing nobody, and tell every member."""
        self._void(VoidReason.STOPPED)

    def _next_step(self) -> int:
        if self.epoch == 0:
            raise RuntimeError("no view adopted yet")
        self._n += 1
        return self.step

    def _await_words(
        self, words: OwnWords, step: int, deadline_s: float | None, stop: Callable[[], bool] | None = None
    ) -> bool:
        end = self._wait.until(words, self.members, step, self._floor, deadline_s, stop)
        if end is WaitEnd.COMPLETE:
            return True
        if end is WaitEnd.DEADLINE:
            for rank in self._wait.missing:
                self._observed[rank] = 1
            if self.elastic is ElasticMode.ALONE:
                self._masked_W[list(self._wait.missing)] = True
                self.members = tuple(np.flatnonzero(~self._masked_W).tolist())
                return True
        if end in (WaitEnd.HOST_POISON, WaitEnd.STOPPED):
            self._unheard = self._wait.missing
        elif end is WaitEnd.PEER_POISON and deadline_s is None:
            self._unheard = tuple(rank for rank in self._wait.missing if self._own.poison[rank] < self._floor)
        self._void(VoidReason(end.value))
        if self.elastic is ElasticMode.OFF:
            raise LateRanksError(
                f"gave up waiting in epoch {self.epoch}, operation {self._n} ({end.value}): nothing came from ranks "
                f"{list(self._wait.missing)}, deadline {deadline_s} s; elastic mode is off"
            )
        return False

    def _void(self, reason: VoidReason) -> None:
        """Status first: nothing is published after it. A peer that poisoned us has told everybody itself."""
        if self.status == VOID:
            return
        self.status, self.void_reason = VOID, reason
        if reason is not VoidReason.PEER_POISON:
            self._poison_peers()

    def _poison_peers(self) -> None:
        for member in self.members:
            if member != self.rank:
                self._windows[member].poison[self.rank] = self.step
        if self._rings:
            self._bell.rouse(self.members)

    def _ring(self) -> None:
        """Tell the members that a word of this rank is there."""
        if self._rings:
            self._bell.ring(self.members)
