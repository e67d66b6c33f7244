"""What the kernels of one rank read and write beside the heaps: step, epoch, deadlines, masks, status, addresses.

All of it lies in device memory, so that a captured graph goes on with other members, masks, deadlines and addresses.
The host writes it only while the stream is idle.

Legend: W max_ranks.
"""

from collections.abc import Sequence

import torch

from kernels import triton_wait as cell
from kernels.epoch_state import VoidReason
from kernels.heap_layout import HeapLayout
from kernels.step_words import epoch_floor

REASONS = {
    cell.VOID_DEADLINE.value: VoidReason.DEADLINE,
    cell.VOID_PEER_POISON.value: VoidReason.PEER_POISON,
    cell.VOID_HOST_POISON.value: VoidReason.HOST_POISON,
    cell.VOID_FUTURE_WORD.value: VoidReason.FUTURE_WORD,
    cell.VOID_DIGEST.value: VoidReason.DIGEST,
    cell.VOID_ROUTING.value: VoidReason.ROUTING,
    7: VoidReason.STOPPED,
    8: VoidReason.LEFT,
}
CODES = {reason: code for code, reason in REASONS.items()}
_FIRST_MEMBER = cell.MEMBER.value
_TABLE = cell.TABLE.value


class DeviceState:
    """``ctl`` int64 and ``flags`` int32 as ``triton_wait`` lays them out."""

    def __init__(self, layout: HeapLayout, rank: int, device: torch.device) -> None:
        self._num_ranks = layout.ep.max_ranks
        self.ctl = torch.zeros(_TABLE + 2 * self._num_ranks, dtype=torch.int64, device=device)
        self.flags = torch.zeros(_FIRST_MEMBER + 2 * self._num_ranks, dtype=torch.int32, device=device)
        self.flags[cell.STATUS.value] = CODES[VoidReason.LEFT]

    def set_address(self, rank: int, address: int) -> None:
        """Of the heap of slot ``rank`` as mapped here; graphs captured before use it from now on."""
        self.ctl[_TABLE + rank] = address

    def set_deadline(self, deadline_s: float) -> None:
        self.ctl[cell.DEADLINE_NS.value] = int(deadline_s * 1e9)

    def set_barrier_deadline(self, deadline_s: float) -> None:
        self.ctl[cell.BARRIER_DEADLINE_NS.value] = int(deadline_s * 1e9)

    def set_renormalise(self, renormalise: bool) -> None:
        self.ctl[cell.RENORMALISE.value] = int(renormalise)

    def set_digest(self, digest: int) -> None:
        self.ctl[cell.DIGEST.value] = digest

    def enter(self, epoch: int, members: Sequence[int], digest: int) -> None:
        """A clean state at the first step of ``epoch``. The table and the deadlines stay."""
        floor = epoch_floor(epoch)
        cells = [floor, floor, floor, int(self.ctl[cell.DEADLINE_NS.value]), digest, 0]
        self.ctl[: len(cells)] = torch.tensor(cells, dtype=torch.int64)
        flags = torch.zeros(len(self.flags), dtype=torch.int32)
        flags[[_FIRST_MEMBER + member for member in members]] = cell.MEMBER_OF_VIEW.value
        self.flags.copy_(flags)

    def set_masked(self, rank: int, masked: bool) -> None:
        self.flags[_FIRST_MEMBER + rank] = (cell.MASKED if masked else cell.MEMBER_OF_VIEW).value

    def waited_ns(self) -> torch.Tensor:
        """int64 [W], on the host."""
        return self.ctl[_TABLE + self._num_ranks :].cpu()

    def void_reason(self) -> VoidReason | None:
        """None: clean. Waits for the device."""
        return REASONS.get(int(self.flags[cell.STATUS.value]))

    def members(self) -> tuple[int, ...]:
        flags = self.flags[_FIRST_MEMBER : _FIRST_MEMBER + self._num_ranks].tolist()
        return tuple(rank for rank, flag in enumerate(flags) if flag == cell.MEMBER_OF_VIEW.value)

    def observed(self) -> torch.Tensor:
        """int32 [W], on the host."""
        return self.flags[_FIRST_MEMBER + self._num_ranks :].cpu()
