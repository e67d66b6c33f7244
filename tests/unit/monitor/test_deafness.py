"""A monitor that hears nobody blames nobody, but not for longer than it has to."""

from common.ids import ProcessId
from tests.unit.monitor.driver import CONFIG, Driver, Puppet

TIMEOUT_S = CONFIG.monitor.heartbeat_timeout_s


def _cut_off(driver: Driver, seconds: float) -> list[Puppet]:
    """The network ends all lifelines."""
    everybody = list(driver.puppets.values())
    for number, puppet in enumerate(everybody, start=1):
        puppet.is_beating = False
        driver.perform(driver.monitor.on_lifeline_timed_out(puppet.process, number, driver.now))
    driver.advance(seconds)
    assert driver.kinds().count("deaf") == 1
    return everybody


def test_a_host_that_has_started_anew_serves_at_once() -> None:
    """Its agent did not find the ranks of before, and nobody is left who could report them."""
    driver = Driver()
    driver.form()
    for puppet in _cut_off(driver, 600.0):
        del driver.puppets[puppet.process]
    driver.enter("agent", "agent-0", "agent-0-b")
    for number in range(3):
        driver.enter("decode", f"decode-{number}", f"decode-{number}-b")
    driver.advance(1.0)
    assert driver.ranks == [0, 1, 2]
    assert {member.process[-1] for member in driver.monitor.group.members} == {"b"}


def test_who_falls_silent_when_all_have_been_heard_again_is_removed_in_the_usual_time() -> None:
    driver = Driver()
    puppets = driver.form()
    for puppet in _cut_off(driver, 300.0):
        puppet.is_beating = True
        driver.open_lifeline(puppet)
    driver.advance(1.0)
    puppets[1].is_beating = False
    driver.advance(TIMEOUT_S + 0.5)
    assert driver.ranks == [0, 2]


def test_who_is_not_heard_again_at_all_is_waited_for_as_long_as_tcp_may_take() -> None:
    driver = Driver()
    puppets = driver.form()
    for puppet in _cut_off(driver, 300.0):
        puppet.is_beating = puppet is not puppets[1]
        driver.open_lifeline(puppet)
    driver.advance(100.0)
    assert driver.ranks == [0, 1, 2]
    driver.advance(40.0)
    assert driver.ranks == [0, 2]


def test_a_new_life_of_the_agent_that_lists_a_silent_member_is_no_proof_against_it() -> None:
    driver = Driver()
    puppets = driver.form()
    _cut_off(driver, 30.0)
    del driver.puppets[ProcessId("agent-0-a")]
    driver.hello(driver.enter("agent", "agent-0", "agent-0-b"), children=tuple(puppets))
    driver.advance(20.0)
    assert driver.ranks == [0, 1, 2]
