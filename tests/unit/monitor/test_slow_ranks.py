"""Removal of slow ranks: only where it is configured, one at a time, and never for what the monitor itself missed."""

import msgspec
import pytest

from common.config import ClusterConfig, MonitorConfig, validate
from tests.unit.monitor.driver import CONFIG, Driver, Puppet

SLOW = msgspec.structs.replace(CONFIG, monitor=MonitorConfig(slow_factor=1.5, slow_for_s=3.0))


def work(driver: Driver, puppets: list[Puppet], round_us: dict[int, int], seconds: float) -> None:
    """The group computes rounds; ``round_us`` gives the own time of the ranks that do not take 1000."""
    for _ in range(round(seconds / 0.1)):
        for index, puppet in enumerate(puppets):
            counters = puppet.counters
            counters["compute_rounds"] = counters.get("compute_rounds", 0) + 10
            counters["own_us"] = counters.get("own_us", 0) + 10 * round_us.get(index, 1000)
        driver.advance(0.1)


def test_twice_as_slow_is_kept_by_default() -> None:
    driver = Driver()
    work(driver, driver.form(), {1: 2000}, 30.0)
    assert driver.ranks == [0, 1, 2]


@pytest.mark.parametrize("round_us", [2000, 10_000])
def test_a_slow_rank_is_removed_after_the_configured_time(round_us: int) -> None:
    driver = Driver(SLOW)
    puppets = driver.form()
    work(driver, puppets, {1: round_us}, 2.8)
    assert driver.ranks == [0, 1, 2]
    work(driver, puppets, {1: round_us}, 1.5)
    assert driver.ranks == [0, 2]
    evidence = driver.last_event("removed")["evidence"]
    assert evidence.startswith(f"slow: {round_us / 1000:.1f} ms of own time a round, 1.0 ms is usual")


def test_below_the_factor_is_kept() -> None:
    driver = Driver(SLOW)
    work(driver, driver.form(), {1: 1400}, 20.0)
    assert driver.ranks == [0, 1, 2]


def test_a_short_slowness_is_forgotten() -> None:
    driver = Driver(SLOW)
    puppets = driver.form()
    for _ in range(4):
        work(driver, puppets, {1: 5000}, 2.0)
        work(driver, puppets, {}, 1.5)
    assert driver.ranks == [0, 1, 2]


def test_an_idle_group_proves_nothing() -> None:
    driver = Driver(SLOW)
    puppets = driver.form()
    work(driver, puppets, {1: 5000}, 2.0)
    driver.advance(30.0)
    assert driver.ranks == [0, 1, 2]


def test_never_over_a_late_tick() -> None:
    driver = Driver(SLOW)
    puppets = driver.form()
    for _ in range(6):
        work(driver, puppets, {1: 5000}, 2.0)
        driver.sleep(1.0)
    assert driver.ranks == [0, 1, 2]


def test_one_at_a_time_and_never_the_room_for_all_experts() -> None:
    decode = msgspec.structs.replace(CONFIG.decode, num_redundant_experts=1)
    driver = Driver(msgspec.structs.replace(SLOW, decode=decode))
    puppets = driver.form()
    assert driver.monitor.group.experts.min_ranks == 2
    work(driver, puppets, {0: 9000, 1: 9001}, 4.0)
    assert driver.ranks == [0, 2]
    driver.exited(puppets[1])
    work(driver, [puppets[0], puppets[2]], {0: 9000}, 20.0)
    assert driver.ranks == [0, 2], "one more and there would be no room for all experts"


@pytest.mark.parametrize("factor", [0.5, 1.0, -1.0, float("nan")])
def test_a_factor_that_removes_everybody_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match="slow_factor must be above 1, or 0"):
        validate(ClusterConfig(monitor=MonitorConfig(slow_factor=factor)))
