"""The elastic EP operations in plain torch and numpy on shared memory: the specification, and the CPU path. PROTOCOL
sections 1 and 2.

    adopt(e) -> allgather -> (dispatch -> combine)* -> allgather -> ...

Every operation returns None (clean_buffer: False) on a rank that is or becomes VOID, see ``epoch_state``.

Buffers. One per kind suffices: dispatch and combine alternate and each waits for every member, also for those with no
rows, so inside an epoch nobody is more than one operation ahead. Headers have four banks
(``step_words.header_bank``). An epoch begins with the header allgather, which completes only when every member has
left the old epoch; no payload of the new one is written before.

Legend: W max_ranks, M max_tokens, T tokens of this call (0..M), K top_k, H hidden_size, L physical experts of a rank,
N (row, k) entries of the experts held here.
"""

import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from kernels.elastic_mode import ElasticMode
from kernels.epoch_state import VOID
from kernels.header_exchange import HeaderExchange
from kernels.heap_layout import HeapLayout
from kernels.heap_window import HeapWindow
from kernels.own_tokens import MASKED, OwnTokens
from kernels.received import Received, read_received, sum_of_each_row, x_of_rows
from kernels.symmetric_memory.base import SymmetricHeap
from kernels.word_wait import Clock, Pause


class ElasticGroup(HeaderExchange):
    """One rank's end of the group: its heap, the peers' heaps as mapped here, the epoch it is in.

    ``deadline_s`` bounds the waits of dispatch and combine (a tenth longer for each further late rank); the wait for
    headers is patient, except in mode ALONE. ``num_local_experts``: physical experts of a rank, for ``expert_load``; 0
    counts nothing. ``clock`` (seconds) and ``pause`` (called with the number of polls so far) are for tests.

    ``renormalise`` may be set between operations, in mode ALONE: the sum over a token's entries of which some are lost
    to masked ranks is scaled by (sum of all its weights) / (sum of those left). Otherwise they are just left out.
    """

    def __init__(
        self,
        layout: HeapLayout,
        heap: SymmetricHeap,
        rank: int,
        *,
        deadline_s: float,
        elastic: ElasticMode = ElasticMode.VIEWS,
        num_local_experts: int = 0,
        clock: Clock = time.monotonic,
        pause: Pause | None = None,
    ) -> None:
        super().__init__(layout, heap, rank, deadline_s=deadline_s, elastic=elastic, clock=clock, pause=pause)
        ep = layout.ep
        if ep.dtype != torch.float32:
            raise ValueError(f"the CPU data path computes in float32, the layout has {ep.dtype}")
        self._load_WL = np.zeros((ep.max_ranks, num_local_experts), np.int64)
        self.renormalise = False
        self._tokens = OwnTokens(ep)
        self._sent_to: tuple[int, ...] = ()  # members at the last dispatch
        self._slots = np.arange(ep.max_ranks + 1)
        self._row_words_SC = self._own.dispatch_rows.reshape(ep.max_ranks * ep.max_tokens, -1)
        self._x_SH = None if ep.is_fp8 else x_of_rows(self._row_words_SC, ep)

    def dispatch(
        self, x_TH: torch.Tensor, rank_TK: torch.Tensor, local_expert_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> Received | None:
        """Send each token once to every distinct rank among its top-k, with its list of experts.

        x_TH float32; rank_TK integer, -1 = dropped entry; local_expert_TK integer, index of the physical expert on
        that rank, below 65536; weight_TK float32. T may differ between ranks and be 0. ValueError if a rank is no
        member: route to live copies only.
        """
        step = self._publish_tokens(x_TH, rank_TK, local_expert_TK, weight_TK)
        if step is None:
            return None
        self._ring()
        if not self._await_words(self._own.dispatch_wait, step, self.deadline_s):
            return None
        return self._read_tokens(step)

    def combine(self, expert_rows_NH: torch.Tensor, received: Received, *, ordered: bool = True) -> torch.Tensor | None:
        """Return the experts' rows (one per entry of ``received``) to the tokens' owners, and add up those of the own
        tokens: float32 [T, H].

        Ordered, the same on all ranks: out[t] = ((0 + w[t,0] * row[t,0]) + w[t,1] * row[t,1]) + ... in top-k order,
        every product and sum rounded to float32, dropped entries left out: the same bits under every placement. w are
        the weights given to dispatch. Not ordered ("reduced"): each rank makes this sum over its own experts' rows and
        returns one row a token; the owner adds those in order of ranks. Fewer bytes, equal up to rounding.
        """
        ep = self.layout.ep
        if expert_rows_NH.shape != (received.num_entries, ep.hidden_size) or expert_rows_NH.dtype != torch.float32:
            got = f"{expert_rows_NH.dtype} {list(expert_rows_NH.shape)}"
            raise ValueError(f"expert rows must be float32 [{received.num_entries}, {ep.hidden_size}], got {got}")
        if self.status == VOID:
            return None
        if received.step != self._combine_due:
            raise RuntimeError("combine out of order: it takes what the last dispatch received, once")
        step = self._next_step()
        self._combine_due = 0
        windows = self._windows.of(self.members)  # rows and their words take the same way, whatever a fault does
        self._return_rows(expert_rows_NH, received, ordered, windows)
        for window in windows:
            window.combine_word[self.rank] = step
        self._ring()
        if not self._await_words(self._own.combine_wait, step, self.deadline_s):
            return None
        if self.members != self._sent_to:
            self._tokens.note_masked(self._masked_W)
        return self._add_up(ordered)

    def expert_load(self) -> torch.Tensor:
        """int64 [W, num_local_experts]: rows that this rank has sent to each physical expert since this object was
        made, dropped entries and padding left out. The sum over the members is the experts' load: the planner's input.
        """
        return torch.from_numpy(self._load_WL.copy())

    def clean_buffer(self, deadline_s: float) -> bool:
        """A barrier of all members. False: it made this rank void (own deadline, poison, ...) or found it so."""
        if self.status == VOID:
            return False
        if self._combine_due:
            raise RuntimeError("clean_buffer between dispatch and combine")
        if self._num_headers == 0 or self._header_due:
            raise RuntimeError("clean_buffer out of order: an epoch begins with allgather")
        step = self._next_step()
        # Two barriers in a row: a neighbour may still be reading the words of the first.
        bank = step & 1
        for window in self._windows.of(self.members):
            window.barrier_word[bank][self.rank] = step
        self._ring()
        return self._await_words(self._own.barrier_wait[bank], step, deadline_s)

    def _publish_tokens(
        self, x_TH: torch.Tensor, rank_TK: torch.Tensor, local_expert_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> int | None:
        """The first half of a dispatch: its step, None when this rank is void."""
        rank = self._check_routing(x_TH, rank_TK, local_expert_TK, weight_TK)
        if self.status == VOID:
            return None
        if self._num_headers == 0 or self._header_due or self._combine_due:
            raise RuntimeError(
                "dispatch out of order: an epoch begins with allgather, and each dispatch has its combine"
            )
        step = self._next_step()
        windows = self._windows.of(self.members)
        self._send_tokens(x_TH, rank, local_expert_TK, weight_TK, windows)
        for window in windows:
            window.dispatch_word[self.rank] = step
        self._combine_due, self._sent_to = step, self.members
        return step

    def _check_shapes(
        self, x_TH: torch.Tensor, rank_TK: torch.Tensor, local_expert_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> None:
        ep, num_tokens = self.layout.ep, len(x_TH)
        if num_tokens > ep.max_tokens or x_TH.shape != (num_tokens, ep.hidden_size) or x_TH.dtype != torch.float32:
            got = f"{x_TH.dtype} {list(x_TH.shape)}"
            raise ValueError(f"x must be float32 [0..{ep.max_tokens}, {ep.hidden_size}], got {got}")
        shapes = {tuple(t.shape) for t in (rank_TK, local_expert_TK, weight_TK)}
        if shapes != {(num_tokens, ep.top_k)} or weight_TK.dtype != torch.float32:
            raise ValueError(
                f"ranks, experts, weights (float32) must be [{num_tokens}, {ep.top_k}], got {sorted(shapes)}"
            )

    def _check_routing(
        self, x_TH: torch.Tensor, rank_TK: torch.Tensor, local_expert_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> npt.NDArray[np.int64]:
        """Ranks as int64, with MASKED for those masked without a view."""
        self._check_shapes(x_TH, rank_TK, local_expert_TK, weight_TK)
        ep = self.layout.ep
        rank = rank_TK.numpy().astype(np.int64)
        if not len(x_TH):
            return rank
        # One look at the distinct ranks is cheaper than five at all of them.
        distinct, local_TK = set(rank.ravel().tolist()), local_expert_TK.numpy()
        has_dropped = -1 in distinct
        distinct.discard(-1)
        known = distinct.issubset(self.members)
        in_range = not distinct or 0 <= min(distinct) <= max(distinct) < ep.max_ranks
        if not known and not (in_range and self._routable_W[list(distinct)].all()):
            raise ValueError(f"tokens routed to ranks outside epoch {self.epoch}'s members {list(self.members)}")
        num_local = self._load_WL.shape[1] or 65536
        sent_N = local_TK[rank >= 0] if has_dropped else local_TK
        if sent_N.size and not 0 <= sent_N.min() <= sent_N.max() < num_local:
            raise ValueError(f"local experts must be in 0..{num_local - 1}")
        return rank if known else np.where((rank >= 0) & self._masked_W[rank], MASKED, rank)

    # The inner loops, all but the words. `compiled_group` has the same in C.

    def _send_tokens(
        self,
        x_TH: torch.Tensor,
        rank_TK: npt.NDArray[np.int64],
        local_expert_TK: torch.Tensor,
        weight_TK: torch.Tensor,
        windows: Sequence[HeapWindow],
    ) -> None:
        outbox = self._tokens.fill(x_TH, rank_TK, local_expert_TK, weight_TK)
        if self._load_WL.size:
            np.add.at(self._load_WL, (rank_TK[rank_TK >= 0], local_expert_TK.numpy()[rank_TK >= 0]), 1)
        wanted_GT = (rank_TK == np.array(self.members)[:, None, None]).any(axis=2)
        token_R, end = wanted_GT.nonzero()[1], 0
        counts = np.count_nonzero(wanted_GT, axis=1).tolist()
        for window, num_rows in zip(windows, counts, strict=True):
            begin, end = end, end + num_rows
            # mode="clip" writes straight into the heap; the default goes through a buffer.
            rows = window.dispatch_rows[self.rank, :num_rows]
            np.take(outbox, token_R[begin:end], axis=0, out=rows, mode="clip")
            window.dispatch_num_rows[self.rank] = num_rows

    def _read_tokens(self, step: int) -> Received:
        num_rows_W = [0] * self.layout.ep.max_ranks
        for member in self.members:
            num_rows_W[member] = self._own.dispatch_num_rows[member]
        return read_received(self._row_words_SC, self._x_SH, self.layout.ep, self.rank, step, tuple(num_rows_W))

    def _return_rows(
        self, expert_rows_NH: torch.Tensor, received: Received, ordered: bool, windows: Sequence[HeapWindow]
    ) -> None:
        top_k, source_N = self.layout.ep.top_k, received.source_N.numpy()
        place_N = received.token_N.numpy() * top_k + received.k_N.numpy()
        if ordered:
            rows = expert_rows_NH.numpy()
        else:
            first_R, rows = sum_of_each_row(expert_rows_NH, received, top_k)
            source_N, place_N = source_N[first_R], place_N[first_R] // top_k * top_k
        bounds = source_N.searchsorted(self._slots).tolist()
        for member, window in zip(self.members, windows, strict=True):
            begin, end = bounds[member], bounds[member + 1]
            if begin != end:
                window.combine_rows[self.rank][place_N[begin:end]] = rows[begin:end]

    def _add_up(self, ordered: bool) -> torch.Tensor:
        add_up = self._tokens.add_up if ordered else self._tokens.add_up_ranks
        return torch.from_numpy(add_up(self._own.combine_rows, self.renormalise))
