"""`WordWait` in C. It returns to Python every few milliseconds, for deadlines, ``stop`` and link faults."""

from collections.abc import Callable, Sequence

from kernels.cpu import exchange
from kernels.cpu.exchange import CompiledExchange
from kernels.doorbell import Doorbell
from kernels.heap_window import OwnWords
from kernels.word_wait import LONGER_FOR_EACH, Clock, WaitEnd, WordWait

FIRST_PART_NS = _PART_NS = 4_000_000
_ENDS = {
    exchange.COMPLETE: WaitEnd.COMPLETE,
    exchange.FUTURE_WORD: WaitEnd.FUTURE_WORD,
    exchange.HOST_POISON: WaitEnd.HOST_POISON,
    exchange.PEER_POISON: WaitEnd.PEER_POISON,
}


class CompiledWait(WordWait):
    """``clock`` must be CLOCK_MONOTONIC, which C reads."""

    def __init__(self, rank: int, poison: memoryview, bell: Doorbell, clock: Clock, compiled: CompiledExchange) -> None:
        self._compiled = compiled
        super().__init__(rank, poison, bell, clock, None)

    @property
    def missing(self) -> tuple[int, ...]:
        # A copy first: another thread may ask while C writes, and numpy refuses to search what changes.
        return tuple(rank for rank, is_missing in enumerate(self._compiled.is_missing_W.tobytes()) if is_missing)

    @missing.setter
    def missing(self, ranks: tuple[int, ...]) -> None:
        self._compiled.is_missing_W[:] = 0
        self._compiled.is_missing_W[list(ranks)] = 1

    def waited_ns(self) -> list[int]:
        return [a + b for a, b in zip(super().waited_ns(), self._compiled.waited_ns_W.tolist(), strict=True)]

    def until(
        self,
        words: OwnWords,
        members: Sequence[int],
        step: int,
        floor: int,
        deadline_s: float | None,
        stop: Callable[[], bool] | None = None,
    ) -> WaitEnd:
        compiled, clock = self._compiled, self._clock
        compiled.set_members(members)
        compiled.begin_wait(words, step, floor)
        start = now = clock()
        part_ns = 0 if stop else _PART_NS
        while True:
            if self.fault is not None and self.fault.is_deaf():
                return super().until(words, members, step, floor, deadline_s, stop)
            found = compiled.wait(part_ns)
            if found == exchange.COMPLETE:
                return WaitEnd.COMPLETE
            end = _ENDS.get(found)
            if end is None:
                if stop is not None and stop():
                    end = WaitEnd.STOPPED
                elif self._is_late(now - start, deadline_s):
                    end = WaitEnd.DEADLINE
            if end is not None:
                compiled.waited_ns_W[list(self.missing)] += round(1e9 * (clock() - start))
                return end
            self.while_waiting()
            # Before the words, as everywhere: a process that was stopped looks once more before it accuses anybody.
            now = clock()
            part_ns = 0 if self._is_late(now - start, deadline_s) else _PART_NS

    def _is_late(self, waited_s: float, deadline_s: float | None) -> bool:
        if deadline_s is None or waited_s < deadline_s:
            return False
        return waited_s >= deadline_s * (1 + LONGER_FOR_EACH * (len(self.missing) - 1))
