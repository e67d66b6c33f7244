"""The elastic EP operations as Triton kernels: one rank's end of the group, for GPUs; on CPU under the interpreter.

    adopt(e) -> allgather -> (dispatch -> combine)* -> allgather -> ...

The same heaps, words and results as ``kernels.reference``, whose ranks may be in the same group (dtype float32). Unlike
there, an operation never says how it went: it is launched, and after the round the host asks ``void_reason`` once. So
a whole round goes into one CUDA graph, and replays with other tokens, members, masks, deadlines and peer addresses.
The order of operations is checked when they are called, that is at capture, not at replay.

All operations go to the current stream of the device. ``adopt``, ``map_peer``, ``update_mask_buffer`` and setting a
deadline need that stream idle. Only ``poison_self`` may come from another thread.

Legend: W max_ranks, M max_tokens, T tokens of this call (0..M), K top_k, H hidden_size, N num_header_words.
"""

import threading
from collections.abc import Sequence
from typing import Any

import torch
import triton

from kernels.device_state import CODES, DeviceState
from kernels.epoch_state import VoidReason
from kernels.heap_layout import HeapLayout
from kernels.launch_plan import LaunchPlan, LaunchPlanner, OneProgram
from kernels.step_words import epoch_floor
from kernels.symmetric_memory.base import PeerHeap, SymmetricHeap
from kernels.triton_control import allgather_kernel, barrier_kernel, poison_kernel
from kernels.triton_exchange import combine_kernel, dispatch_kernel
from kernels.triton_wait import STEP_BEFORE_COMBINE, STEP_BEFORE_DISPATCH

_CONTROL_WARPS = 4
_MAX_RANKS = 64
_DTYPES = (torch.float32, torch.bfloat16)


class DeviceGroup:
    """Raises ValueError for arguments that no group could accept, before anything is launched; RuntimeError for calls
    out of order. ``planner`` decides the launch sizes and is for measurements and tests.

    Entries routed to a rank that is neither member nor masked make the round void (``VoidReason.ROUTING``).
    """

    def __init__(
        self,
        layout: HeapLayout,
        heap: SymmetricHeap,
        rank: int,
        *,
        deadline_s: float,
        planner: LaunchPlanner | None = None,
    ) -> None:
        ep = layout.ep
        if not 0 <= rank < ep.max_ranks or ep.max_ranks > _MAX_RANKS:
            raise ValueError(f"rank {rank} of {ep.max_ranks}: ranks are 0..max_ranks-1, at most {_MAX_RANKS} of them")
        if ep.dtype not in _DTYPES or ep.hidden_size * ep.dtype.itemsize % 16:
            raise ValueError(
                f"the kernels move rows of float32 or bfloat16 in 16 bytes, got {ep.dtype} {ep.hidden_size}"
            )
        layout.verify(heap.bytes_U8, "the own heap")
        self.layout = layout
        self.rank = rank
        self.epoch = 0
        self.device = heap.bytes_U8.device
        self.heap_U8 = heap.bytes_U8
        self._planner = planner or _default_planner(self.device, ep.hidden_size)
        self._state = DeviceState(layout, rank, self.device)
        self._state.set_address(rank, heap.bytes_U8.data_ptr())
        self._mapped = {rank}
        self._had_header = False
        self._combine_tokens: int | None = None  # of the dispatch whose combine comes next
        self._poison_W = layout.view(heap.bytes_U8, "ep_poison")
        self._poison_W[rank] = 0  # what an earlier process of this slot said to itself
        self._poison_lock = threading.Lock()
        self._poison_word = 0
        self._poison_stream: torch.cuda.Stream | None = None
        if self.device.type == "cuda":
            self._poison_stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self.set_deadline(deadline_s)

    # What dispatch left in the own heap, for the expert MLP; valid until the own combine.

    @property
    def num_rows_W(self) -> torch.Tensor:
        """int64 [W], a view of the heap: rows of each source; those of no member, and of a void round, mean nothing."""
        return self.layout.view(self.heap_U8, "ep_dispatch_word")[:, 1]

    @property
    def row_header_WMC(self) -> torch.Tensor:
        """int32 [W, M, 1 + 2 K], a view: token, K codes (rank << 16 | local expert, or -1), K weights (bits)."""
        rows = self.layout.view(self.heap_U8, "ep_dispatch_rows").view(torch.int32)
        return rows[:, :, : 1 + 2 * self.layout.ep.top_k]

    @property
    def row_x_WMH(self) -> torch.Tensor:
        """[W, M, H] in the layout's dtype, a view; a row is written only if one of its codes names this rank."""
        ep = self.layout.ep
        rows = self.layout.view(self.heap_U8, "ep_dispatch_rows").view(ep.dtype)
        first = 4 * ep.row_header_words // ep.dtype.itemsize
        return rows[:, :, first : first + ep.hidden_size]

    def map_peer(self, rank: int, peer_heap: PeerHeap) -> None:
        """Use ``peer_heap`` for slot ``rank`` from now on, also in place of an earlier one, also in captured graphs."""
        if rank == self.rank or not 0 <= rank < self.layout.ep.max_ranks:
            raise ValueError(f"cannot map rank {rank} as a peer of rank {self.rank}")
        self.layout.verify_header(peer_heap.header_U8, peer_heap.nbytes, f"the heap of rank {rank}")
        self._state.set_address(rank, peer_heap.address)
        self._mapped.add(rank)

    def unmap_peer(self, rank: int) -> None:
        """Forget the heap of a slot that is no member. The caller closes the peer heap, with the stream idle."""
        if rank in self._state.members() or rank == self.rank:
            raise ValueError(f"rank {rank} is a member of epoch {self.epoch}: adopt a view without it first")
        self._mapped.discard(rank)

    def adopt(self, epoch: int, members: Sequence[int], digest: int, *, in_band: bool = False) -> None:
        """As in ``EpochState.adopt``."""
        epoch_floor(epoch)
        if epoch <= self.epoch:
            raise ValueError(f"epoch {epoch} is not above the current epoch {self.epoch}")
        if self.rank not in members:
            raise ValueError(f"rank {self.rank} is not in the view of epoch {epoch}: call leave()")
        unmapped = sorted(set(members) - self._mapped)
        if unmapped:
            raise ValueError(f"epoch {epoch} has members whose heaps are not mapped here: {unmapped}")
        if not in_band:
            self.poison_members()
        self._state.enter(epoch, members, digest)
        self.epoch = epoch
        self._had_header, self._combine_tokens = False, None

    def leave(self) -> None:
        """This rank is out of the group: poison its members and publish nothing more until it adopts a view again."""
        self._poison_all(VoidReason.LEFT)

    def poison_members(self) -> None:
        """Make this rank void, accusing nobody, and tell every member."""
        self._poison_all(VoidReason.STOPPED)

    def poison_self(self, epoch: int | None = None) -> None:
        """End this rank's own waits in ``epoch`` (default: the current one) and before, at once, accusing nobody. From
        any thread, also while a graph runs.
        """
        word = epoch_floor(self.epoch if epoch is None else epoch) | 1
        with self._poison_lock:
            self._poison_word = max(self._poison_word, word)
            source = torch.tensor([self._poison_word], dtype=torch.int64)
            own = self._poison_W[self.rank : self.rank + 1]
            if self._poison_stream is None:
                own.copy_(source)
                return
            with torch.cuda.stream(self._poison_stream):
                own.copy_(source.pin_memory(), non_blocking=True)
            self._poison_stream.synchronize()

    def void_reason(self) -> VoidReason | None:
        """None: everything launched so far was complete. Waits for the stream: call it once, at the end of a round."""
        return self._state.void_reason()

    def observation_mask(self) -> torch.Tensor:
        """int32 [W]: 1 = was late at an own deadline in this epoch. Kernels observe, the monitor decides."""
        return self._state.observed()

    def query_mask_buffer(self) -> torch.Tensor:
        """int32 [W]: 1 = neither sent to nor waited for."""
        mask_W = torch.ones(self.layout.ep.max_ranks, dtype=torch.int32)
        mask_W[list(self._state.members())] = 0
        return mask_W

    def update_mask_buffer(self, rank: int, masked: bool) -> None:
        """As in ``EpochState.update_mask_buffer``: entries routed to a masked rank are dropped."""
        if rank == self.rank or rank not in self._mapped:
            raise ValueError(f"rank {rank} is not a mapped peer")
        self._state.set_masked(rank, masked)

    def set_deadline(self, deadline_s: float) -> None:
        """Of dispatch and combine, seconds."""
        if deadline_s <= 0:
            raise ValueError(f"deadline_s must be positive, got {deadline_s}")
        self._state.set_deadline(deadline_s)

    def set_digest(self, digest: int) -> None:
        """32 bits of the view and of the active placement, for the headers that follow."""
        self._state.set_digest(digest)

    def allgather(self, words_N: torch.Tensor, out_WN: torch.Tensor) -> None:
        """Exchange header words: int64 [N] below 2**32, on the device; out int64 [W, N], 0 for who is no member. The
        first operation of every epoch. Patient: ended by poison of a peer or of the host, never by a deadline.
        """
        ep = self.layout.ep
        self._check_tensor("words", words_N, (ep.num_header_words,), torch.int64)
        self._check_tensor("out", out_WN, (ep.max_ranks, ep.num_header_words), torch.int64)
        self._check_order("allgather", header_first=False)
        self._had_header = True
        allgather_kernel[(1,)](
            self._state.ctl,
            self._state.flags,
            words_N,
            out_WN,
            self.rank,
            W=ep.max_ranks,
            WP=triton.next_power_of_2(ep.max_ranks),
            N=ep.num_header_words,
            NP=triton.next_power_of_2(ep.num_header_words + 1),
            POISON=self._offset("ep_poison"),
            HEADER=self._offset("ep_header"),
            NT=32 * _CONTROL_WARPS,
            num_warps=_CONTROL_WARPS,
        )

    def dispatch(
        self, x_TH: torch.Tensor, rank_TK: torch.Tensor, local_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> None:
        """Send each token to every distinct rank among its top-k. x in the layout's dtype; rank (-1 = dropped) and
        local physical expert (0..65535) int32, weight float32, all contiguous.
        """
        ep = self.layout.ep
        num_tokens = len(x_TH)
        if num_tokens > ep.max_tokens:
            raise ValueError(f"x has {num_tokens} tokens, the heap has room for {ep.max_tokens}")
        self._check_tensor("x", x_TH, (num_tokens, ep.hidden_size), ep.dtype)
        self._check_tensor("rank", rank_TK, (num_tokens, ep.top_k), torch.int32)
        self._check_tensor("local", local_TK, (num_tokens, ep.top_k), torch.int32)
        self._check_tensor("weight", weight_TK, (num_tokens, ep.top_k), torch.float32)
        self._check_order("dispatch", header_first=True)
        self._combine_tokens = num_tokens
        self._launch_dispatch(x_TH, rank_TK, local_TK, weight_TK, STEP_BEFORE_DISPATCH.value, STEP_BEFORE_COMBINE.value)

    def combine(self, expert_rows: torch.Tensor, out_TH: torch.Tensor, *, ordered: bool) -> None:
        """Return the experts' rows to the tokens' owners, and add up those of the own tokens into out_TH.

        expert_rows, in the layout's dtype, lie as the rows of dispatch do. ordered: [W, M, K, H], row k for code k,
        added up in top-k order with dispatch's weights in float32, the same bits under every placement. Not ordered:
        [W, M, H], already weighted and summed over this rank's experts; added up in order of ranks. out_TH has as many
        rows as the dispatch had, in the layout's dtype or float32.
        """
        ep = self.layout.ep
        if self._combine_tokens is None:
            raise RuntimeError("combine out of order: each dispatch has one combine")
        shape = (ep.max_ranks, ep.max_tokens, *((ep.top_k,) if ordered else ()), ep.hidden_size)
        self._check_tensor("expert_rows", expert_rows, shape, ep.dtype)
        self._check_tensor("out", out_TH, (self._combine_tokens, ep.hidden_size), ep.dtype, torch.float32)
        self._combine_tokens = None
        self._launch_combine(expert_rows, out_TH, ordered, STEP_BEFORE_COMBINE.value, STEP_BEFORE_DISPATCH.value)

    def clean_buffer(self, deadline_s: float) -> None:
        """A barrier of all members. The deadline is a property of the group, not of a captured graph: it is stored when
        this is called, with the stream idle.
        """
        self._check_order("clean_buffer", header_first=True)
        if not (self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            self._state.set_barrier_deadline(deadline_s)
        barrier_kernel[(1,)](
            self._state.ctl,
            self._state.flags,
            self.rank,
            W=self.layout.ep.max_ranks,
            POISON=self._offset("ep_poison"),
            BARRIER=self._offset("ep_barrier_word"),
            NT=32 * _CONTROL_WARPS,
            num_warps=_CONTROL_WARPS,
        )

    def _launch_dispatch(
        self,
        x_TH: torch.Tensor,
        rank_TK: torch.Tensor,
        local_TK: torch.Tensor,
        weight_TK: torch.Tensor,
        step_in: int,
        step_out: int,
    ) -> None:
        ep = self.layout.ep
        plan = self._planner.dispatch(len(x_TH))
        dispatch_kernel[(plan.num_programs,)](
            self._state.ctl,
            self._state.flags,
            x_TH,
            rank_TK,
            local_TK,
            weight_TK,
            len(x_TH),
            self.rank,
            step_in,
            step_out,
            X_WORD=ep.row_header_words,
            WORDS=self._offset("ep_dispatch_word"),
            ROWS=self._offset("ep_dispatch_rows"),
            **self._sizes(plan),
        )

    def _launch_combine(
        self, expert_rows: torch.Tensor, out_TH: torch.Tensor, ordered: bool, step_in: int, step_out: int
    ) -> None:
        plan = self._planner.combine(len(out_TH), ordered)
        combine_kernel[(plan.num_programs,)](
            self._state.ctl,
            self._state.flags,
            expert_rows,
            out_TH,
            len(out_TH),
            self.rank,
            step_in,
            step_out,
            ORDERED=ordered,
            DISPATCH_WORDS=self._offset("ep_dispatch_word"),
            DISPATCH_ROWS=self._offset("ep_dispatch_rows"),
            WORDS=self._offset("ep_combine_word"),
            ROWS=self._offset("ep_combine_rows"),
            enable_fp_fusion=False,  # every product and every sum is rounded, as in the reference
            **self._sizes(plan),
        )

    def _sizes(self, plan: LaunchPlan) -> dict[str, Any]:
        ep = self.layout.ep
        launch = {"launch_pdl": True} if plan.overlap else {}
        return {
            "W": ep.max_ranks,
            "M": ep.max_tokens,
            "K": ep.top_k,
            "KP": triton.next_power_of_2(ep.top_k),
            "H": ep.hidden_size,
            "ROW_WORDS": ep.row_bytes // 4,
            "POISON": self._offset("ep_poison"),
            "PART": plan.part,
            "NT": 32 * plan.num_warps,
            "OVERLAP": plan.overlap,
            "num_warps": plan.num_warps,
            **launch,
        }

    def _offset(self, region: str) -> int:
        return self.layout.regions[region].offset

    def _poison_all(self, reason: VoidReason) -> None:
        poison_kernel[(1,)](
            self._state.ctl,
            self._state.flags,
            self.rank,
            CODES[reason],
            W=self.layout.ep.max_ranks,
            POISON=self._offset("ep_poison"),
            NT=32 * _CONTROL_WARPS,
            num_warps=_CONTROL_WARPS,
        )

    def _check_order(self, operation: str, *, header_first: bool) -> None:
        if self.epoch == 0:
            raise RuntimeError("no view adopted yet")
        if self._combine_tokens is not None:
            raise RuntimeError(f"{operation} out of order: the combine of the last dispatch comes first")
        if header_first and not self._had_header:
            raise RuntimeError(f"{operation} out of order: an epoch begins with allgather")

    def _check_tensor(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
        good = tensor.shape == shape and tensor.dtype in dtypes and tensor.device == self.device
        if not (good and tensor.is_contiguous()):
            wanted = " or ".join(str(dtype) for dtype in dtypes)
            raise ValueError(
                f"{name} must be contiguous {wanted} {list(shape)} on {self.device}, got {tensor.dtype} "
                f"{list(tensor.shape)} with strides {list(tensor.stride())} on {tensor.device}"
            )


def _default_planner(device: torch.device, hidden_size: int) -> LaunchPlanner:
    if device.type != "cuda":
        return OneProgram(hidden_size)
    properties = torch.cuda.get_device_properties(device)
    return LaunchPlanner(hidden_size, properties.multi_processor_count, overlap=properties.major >= 9)
