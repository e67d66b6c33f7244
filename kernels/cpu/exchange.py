"""The inner loops of the exchange, compiled (exchange.c): one rank's end of a group, as C sees it.

Legend: W max_ranks, M max_tokens, K top_k, H hidden_size, L local experts, T tokens of a call, N entries received.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kernels.cpu.library import POINTER, SIZE, kernel_function
from kernels.heap_layout import HeapLayout
from kernels.heap_window import Int32Array, OwnWords

ROUTING_FINE, UNKNOWN_RANK, UNKNOWN_EXPERT = range(3)
PENDING, COMPLETE, FUTURE_WORD, HOST_POISON, PEER_POISON = range(5)

_Int64Array = npt.NDArray[np.int64]
_NUMBERS = "max_ranks max_tokens top_k hidden_size row_words row_header_words rank num_local_experts"
_OFFSETS = "dispatch_rows dispatch_word combine_rows combine_word bell sleeper poison"
_ADDRESSES = "outbox load_WL num_rows_W row_N source_N token_N k_N local_N weight_N"


class _Exchange(ctypes.Structure):
    """exchange_t"""

    _fields_ = [
        *((name, ctypes.c_int64) for name in f"{_NUMBERS} {_OFFSETS}".split()),
        ("heap_W", ctypes.c_void_p),
        ("member_G", ctypes.c_void_p),
        ("num_members", ctypes.c_int64),
        ("routable_W", ctypes.c_void_p),
        ("masked_W", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in _ADDRESSES.split()),
        ("num_entries", ctypes.c_int64),
        ("fault", ctypes.c_int64),
    ]


class _Wait(ctypes.Structure):
    """wait_t"""

    _fields_ = [
        ("word", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("word_step", "step", "floor", "most_ns", "begun_ns")),
        ("is_missing_W", ctypes.c_void_p),
        ("waited_ns_W", ctypes.c_void_p),
        ("end", ctypes.c_int64),
    ]


class _Header(ctypes.Structure):
    """header_t"""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("bank", "num_data", "step")),
        ("own_D", ctypes.c_void_p),
        ("data_GD", ctypes.c_void_p),
        ("is_due", ctypes.c_int64),
    ]


class CompiledExchange:
    """Keeps what C reads and writes. ``masked_W``, ``routable_W`` (bool), ``outbox``, ``load_WL`` are the caller's and
    stay where they are; ``heap_W`` and ``set_members`` have to be kept up to date.
    """

    def __init__(
        self,
        layout: HeapLayout,
        rank: int,
        masked_W: npt.NDArray[np.bool_],
        routable_W: npt.NDArray[np.bool_],
        outbox: Int32Array,
        load_WL: _Int64Array,
    ) -> None:
        ep, region = layout.ep, layout.regions
        if ep.is_fp8 or ep.dtype != torch.float32:
            raise ValueError("the compiled exchange sends float32 rows only: use kernels.reference.ElasticGroup")
        num_slots = ep.max_ranks * ep.max_tokens
        most = num_slots * ep.top_k
        self.heap_W = np.zeros(ep.max_ranks, np.int64)  # addresses
        self.num_rows_W = np.zeros(ep.max_ranks, np.int64)
        self.numbers_5N = np.zeros((5, most), np.int64)  # row, source, token, k, local expert
        self.row_N, self.source_N, self.token_N, self.k_N, self.local_N = self.numbers_5N
        self.weight_N = np.zeros(most, np.float32)
        self.is_missing_W = np.zeros(ep.max_ranks, np.uint8)
        self.waited_ns_W = np.zeros(ep.max_ranks, np.int64)
        self._members: Sequence[int] = ()
        self._member_G = np.zeros(ep.max_ranks, np.int64)
        self._kept: tuple[object, ...] = (masked_W, routable_W, outbox, load_WL)
        self._exchange = _Exchange(
            max_ranks=ep.max_ranks,
            max_tokens=ep.max_tokens,
            top_k=ep.top_k,
            hidden_size=ep.hidden_size,
            row_words=ep.row_bytes // 4,
            row_header_words=ep.row_header_words,
            rank=rank,
            num_local_experts=load_WL.shape[1],
            **{name: region[f"ep_{name}"].offset for name in _OFFSETS.split()},
            heap_W=_address(self.heap_W),
            member_G=_address(self._member_G),
            routable_W=_address(routable_W),
            masked_W=_address(masked_W),
            outbox=_address(outbox),
            load_WL=_address(load_WL) if load_WL.size else None,
            **{name: _address(getattr(self, name)) for name in _ADDRESSES.split()[2:]},
        )
        self._wait = _Wait(is_missing_W=_address(self.is_missing_W), waited_ns_W=_address(self.waited_ns_W))
        num_data = 1 + ep.num_header_words
        self._own_D, self._data_GD = np.zeros(num_data, np.int64), np.zeros((ep.max_ranks, num_data), np.int64)
        self._header = _Header(num_data=num_data, own_D=_address(self._own_D), data_GD=_address(self._data_GD))
        self._header_at = region["ep_header"].offset
        self._header_pointer = ctypes.addressof(self._header)
        self._pointer, self._wait_pointer = ctypes.addressof(self._exchange), ctypes.addressof(self._wait)
        # Looked up now, not in the middle of the first round that others wait for.
        self._route = kernel_function("regrow_route_tokens", POINTER, SIZE, POINTER, POINTER, POINTER, is_brief=True)
        self._send = kernel_function("regrow_send_tokens", POINTER, SIZE, POINTER, SIZE, is_brief=True)
        self._read = kernel_function("regrow_read_tokens", POINTER, is_brief=True)
        self._return = kernel_function("regrow_return_rows", POINTER, POINTER, is_brief=True)
        self._add_up = kernel_function("regrow_add_up", POINTER, SIZE, POINTER, is_brief=True)
        self._ring = kernel_function("regrow_ring", POINTER, is_brief=True)
        self._look = kernel_function("regrow_wait", POINTER, POINTER, is_brief=True)
        self._send_header = kernel_function("regrow_send_header", POINTER, POINTER, is_brief=True)
        self._await_headers = kernel_function("regrow_await_headers", POINTER, POINTER, POINTER)
        self._sleep = kernel_function("regrow_wait", POINTER, POINTER)

    @property
    def pointers(self) -> tuple[int, int, int]:
        """Of the exchange, its waits, its headers."""
        return self._pointer, self._wait_pointer, self._header_pointer

    def set_members(self, members: Sequence[int]) -> None:
        """Sorted slots; the same object means the same members."""
        if members is not self._members:
            self._members = members
            self._member_G[: len(members)] = members
            self._exchange.num_members = len(members)

    def use_heaps(self, heap_W: _Int64Array) -> None:
        """Until the next call. ``heap_W`` must live on."""
        self._exchange.heap_W = _address(heap_W)

    def route(self, rank_TK: torch.Tensor, local_TK: torch.Tensor, weight_TK: torch.Tensor) -> int:
        """Writes the headers of the rows; says what is wrong with them, and then they may be anything. int64, float32,
        contiguous."""
        addresses = rank_TK.data_ptr(), local_TK.data_ptr(), weight_TK.data_ptr()
        self._route(self._pointer, len(rank_TK), *addresses)
        return int(self._exchange.fault)

    def send(self, x_TH: torch.Tensor) -> None:
        """Sends the rows that were routed last. Rows contiguous."""
        self._send(self._pointer, len(x_TH), x_TH.data_ptr(), x_TH.stride(0))

    def read(self) -> int:
        """Number of entries; they lie in ``row_N`` and the others."""
        self._read(self._pointer)
        return int(self._exchange.num_entries)

    def give_back(self, rows_NH: torch.Tensor) -> None:
        """To the owners of what was read last. Contiguous."""
        self._return(self._pointer, rows_NH.data_ptr())

    def add_up(self, num_tokens: int) -> torch.Tensor:
        out_TH = torch.empty(num_tokens, self._exchange.hidden_size)
        self._add_up(self._pointer, num_tokens, out_TH.data_ptr())
        return out_TH

    def ring(self) -> None:
        self._ring(self._pointer)

    def send_header(self, step: int, bank: int, data: Sequence[int]) -> None:
        """Tells all members, and rings."""
        self._own_D[:] = data
        self.expect_headers(step, bank)
        self._send_header(self._pointer, self._header_pointer)

    def expect_headers(self, step: int, bank: int) -> None:
        """Those of this step have not been seen yet."""
        num_ranks, num_data = self._data_GD.shape
        self._header.step, self._header.bank = step, self._header_at + 8 * bank * num_ranks * (1 + num_data)
        self._header.is_due = 1

    def expect_no_headers(self) -> None:
        self._header.is_due = 0

    def await_headers(self, floor: int, most_ns: int) -> None:
        """One part of the wait for those of the others: see `headers_are_here`."""
        self._wait.floor, self._wait.most_ns = floor, most_ns
        self._await_headers(self._pointer, self._wait_pointer, self._header_pointer)

    @property
    def headers_are_here(self) -> bool:
        """All, whole, and with one digest: then ``headers`` are their data words in the order of members."""
        return not self._header.is_due

    @property
    def headers(self) -> list[list[int]]:
        rows: list[list[int]] = self._data_GD[: len(self._members)].tolist()
        return rows

    def set_floor(self, floor: int) -> None:
        """Of the waits in a pass: the lowest word of the epoch."""
        self._wait.floor = floor

    def begin_wait(self, words: OwnWords, step: int, floor: int) -> None:
        wait = self._wait
        wait.word, wait.word_step = words.address, words.step_bytes
        wait.step, wait.floor, wait.begun_ns = step, floor, 0

    def wait(self, most_ns: int) -> int:
        """A part of the wait that was begun, or all of it; PENDING: not over."""
        self._wait.most_ns = most_ns
        (self._sleep if most_ns else self._look)(self._pointer, self._wait_pointer)
        return int(self._wait.end)


def _address(array: npt.NDArray[Any]) -> int:
    return int(array.ctypes.data)
