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

from collections.abc import Sequence

import torch

from kernels.device_launch import DeviceLaunch
from kernels.device_state import DeviceState
from kernels.elastic_mode import ElasticMode, LateRanksError
from kernels.epoch_state import VoidReason
from kernels.heap_layout import HeapLayout
from kernels.host_poison import HostPoison
from kernels.launch_plan import LaunchPlanner, OneProgram
from kernels.step_words import epoch_floor, header_bank
from kernels.symmetric_memory.base import PeerHeap, SymmetricHeap

_MAX_RANKS = 64
_ENDS_OF_WAITS = (VoidReason.DEADLINE, VoidReason.PEER_POISON, VoidReason.FUTURE_WORD)
_DTYPES = (torch.float32, torch.bfloat16)


class DeviceGroup:
    """Raises ValueError for arguments that no group could accept, before anything is launched; RuntimeError for calls
    out of order. ``num_local_experts``: physical experts of a rank, for ``expert_load``; 0 counts nothing. ``planner``
    decides the launch sizes and is for measurements and tests; so is ``launch``, which checks nothing.

    Entries routed to a rank that is neither member nor masked make the round void (``VoidReason.ROUTING``).
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
        self.elastic = elastic
        self._state = DeviceState(layout, rank, self.device)
        self._load_WL = torch.zeros(ep.max_ranks, num_local_experts, dtype=torch.int64, device=self.device)
        planner = planner or _default_planner(self.device, ep.hidden_size)
        self.launch = DeviceLaunch(layout, self._state, rank, planner, elastic, self._load_WL)
        self._state.set_address(rank, heap.bytes_U8.data_ptr())
        self._mapped = {rank}
        self._announced = (0, torch.empty(0, dtype=torch.int64))  # epoch, words of its first header
        self._had_header = False
        self._combine_tokens: int | None = None  # of the dispatch whose combine comes next
        self._host_poison = HostPoison(layout, heap, rank)
        self.set_deadline(deadline_s)

    @property
    def flags(self) -> torch.Tensor:
        """int32, on the device: status and members, laid out as in ``kernels.triton_wait``; for kernels, read only."""
        return self._state.flags

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
        """[W, M, H] in the layout's dispatch dtype, a view; a row is written only if a code of it names this rank."""
        ep = self.layout.ep
        dtype = ep.dispatch_dtype or ep.dtype
        rows = self.layout.view(self.heap_U8, "ep_dispatch_rows").view(dtype)
        first = 4 * ep.row_header_words // dtype.itemsize
        return rows[:, :, first : first + ep.hidden_size]

    @property
    def row_scale_WMG(self) -> torch.Tensor:
        """float32 [W, M, H / 128], a view: of the rows' elements in float8; no columns if they are not."""
        ep = self.layout.ep
        rows = self.layout.view(self.heap_U8, "ep_dispatch_rows").view(torch.float32)
        return rows[:, :, ep.scale_word : ep.scale_word + ep.num_scales]

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
        self.launch.poison(VoidReason.LEFT)

    def poison_members(self) -> None:
        """Make this rank void, accusing nobody, and tell every member."""
        self.launch.poison(VoidReason.STOPPED)

    def poison_self(self, epoch: int | None = None) -> None:
        """End this rank's own waits in ``epoch`` (default: the current one) and before, at once, accusing nobody. From
        any thread, also while a graph runs.
        """
        self._host_poison.raise_to(epoch_floor(self.epoch if epoch is None else epoch) | 1)

    def void_reason(self) -> VoidReason | None:
        """None: everything launched so far was complete. Waits for the stream: call it once, at the end of a round.

        LateRanksError in mode OFF, in place of a reason that comes from a wait.
        """
        reason = self._state.void_reason()
        if self.elastic is ElasticMode.OFF and reason in _ENDS_OF_WAITS:
            late = self.observation_mask().nonzero().flatten().tolist()
            raise LateRanksError(
                f"gave up waiting in epoch {self.epoch} ({reason.value}): nothing came from ranks {late}; elastic mode "
                "is off"
            )
        return reason

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
        if self._combine_tokens is not None:
            raise RuntimeError("update_mask_buffer between dispatch and combine")
        self._state.set_masked(rank, masked)

    def set_deadline(self, deadline_s: float) -> None:
        """Of dispatch and combine, seconds."""
        if deadline_s <= 0:
            raise ValueError(f"deadline_s must be positive, got {deadline_s}")
        self._state.set_deadline(deadline_s)

    def set_renormalise(self, renormalise: bool) -> None:
        """As ``renormalise`` of ``ElasticGroup``; a word in device memory, so captured graphs follow."""
        self._state.set_renormalise(renormalise)

    def wait_ns_by_source(self) -> torch.Tensor:
        """int64 [W]: nanoseconds that the kernels have waited for each slot since this object was made. Exact for the
        last to come of each wait, to some tens of microseconds for the others."""
        return self._state.waited_ns()

    def expert_load(self) -> torch.Tensor:
        """int64 [W, num_local_experts]: rows that this rank has sent to each physical expert; as in ElasticGroup."""
        return self._load_WL.cpu()

    def set_digest(self, digest: int) -> None:
        """32 bits of the view and of the active placement, for the headers that follow."""
        self._state.set_digest(digest)

    def allgather(self, words_N: torch.Tensor, out_WN: torch.Tensor) -> None:
        """Exchange header words: int64 [N] below 2**32, on the device; out int64 [W, N], 0 for who is no member. The
        first operation of every epoch. Patient: ended by poison of a peer or of the host, never by a deadline (but in
        mode ALONE).
        """
        ep = self.layout.ep
        self._check_tensor("words", words_N, (ep.num_header_words,), torch.int64)
        self._check_tensor("out", out_WN, (ep.max_ranks, ep.num_header_words), torch.int64)
        self._check_order("allgather", header_first=False)
        epoch, announced_N = self._announced
        if epoch == self.epoch and not self._had_header and not torch.equal(words_N, announced_N):
            raise ValueError(f"words: the first header of epoch {self.epoch} differs from the one announced")
        self._had_header = True
        self.launch.allgather(words_N, out_WN)

    def announce_header(self, epoch: int, member_ranks: Sequence[int], words_N: torch.Tensor, digest: int) -> None:
        """As in ``ElasticGroup``: a newcomer's first header of ``epoch``, written before it adopts."""
        self._check_tensor("words", words_N, (self.layout.ep.num_header_words,), torch.int64)
        if epoch <= self.epoch:
            raise ValueError(f"epoch {epoch} is not above the current epoch {self.epoch}")
        unmapped = sorted(set(member_ranks) - self._mapped)
        if unmapped:
            raise ValueError(f"cannot announce to ranks whose heaps are not mapped here: {unmapped}")
        self._announced = (epoch, words_N.clone())
        self.launch.announce(words_N, epoch_floor(epoch) | 1, digest, [*member_ranks, self.rank])

    def sees_announcement(self, epoch: int, rank: int) -> bool:
        """Whether the first header of ``epoch`` from ``rank`` lies in this heap. Waits for the stream."""
        word = self.layout.view(self.heap_U8, "ep_header")[header_bank(epoch, 0), rank, 0]
        return int(word) == epoch_floor(epoch) | 1

    def all_announced(self, epoch: int, member_ranks: Sequence[int]) -> bool:
        """Whether every member has entered ``epoch``: how a newcomer learns that it was let in."""
        return all(self.sees_announcement(epoch, rank) for rank in member_ranks)

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
        self.launch.dispatch(x_TH, rank_TK, local_TK, weight_TK)

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
        self.launch.combine(expert_rows, out_TH, ordered)

    def clean_buffer(self, deadline_s: float) -> None:
        """A barrier of all members. The deadline is a property of the group, not of a captured graph: it is stored when
        this is called, with the stream idle.
        """
        self._check_order("clean_buffer", header_first=True)
        if not (self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            self._state.set_barrier_deadline(deadline_s)
        self.launch.barrier()

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
