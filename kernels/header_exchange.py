"""Headers: what every rank tells all members at the start of a round, and a newcomer before it is let in. PROTOCOL
sections 1.3, 1.4 and 4.1.

    send_header -> what needs nobody else -> await_headers         or both at once: allgather
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kernels.elastic_mode import ElasticMode
from kernels.epoch_state import VOID, EpochState, VoidReason
from kernels.step_words import epoch_floor, header_bank, header_tag, tagged

_LOW_HALF = np.uint64(0xFFFFFFFF)
_HIGH_HALF = np.uint64(32)


class HeaderDue(NamedTuple):
    """A header that was sent, and those of the others have not been waited for."""

    step: int
    bank: int


@dataclass(frozen=True, slots=True)
class HeaderRound:
    """The headers of one round: data words of every member, own included."""

    step: int
    words_by_rank: dict[int, tuple[int, ...]]


class HeaderExchange(EpochState):
    """Base of ``ElasticGroup``."""

    # Before the first epoch:
    headers: HeaderRound | None = None  # of the last `send_header`, once they are here
    _num_headers = 0
    _header_due: HeaderDue | None = None
    _stop: Callable[[], bool] | None = None
    _announced: tuple[int, list[int]] | None = None
    _combine_due = 0  # step of the dispatch whose combine comes next; 0: none

    def adopt(self, epoch: int, members: Sequence[int], digest: int, *, in_band: bool = False) -> None:
        super().adopt(epoch, members, digest, in_band=in_band)
        self._num_headers = self._combine_due = 0
        self._header_due = None

    def allgather(self, header_words: Sequence[int], stop: Callable[[], bool] | None = None) -> HeaderRound | None:
        """Exchange up to ``num_header_words`` unsigned 32-bit words (padded with 0); the first operation of every
        epoch.

        Patient: no deadline (but in mode ALONE), since a member may be loading a repaired expert; ``stop()`` becoming
        true ends it like a word from the host. Two digests among the headers void the round.
        """
        self.send_header(header_words, stop)
        return self.await_headers()

    def send_header(self, header_words: Sequence[int], stop: Callable[[], bool] | None = None) -> None:
        """The first half of an `allgather`, unless this rank is VOID: what needs nobody else can be done before
        ``await_headers``, which comes before the next operation.
        """
        data = self._header_data(header_words, self.digest)
        self.headers = None
        if self.status == VOID:
            return
        if self._combine_due:
            raise RuntimeError("a header between dispatch and combine")
        if self._header_due:
            raise RuntimeError("send_header out of order: the headers of the last round were not waited for")
        step = self._next_step()
        bank = header_bank(self.epoch, self._num_headers)
        if self._announced is None or self._announced[0] != step:
            self._send_header(step, bank, data)
        elif self._announced[1] != data:
            raise ValueError(f"the first header of epoch {self.epoch} differs from the one announced")
        self._num_headers += 1
        self._header_due, self._stop = HeaderDue(step, bank), stop

    @property
    def header_due(self) -> bool:
        """Whether the headers of the others have yet to be waited for."""
        return self._header_due is not None and self.status != VOID

    def await_headers(self) -> HeaderRound | None:
        """The second half of an `allgather`."""
        if self.status == VOID:
            return None
        if (due := self._header_due) is None:
            raise RuntimeError("await_headers out of order: send_header comes first")
        deadline_s = self.deadline_s if self.elastic is ElasticMode.ALONE else None
        if not self._await_words(self._own.header_wait[due.bank], due.step, deadline_s, self._stop):
            return None
        self._header_due = None
        rows = self._own.header_data[due.bank, list(self.members)]
        if (rows >> _HIGH_HALF != header_tag(due.step)).any():
            self._void(VoidReason.FUTURE_WORD)
            return None
        return self._header_round(due.step, (rows & _LOW_HALF).tolist())

    def _header_round(self, step: int, data_by_member: list[list[int]]) -> HeaderRound | None:
        if len({row[0] for row in data_by_member}) > 1:
            self._void(VoidReason.DIGEST)
            return None
        words = {m: tuple(row[1:]) for m, row in zip(self.members, data_by_member, strict=True)}
        self.headers = HeaderRound(step, words)
        return self.headers

    def announce_header(
        self, epoch: int, member_ranks: Sequence[int], header_words: Sequence[int], digest: int
    ) -> None:
        """A newcomer's first header of ``epoch``, written into the heap of every member before it adopts: mapped,
        loaded, ready (PROTOCOL 4.1).

        The newcomer then waits for ``all_announced``, adopts, and passes the same words and digest to its first
        allgather.
        """
        step = epoch_floor(epoch) | 1
        if epoch <= self.epoch:
            raise ValueError(f"epoch {epoch} is not above the current epoch {self.epoch}")
        unmapped = sorted(set(member_ranks) - set(self._windows))
        if unmapped:
            raise ValueError(f"cannot announce to ranks whose heaps are not mapped here: {unmapped}")
        data = self._header_data(header_words, digest)
        self._write_header(step, header_bank(epoch, 0), [*member_ranks, self.rank], data)
        if self._rings:
            self._bell.ring(member_ranks)
        self._announced = (step, data)

    def sees_announcement(self, epoch: int, rank: int) -> bool:
        """Whether the first header of ``epoch`` from ``rank`` lies in this heap."""
        return bool(self._own.header_word[header_bank(epoch, 0)][rank] == epoch_floor(epoch) | 1)

    def all_announced(self, epoch: int, member_ranks: Sequence[int]) -> bool:
        """Whether every member has entered ``epoch``: how a newcomer learns that it was let in."""
        return all(self.sees_announcement(epoch, rank) for rank in member_ranks)

    def headers_waiting(self) -> tuple[int, ...]:
        """Members that have published the next header already: an idle rank polls this, so a lost wake-up costs one
        poll.
        """
        words = self._own.header_word[header_bank(self.epoch, self._num_headers)]
        return tuple(rank for rank in self.members if rank != self.rank and words[rank] > self.step)

    def _header_data(self, header_words: Sequence[int], digest: int) -> list[int]:
        num_words = self.layout.ep.num_header_words
        if len(header_words) > num_words:
            raise ValueError(f"a header has {num_words} words, got {len(header_words)}")
        data = [digest, *header_words] + [0] * (num_words - len(header_words))
        if min(data) < 0 or max(data) >> 32:
            raise ValueError(f"digest and header words are 32-bit unsigned, got {data}")
        return data

    def _send_header(self, step: int, bank: int, data: list[int]) -> None:
        self._write_header(step, bank, self.members, data)
        self._ring()

    def _write_header(self, step: int, bank: int, members: Sequence[int], data: list[int]) -> None:
        row = np.array(tagged(step, data), np.uint64)
        for window in self._windows.of(members):
            window.header_data[bank, self.rank] = row
            window.header_word[bank][self.rank] = step
