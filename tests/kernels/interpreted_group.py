"""A rank of Triton kernels under the interpreter that looks like the reference's ``ElasticGroup`` to the tests.

Import only where TRITON_INTERPRET was set before Triton was imported: in the processes of the tests, never in pytest's.

Legend: W max_ranks, M max_tokens, K top_k, H hidden, N entries.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from kernels.device_group import DeviceGroup
from kernels.elastic_mode import ElasticMode
from kernels.epoch_state import CLEAN, VOID
from kernels.header_exchange import HeaderRound
from kernels.heap_layout import HeapLayout
from kernels.received import Received, sum_of_each_row
from kernels.reference import ElasticGroup
from kernels.symmetric_memory.base import SymmetricHeap


class InterpretedGroup(ElasticGroup):
    """The reference object beside it holds the peers' windows and never acts on the heap."""

    def __init__(
        self,
        layout: HeapLayout,
        heap: SymmetricHeap,
        rank: int,
        *,
        deadline_s: float,
        elastic: ElasticMode = ElasticMode.VIEWS,
    ) -> None:
        super().__init__(layout, heap, rank, deadline_s=deadline_s)
        self._stop: Callable[[], bool] | None = None
        self.kernels = DeviceGroup(layout, heap, rank, deadline_s=deadline_s, elastic=elastic)

    def map_peer(self, rank: int, peer_heap: SymmetricHeap) -> None:  # type: ignore[override]
        super().map_peer(rank, peer_heap)
        self.kernels.map_peer(rank, peer_heap)

    def adopt(self, epoch: int, members: Sequence[int], digest: int, *, in_band: bool = False) -> None:
        self.kernels.adopt(epoch, members, digest, in_band=in_band)
        self.epoch, self.members = epoch, tuple(members)
        self._note()

    def observation_mask(self) -> torch.Tensor:
        return self.kernels.observation_mask()

    def allgather(self, header_words: Sequence[int], stop: Callable[[], bool] | None = None) -> HeaderRound | None:
        ep = self.layout.ep
        words = torch.zeros(ep.num_header_words, dtype=torch.int64)
        words[: len(header_words)] = torch.tensor(header_words)
        out_WN = torch.full((ep.max_ranks, ep.num_header_words), -1)
        self._stop = stop
        with self._host_watching():
            self.kernels.allgather(words, out_WN)
        if self._note() == VOID:
            return None
        return HeaderRound(0, {rank: tuple(out_WN[rank].tolist()) for rank in self.members})

    def dispatch(
        self, x_TH: torch.Tensor, rank_TK: torch.Tensor, local_expert_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> Received | None:
        with self._host_watching():
            self.kernels.dispatch(x_TH, rank_TK.int(), local_expert_TK.int(), weight_TK)
        self._num_out = len(x_TH)
        return None if self._note() == VOID else received_entries(self.kernels, self.members)

    def combine(self, expert_rows_NH: torch.Tensor, received: Received, *, ordered: bool = True) -> torch.Tensor | None:
        ep = self.layout.ep
        rows = torch.full((ep.max_ranks * ep.max_tokens, ep.top_k, ep.hidden_size), float("nan"))
        if ordered:
            rows[received.row_N, received.k_N] = expert_rows_NH
            rows = rows.view(ep.max_ranks, ep.max_tokens, ep.top_k, ep.hidden_size)
        else:
            first_R, total_RH = sum_of_each_row(expert_rows_NH, received, ep.top_k)
            rows[received.row_N[first_R], 0] = torch.from_numpy(total_RH)
            rows = rows[:, 0].reshape(ep.max_ranks, ep.max_tokens, ep.hidden_size)
        out_TH = torch.full((self._num_out, ep.hidden_size), float("nan"))
        with self._host_watching():
            self.kernels.combine(rows, out_TH, ordered=ordered)
        return None if self._note() == VOID else out_TH

    def clean_buffer(self, deadline_s: float) -> bool:
        with self._host_watching():
            self.kernels.clean_buffer(deadline_s)
        return self._note() == CLEAN

    def query_mask_buffer(self) -> torch.Tensor:
        return self.kernels.query_mask_buffer()

    @contextmanager
    def _host_watching(self) -> Iterator[None]:
        """A thread that poisons this rank's waits as soon as the last header's ``stop`` says so."""
        done = threading.Event()
        stop = self._stop

        def watch() -> None:
            while not done.wait(0.005):
                if stop is not None and stop():
                    self.kernels.poison_self(self.epoch)
                    return

        watcher = threading.Thread(target=watch)
        watcher.start()
        yield
        done.set()
        watcher.join()

    def _note(self) -> int:
        self.void_reason = self.kernels.void_reason()
        self.members = tuple((self.kernels.query_mask_buffer() == 0).nonzero().flatten().tolist())
        self.status = CLEAN if self.void_reason is None else VOID
        return self.status


def received_entries(kernels: DeviceGroup, members: Sequence[int]) -> Received:
    """What dispatch left for this rank, in the reference's form."""
    ep = kernels.layout.ep
    header = kernels.row_header_WMC
    num_rows_W = kernels.num_rows_W.tolist()
    code_WMK = header[:, :, 1 : 1 + ep.top_k]
    arrived_WM = torch.zeros(ep.max_ranks, ep.max_tokens, dtype=torch.bool)
    for member in members:
        arrived_WM[member, : num_rows_W[member]] = True
    mine_WMK = (code_WMK >> 16 == kernels.rank) & arrived_WM[..., None]
    source_N, row_N, k_N = mine_WMK.nonzero(as_tuple=True)
    return Received(
        step=0,
        num_rows_W=tuple(num_rows_W),
        x_SH=kernels.row_x_WMH.reshape(-1, ep.hidden_size),
        row_N=source_N * ep.max_tokens + row_N,
        source_N=source_N,
        token_N=header[source_N, row_N, 0].long(),
        k_N=k_N,
        local_expert_N=(code_WMK[source_N, row_N, k_N] & 0xFFFF).long(),
        weight_N=header[source_N, row_N, 1 + ep.top_k + k_N].view(torch.float32),
    )
