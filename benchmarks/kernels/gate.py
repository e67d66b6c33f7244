# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""A place in a captured graph at which a rank can be made to stop, until somebody kills it or it gives up."""

import torch
import triton
import triton.language as tl

from kernels.device_group import DeviceGroup
from kernels.triton_wait import STEP_BEFORE_COMBINE, now_ns

POINTS = ("before_dispatch", "between", "partial_combine", "before_barrier")
GIVE_UP_NS = tl.constexpr(20_000_000_000)
_NUM_THREADS = 128


@triton.jit(do_not_specialize=["armed_address", "here_address", "rows_address", "word_address"])
def gate_kernel(
    ctl,
    armed_address,
    here_address,
    rows_address,
    word_address,
    POINT: tl.constexpr,
    NUM: tl.constexpr,
    NT: tl.constexpr,
):
    """Grid (1,). If armed for this POINT: spoil NUM words of rows at rows_address, publish the word of the combine to
    come at word_address (0: neither), say so at here_address, and stay."""
    j = tl.arange(0, NT)
    armed = tl.load(armed_address.to(tl.pointer_type(tl.int64)), volatile=True)
    if armed == POINT:
        if rows_address != 0:
            for i in range(NUM // NT):
                place = rows_address.to(tl.int64).to(tl.pointer_type(tl.int32)) + i * NT + j
                tl.store(place, tl.full([NT], 0x7FC07FC0, tl.int32))
            tl.debug_barrier()
        if word_address != 0:
            step = tl.load(ctl + STEP_BEFORE_COMBINE) + 1
            tl.atomic_xchg(word_address.to(tl.int64).to(tl.pointer_type(tl.int64)), step, sem="release", scope="sys")
        one = tl.full([], 1, tl.int64)
        tl.atomic_xchg(here_address.to(tl.pointer_type(tl.int64)), one, sem="release", scope="sys")
        start_ns = now_ns(j)
        waited_ns = start_ns - start_ns
        while waited_ns < GIVE_UP_NS:
            waited_ns = now_ns(j) - start_ns


class Gate:
    """``spoil`` (address, int32 words) and ``word_address`` are for the point partial_combine."""

    def __init__(self, group: DeviceGroup, spoil: tuple[int, int], word_address: int) -> None:
        self._group, self._spoil, self._word_address = group, spoil, word_address
        self._cells = torch.zeros(2, dtype=torch.int64).pin_memory()

    def launch(self, point: str) -> None:
        address = self._cells.data_ptr()
        rows, num = self._spoil if point == "partial_combine" else (0, 0)
        word = self._word_address if point == "partial_combine" else 0
        gate_kernel[(1,)](
            self._group._state.ctl,
            address,
            address + 8,
            rows,
            word,
            POINT=1 + POINTS.index(point),
            NUM=num,
            NT=_NUM_THREADS,
            num_warps=_NUM_THREADS // 32,
        )

    def arm(self, point: str) -> None:
        self._cells[0] = 1 + POINTS.index(point)

    @property
    def is_reached(self) -> bool:
        return bool(self._cells[1])
