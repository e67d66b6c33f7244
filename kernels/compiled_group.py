"""`ElasticGroup` with its inner loops and its waits in C: the CPU path of services. The same bits, the same protocol.

What `kernels.reference` says of buffers, order and errors holds here word for word; rows in float8 it does not send.
Words are stored by the code that both share, after the calls that store the payload.

Legend: W max_ranks, T tokens of this call, K top_k, H hidden_size, N entries received.
"""

import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from kernels.compiled_wait import FIRST_PART_NS, CompiledWait
from kernels.cpu.batch import CheckedBatch
from kernels.cpu.exchange import ROUTING_FINE, CompiledExchange
from kernels.cpu.forward import (
    BAD_ROUTING,
    BAD_ROWS,
    DONE,
    NO_MEMORY,
    WAITS_FOR_HEADERS,
    WAITS_FOR_ROWS,
    WAITS_FOR_TOKENS,
    CompiledModel,
    ForwardPass,
    RoutedExperts,
)
from kernels.elastic_mode import ElasticMode
from kernels.epoch_state import VOID
from kernels.header_exchange import HeaderDue, HeaderRound
from kernels.heap_layout import HeapLayout
from kernels.heap_window import HeapWindow
from kernels.received import Received
from kernels.reference import ElasticGroup
from kernels.symmetric_memory.base import PeerHeap, SymmetricHeap


class CompiledGroup(ElasticGroup):
    """See `ElasticGroup`. Raises KernelsNotBuilt where nobody has compiled them."""

    def __init__(
        self,
        layout: HeapLayout,
        heap: SymmetricHeap,
        rank: int,
        *,
        deadline_s: float,
        elastic: ElasticMode = ElasticMode.VIEWS,
        num_local_experts: int = 0,
    ) -> None:
        super().__init__(
            layout, heap, rank, deadline_s=deadline_s, elastic=elastic, num_local_experts=num_local_experts
        )
        outbox = self._tokens.outbox
        self._compiled = CompiledExchange(layout, rank, self._masked_W, self._routable_W, outbox, self._load_WL)
        self._compiled.heap_W[rank] = self._own.address
        self._numbers_5N, self._weight_N = (
            torch.from_numpy(self._compiled.numbers_5N),
            torch.from_numpy(self._compiled.weight_N),
        )
        self._pass = ForwardPass(layout.ep, self._compiled)
        self._muted_W = np.zeros_like(self._compiled.heap_W)
        self._is_muted = False
        self._wait = CompiledWait(rank, self._own.poison, self._bell, time.monotonic, self._compiled)

    def map_peer(self, rank: int, peer_heap: PeerHeap) -> None:
        super().map_peer(rank, peer_heap)
        self._compiled.heap_W[rank] = peer_heap.bytes_U8.data_ptr()  # also while this rank is mute

    def unmap_peer(self, rank: int) -> None:
        super().unmap_peer(rank)
        self._compiled.heap_W[rank] = 0

    @property
    def has_link_fault(self) -> bool:
        """Now: words are lost, which a pass in C would notice only at a long wait."""
        fault = self._windows.fault
        return fault is not None and (fault.is_mute() or fault.is_deaf())

    def run_pass(self, model: CompiledModel, batch: CheckedBatch, experts: RoutedExperts) -> torch.Tensor | None:
        """A whole forward pass with dispatch, experts and ordered combine of every mixture layer: the same operations
        and words, in one call of C as long as nobody is very late. Logits fp32 [S, V]; None on a rank that is or
        becomes VOID. ``own_s`` and ``missed_T`` tell of the last one. Not in mode ALONE: members change in mid-pass.
        """
        if self.status == VOID:
            return None
        if self.elastic is ElasticMode.ALONE or self._num_headers == 0 or self._combine_due:
            raise RuntimeError("a pass out of order: an epoch begins with allgather, and each dispatch has its combine")
        compiled, own = self._pass, self._own
        logits_SV = compiled.begin(model, batch, experts, self.step)
        self._compiled.set_floor(self._floor)
        self._expect_headers()
        self._tokens.note_filled(batch.num_tokens)
        while True:
            self._refresh()
            stage = compiled.go_on(FIRST_PART_NS)
            self._n = compiled.step - self._floor
            if stage == WAITS_FOR_HEADERS:
                if not self.await_headers():
                    return None
                continue
            if self._header_due and not self._take_headers(self._header_due):
                return None
            if stage == DONE:
                return logits_SV
            if stage not in (WAITS_FOR_TOKENS, WAITS_FOR_ROWS):
                kind, text = _FAILURES[stage]
                raise kind(text)
            words = own.dispatch_wait if stage == WAITS_FOR_TOKENS else own.combine_wait
            if not self._await_words(words, compiled.step, self.deadline_s):
                return None

    def await_headers(self) -> HeaderRound | None:
        compiled, due = self._compiled, self._header_due
        if self.status != VOID and due is not None and not self.has_link_fault:
            self._refresh()
            self._expect_headers()
            compiled.await_headers(self._floor, FIRST_PART_NS)
            return self._take_headers(due)
        return super().await_headers()

    def _take_headers(self, due: HeaderDue) -> HeaderRound | None:
        """Those that C has seen; or it has not, and they are waited for."""
        if not self._compiled.headers_are_here:
            found = super().await_headers()
            self._compiled.expect_no_headers()
            return found
        self._header_due = None
        return self._header_round(due.step, self._compiled.headers)

    def _expect_headers(self) -> None:
        if self._header_due:
            self._compiled.expect_headers(*self._header_due)
        else:
            self._compiled.expect_no_headers()

    def _send_header(self, step: int, bank: int, data: list[int]) -> None:
        self._refresh()
        self._compiled.send_header(step, bank, data)

    @property
    def own_s(self) -> float:
        """What the last `run_pass` took, without its waits."""
        return self._pass.own_s

    def missed_T(self, num_tokens: int) -> npt.NDArray[np.bool_]:
        """Which tokens of the last `run_pass` had an expert that lives nowhere."""
        return self._pass.misses_M[:num_tokens]

    def _check_routing(
        self, x_TH: torch.Tensor, rank_TK: torch.Tensor, local_expert_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> npt.NDArray[np.int64]:
        """Fills the headers of the rows; what it returns is not used."""
        self._check_shapes(x_TH, rank_TK, local_expert_TK, weight_TK)
        self._tokens.note_filled(len(x_TH))
        fault = self._compiled.route(_int64(rank_TK), _int64(local_expert_TK), weight_TK.contiguous())
        if fault != ROUTING_FINE:
            super()._check_routing(x_TH, rank_TK, local_expert_TK, weight_TK)  # says which
            raise AssertionError("the compiled check refuses what the other accepts")
        return _NO_RANKS

    def _send_tokens(
        self,
        x_TH: torch.Tensor,
        rank_TK: npt.NDArray[np.int64],
        local_expert_TK: torch.Tensor,
        weight_TK: torch.Tensor,
        windows: Sequence[HeapWindow],
    ) -> None:
        self._refresh(windows)
        self._compiled.send(x_TH if x_TH.stride(1) == 1 else x_TH.contiguous())

    def _read_tokens(self, step: int) -> Received:
        compiled = self._compiled
        compiled.set_members(self.members)
        num = compiled.read()
        assert self._x_SH is not None
        row_N, source_N, token_N, k_N, local_N = self._numbers_5N[:, :num].unbind(0)
        num_rows_W, weight_N = tuple(compiled.num_rows_W.tolist()), self._weight_N[:num]
        return Received(step, num_rows_W, self._x_SH, row_N, source_N, token_N, k_N, local_N, weight_N)

    def _return_rows(
        self, expert_rows_NH: torch.Tensor, received: Received, ordered: bool, windows: Sequence[HeapWindow]
    ) -> None:
        if not ordered:
            super()._return_rows(expert_rows_NH, received, ordered, windows)
            return
        self._refresh(windows)
        self._compiled.give_back(expert_rows_NH.contiguous())

    def _add_up(self, ordered: bool) -> torch.Tensor:
        if not ordered:
            return super()._add_up(ordered)
        out_TH = self._compiled.add_up(self._tokens.num_tokens)
        return torch.from_numpy(self._tokens.renormalised(out_TH.numpy())) if self.renormalise else out_TH

    def _ring(self) -> None:
        self._refresh()
        self._compiled.ring()

    def _refresh(self, windows: Sequence[HeapWindow] | None = None) -> None:
        """Members and heaps as they are now; or the ``windows`` of the members, if somebody has looked already."""
        compiled = self._compiled
        compiled.set_members(self.members)
        windows = self._windows.of(self.members) if windows is None else windows
        nowhere = self._windows.last_nowhere
        is_mute = nowhere is not None and any(window is nowhere for window in windows)
        if is_mute:
            assert nowhere is not None
            self._muted_W[:] = nowhere.address
            self._muted_W[self.rank] = self._own.address
            compiled.use_heaps(self._muted_W)
        elif self._is_muted:
            compiled.use_heaps(compiled.heap_W)
        self._is_muted = is_mute


_FAILURES: dict[int, tuple[type[Exception], str]] = {
    BAD_ROUTING: (ValueError, "tokens routed to a rank that is no member, or to an expert that no rank has"),
    BAD_ROWS: (ValueError, "rows came for an expert that is not there"),
    NO_MEMORY: (MemoryError, "no memory for a forward pass"),
}
_NO_RANKS: npt.NDArray[np.int64] = np.empty(0, np.int64)


def _int64(tensor: torch.Tensor) -> torch.Tensor:
    is_ready = tensor.dtype is torch.int64 and tensor.is_contiguous()
    return tensor if is_ready else tensor.to(torch.int64).contiguous()
