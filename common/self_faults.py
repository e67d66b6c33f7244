"""Faults that a process does to itself because the monitor asked for them, and the proof that they are in force. Pure.

    asked: slow --> in force --own work measured under the factor--> said
    asked: corrupt_heap --memory overwritten--> said

Who has said it says it again when asked again: the word may have been lost.
"""

from common.ids import ProcessId
from common.messages import Inject, Injected

_NUM_ROUNDS = 3  # measured before a factor counts as proven


class SelfFaults:
    def __init__(self, process: ProcessId) -> None:
        self._process = process
        self._said: dict[str, Injected] = {}
        self._slow: Inject | None = None  # in force and not proven yet
        self._num_rounds, self._own_s, self._work_s = 0, 0.0, 0.0
        self.num_slow_percent = 100

    def is_new(self, inject: Inject) -> bool:
        return inject.id not in self._said and (self._slow is None or self._slow.id != inject.id)

    def said(self, inject: Inject) -> list[Injected]:
        return [self._said[inject.id]] if inject.id in self._said else []

    def on_slow(self, inject: Inject) -> None:
        self._slow, self.num_slow_percent = inject, round(100 * inject.factor)
        self._num_rounds, self._own_s, self._work_s = 0, 0.0, 0.0

    def on_round(self, own_s: float, work_s: float) -> list[Injected]:
        """A round's own time, and what it would have been without the factor."""
        if self._slow is None:
            return []
        self._num_rounds, self._own_s, self._work_s = self._num_rounds + 1, self._own_s + own_s, self._work_s + work_s
        if self._num_rounds < _NUM_ROUNDS:
            return []
        slow, self._slow = self._slow, None
        own_ms, work_ms = (1000 * seconds / self._num_rounds for seconds in (self._own_s, self._work_s))
        text = f"{own_ms:.2f} ms of own time a round for {work_ms:.2f} ms of work, in {self._num_rounds} rounds"
        return [self._say(slow, own_ms >= 0.9 * slow.factor * work_ms, text)]

    def on_corrupted(self, inject: Inject, text: str) -> list[Injected]:
        return [self._say(inject, True, text)]

    def _say(self, inject: Inject, ok: bool, proof: str) -> Injected:
        self._said[inject.id] = Injected(self._process, inject.id, ok, proof)
        return self._said[inject.id]
