"""A slow process takes the factor, no more and no less, and says what it measured."""

from common.ids import ProcessId
from common.messages import Inject
from common.pace import Pace
from common.self_faults import SelfFaults


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_own_work_takes_the_factor_and_waits_for_others_do_not() -> None:
    clock = Clock()
    pace = Pace(clock, clock.sleep)
    pace.factor = 4.0
    for _ in range(2):
        pace.resume()
        clock.now += 1.0
        pace.pause()
        clock.now += 100.0  # waits for others
    assert pace.take() == (8.0, 2.0) and clock.now == 208.0
    assert pace.take() == (0.0, 0.0)


def test_a_slowness_is_proven_by_what_was_measured_and_said_again_when_asked() -> None:
    faults = SelfFaults(ProcessId("p"))
    slow = Inject(ProcessId("m"), 1, "s", "slow", 4.0)
    assert faults.is_new(slow) and faults.said(slow) == []
    faults.on_slow(slow)
    assert not faults.is_new(slow) and faults.num_slow_percent == 400
    assert faults.on_round(0.008, 0.002) == [] and faults.on_round(0.008, 0.002) == []
    (said,) = faults.on_round(0.008, 0.002)
    assert said.ok and said.proof == "8.00 ms of own time a round for 2.00 ms of work, in 3 rounds"
    assert faults.said(slow) == [said] and faults.on_round(0.008, 0.002) == []


def test_a_slowness_without_effect_is_told() -> None:
    faults = SelfFaults(ProcessId("p"))
    faults.on_slow(Inject(ProcessId("m"), 1, "s", "slow", 4.0))
    words = [word for _ in range(3) for word in faults.on_round(0.002, 0.002)]
    assert [word.ok for word in words] == [False]
