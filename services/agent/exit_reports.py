"""Exits that the monitor should hear of. Pure.

A report goes out at once and is repeated for `REPEAT_FOR_S`, since one message may be lost with its connection. A
monitor that comes later than that learns from the agent's Hello, which lists the children alive.
"""

from dataclasses import dataclass

from common.messages import Exited

REPEAT_EVERY_S = 0.5
REPEAT_FOR_S = 10.0


@dataclass(slots=True)
class _Report:
    message: Exited
    next_at: float
    until: float


class ExitReports:
    def __init__(self) -> None:
        self._reports: list[_Report] = []

    def on_exit(self, message: Exited, now: float) -> list[Exited]:
        self._reports.append(_Report(message, now + REPEAT_EVERY_S, now + REPEAT_FOR_S))
        return [message]

    def on_tick(self, now: float) -> list[Exited]:
        self._reports = [report for report in self._reports if now < report.until]
        due = [report for report in self._reports if now >= report.next_at]
        for report in due:
            report.next_at = now + REPEAT_EVERY_S
        return [report.message for report in due]
