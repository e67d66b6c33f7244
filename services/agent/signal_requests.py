"""Signals that the monitor asked for, and the proof that each took effect. Pure.

    asked --sent--> PENDING --reaped, or /proc shows the state--> answered (kept, for repeats)
                       |                 (a stop for a time: then it is continued)
                       |
                       +------- `PROOF_S` without effect --------> answered: failed

The same id asked again is answered again and sends nothing, so the monitor may repeat itself until it hears.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import TypeVar

from common.ids import ProcessId
from common.messages import Signal, SignalDone

PROOF_S = 5.0
_NUM_REMEMBERED = 256
RESTART = "RESTART"  # no signal: a successor is started, and the process leaves when that one serves
SIGNALS = ("KILL", "TERM", "STOP", "CONT", RESTART)


@dataclass(frozen=True, slots=True)
class Deliver:
    """Send ``signal`` (a name) to the child that is ``process``. If it is gone, its exit will be the answer."""

    process: ProcessId
    signal: str


@dataclass(frozen=True, slots=True)
class Answer:
    message: SignalDone


Action = Deliver | Answer


@dataclass(frozen=True, slots=True)
class _Pending:
    signal: Signal
    deadline: float


class SignalRequests:
    def __init__(self) -> None:
        self._continue_at: list[tuple[float, ProcessId]] = []
        self._pending: dict[str, _Pending] = {}
        self._answers: OrderedDict[str, SignalDone] = OrderedDict()
        self._exits: OrderedDict[ProcessId, str] = OrderedDict()

    @property
    def stop_or_cont_pending(self) -> list[ProcessId]:
        """Processes whose state `on_state` wants to hear."""
        return [p.signal.process for p in self._pending.values() if p.signal.signal in ("STOP", "CONT")]

    def answered(self, id: str) -> SignalDone | None:
        return self._answers.get(id)

    def on_request(self, signal: Signal, is_alive: bool, now: float) -> list[Action]:
        if answer := self._answers.get(signal.id):
            return [Answer(answer)]
        if signal.id in self._pending:
            return []
        if signal.signal not in SIGNALS:
            return [self._answer(signal, False, f"unknown signal {signal.signal!r}")]
        if not is_alive:
            return [self._answer_for_gone(signal)]
        self._pending[signal.id] = _Pending(signal, now + PROOF_S)
        if signal.signal == "STOP" and signal.duration_s > 0:
            self._continue_at.append((now + signal.duration_s, signal.process))
        return [Deliver(signal.process, signal.signal)]

    def on_exit(self, process: ProcessId, reason: str) -> list[Action]:
        self._exits[process] = reason
        _forget_oldest(self._exits)
        due = [pending.signal for pending in self._pending.values() if pending.signal.process == process]
        return [self._answer_for_gone(signal) for signal in due]

    def on_state(self, process: ProcessId, state: str) -> list[Action]:
        """``state``: the letter of /proc/PID/stat."""
        actions: list[Action] = []
        for pending in list(self._pending.values()):
            signal = pending.signal
            if signal.process == process and (
                (signal.signal == "STOP" and state == "T") or (signal.signal == "CONT" and state not in ("T", ""))
            ):
                actions.append(self._answer(signal, True, f"state {state}"))
        return actions

    def on_stood_still(self, signal: Signal, seconds: float) -> Answer:
        """The agent has stopped itself, and was continued."""
        return self._answer(signal, seconds > 0, f"stood still for {seconds:.2f} s")

    def on_tick(self, now: float) -> list[Action]:
        awake = [process for at, process in self._continue_at if now >= at]
        self._continue_at = [entry for entry in self._continue_at if now < entry[0]]
        due = [pending.signal for pending in self._pending.values() if now >= pending.deadline]
        continued: list[Action] = [Deliver(process, "CONT") for process in awake]
        return continued + [self._answer(signal, False, f"no effect within {PROOF_S:.0f} s") for signal in due]

    def _answer_for_gone(self, signal: Signal) -> Answer:
        reason = self._exits.get(signal.process)
        proof = f"reaped: {reason}" if reason else "no such process"
        return self._answer(signal, signal.signal in ("KILL", "TERM"), proof)

    def _answer(self, signal: Signal, ok: bool, proof: str) -> Answer:
        self._pending.pop(signal.id, None)
        self._answers[signal.id] = SignalDone(signal.id, signal.process, ok, proof)
        _forget_oldest(self._answers)
        return Answer(self._answers[signal.id])


Key = TypeVar("Key")
Value = TypeVar("Value")


def _forget_oldest(memory: OrderedDict[Key, Value]) -> None:
    if len(memory) > _NUM_REMEMBERED:
        memory.popitem(last=False)
