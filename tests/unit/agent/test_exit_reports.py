"""Exit reports go out at once, are repeated, and end."""

from common.ids import ProcessId
from common.messages import Exited
from services.agent.exit_reports import REPEAT_EVERY_S, REPEAT_FOR_S, ExitReports

REPORT = Exited("agent", ProcessId("decode-0-aa"), "decode-0", 42, "signal KILL")


def test_reports_at_once_then_repeats_for_a_bounded_time() -> None:
    reports = ExitReports()
    assert reports.on_exit(REPORT, 0.0) == [REPORT]
    assert reports.on_tick(REPEAT_EVERY_S / 2) == []
    times = [tick / 100 for tick in range(2000) if reports.on_tick(tick / 100)]
    assert times[0] == REPEAT_EVERY_S
    assert times[-1] < REPEAT_FOR_S
    assert len(times) == int(REPEAT_FOR_S / REPEAT_EVERY_S) - 1
