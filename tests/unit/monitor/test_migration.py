"""Plans: taken only from the placement in force, staged by all, in force together, abandoned without a trace."""

import pytest

from common.config import ClusterConfig, DecodeConfig
from common.ids import ProcessId
from common.messages import PlacementPlan, Prepare, StagePlacement
from common.placement import PhysicalToLogical
from common.view import orphans
from services.monitor.migration import Migration
from tests.unit.monitor.driver import NUM_EXPERTS, Driver, Puppet

# Six experts, two copies of each, four slots on each of three ranks: two ranks have room for all.
CONFIG = ClusterConfig(decode=DecodeConfig(num_ranks=3, max_ranks=5, num_redundant_experts=6, num_staging_experts=2))


@pytest.fixture
def driver() -> Driver:
    driver = Driver(CONFIG)
    driver.form()
    driver.advance(1.0)
    return driver


def in_force(driver: Driver) -> PhysicalToLogical:
    assert driver.view is not None
    return driver.view.placement.physical_to_logical


def version(driver: Driver) -> int:
    assert driver.view is not None
    return driver.view.placement.version


def migration(driver: Driver) -> Migration:
    return driver.monitor.migration


def with_copy(placement: PhysicalToLogical, rank: int, num_layers: int = 1) -> PhysicalToLogical:
    """Another expert in the first slot of the rank, in so many layers."""
    layers = [list(map(list, rows)) for rows in placement]
    for rows in layers[:num_layers]:
        rows[rank][0] = next(expert for expert in range(NUM_EXPERTS) if expert not in rows[rank])
    return tuple(tuple(tuple(row) for row in rows) for rows in layers)


def wish(driver: Driver, wanted: PhysicalToLogical, base: int | None = None) -> None:
    base = version(driver) if base is None else base
    plan = PlacementPlan(ProcessId("planner-a"), base, wanted)
    driver.perform(driver.monitor.on_message(ProcessId("planner-a"), plan, driver.now))


def ranks_of(driver: Driver) -> list[Puppet]:
    return [puppet for puppet in driver.puppets.values() if puppet.kind == "decode"]


def last(driver: Driver) -> tuple[str, str]:
    event = driver.last_event("migration")
    return event["status"], event.get("reason", "")


def test_a_plan_is_staged_by_all_and_then_in_force(driver: Driver) -> None:
    epoch, wanted = driver.epoch, with_copy(in_force(driver), 1)
    slow = ranks_of(driver)[2]
    slow.copies_experts = False
    wish(driver, wanted)
    driver.advance(3.0)
    assert driver.epoch == epoch and in_force(driver) != wanted, "one has not copied yet"
    assert len(slow.got(StagePlacement)) > 3, "it may be lost, so it is repeated"
    assert slow.got(Prepare)[-1].view.placement.physical_to_logical != wanted
    slow.copies_experts = True
    driver.advance(1.5)
    assert driver.epoch > epoch and in_force(driver) == wanted
    assert version(driver) == slow.staged
    assert last(driver)[0] == "in force" and migration(driver).num_moves == 1
    assert "roll_call" not in driver.kinds(), "nobody's round was void"


def test_what_is_staged_starts_from_what_all_have_reported(driver: Driver) -> None:
    wish(driver, with_copy(in_force(driver), 1))
    message = ranks_of(driver)[0].got(StagePlacement)[-1]
    assert message.base_epoch == driver.epoch and message.placement.version > version(driver)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("old base", "made for placement"),
        ("lost expert", "no copy of"),
        ("twice on a rank", "holds"),
        ("no such expert", "holds"),
        ("other shape", "layers"),
        ("too much", "has memory for 2"),
        ("nothing", "changes nothing"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_and_told_once(driver: Driver, change: str, why: str) -> None:
    present = in_force(driver)
    rows = present[0]
    wanted: dict[str, PhysicalToLogical] = {
        "old base": with_copy(present, 1),
        "lost expert": (tuple(tuple(0 if e == 1 else e for e in row) for row in rows), *present[1:]),
        "twice on a rank": (((0, 0, 1, 2), *rows[1:]), *present[1:]),
        "no such expert": (((9, 0, 1, 2), *rows[1:]), *present[1:]),
        "other shape": present[:1],
        "too much": tuple(
            (tuple(e for e in range(6) if e not in row[0])[:2] + row[0][2:], *row[1:]) for row in present
        ),
        "nothing": present,
    }
    if change == "lost expert":
        free = [tuple(e for e in range(6) if e not in row and e != 1) for row in rows]
        swapped = [tuple(free[n][0] if e == 1 else e for e in row) for n, row in enumerate(rows)]
        wanted[change] = (tuple(swapped), *present[1:])
    for _ in range(3):
        wish(driver, wanted[change], base=7 if change == "old base" else None)
    assert migration(driver).moving is None
    told = [event for event in driver.events if event["kind"] == "plan_refused"]
    assert [why in event["reason"] for event in told] == [True]


def test_one_at_a_time_and_a_repetition_is_no_second(driver: Driver) -> None:
    for rank in ranks_of(driver):
        rank.copies_experts = False
    wanted = with_copy(in_force(driver), 1)
    wish(driver, wanted)
    wish(driver, wanted)
    assert "plan_refused" not in driver.kinds()
    wish(driver, with_copy(in_force(driver), 2))
    assert "is on its way" in driver.last_event("plan_refused")["reason"]


def test_a_removal_abandons_it(driver: Driver) -> None:
    ranks = ranks_of(driver)
    ranks[1].copies_experts = False
    before = in_force(driver)
    wish(driver, with_copy(before, 1))
    driver.exited(ranks[2])
    assert last(driver)[0] == "abandoned" and "signal KILL" in last(driver)[1]
    driver.advance(2.0)
    assert driver.view is not None and not orphans(driver.view.placement, (ranks[0].rank, ranks[1].rank), NUM_EXPERTS)
    assert migration(driver).moving is None
    ranks[1].copies_experts = True
    wish(driver, with_copy(in_force(driver), 0))
    driver.advance(2.0)
    assert last(driver)[0] == "in force", "the next plan is taken"


def test_one_that_dies_while_the_view_is_entered_leaves_the_old_placement(driver: Driver) -> None:
    ranks = ranks_of(driver)
    before = in_force(driver)
    ranks[2].follows = False  # it never enters, though it has staged
    wish(driver, with_copy(before, 1))
    ranks[2].staged = ranks[0].staged
    driver.advance(0.5)
    assert driver.monitor.group.prepared is not None, "in the middle of it"
    driver.exited(ranks[2])
    assert driver.monitor.group.prepared is None
    assert driver.view is not None and set(driver.ranks) == {0, 1}
    assert not orphans(driver.view.placement, (ranks[0].rank, ranks[1].rank), NUM_EXPERTS)
    changed = sum(
        a != b for rows, was in zip(in_force(driver), before, strict=True) for a, b in zip(rows, was, strict=True)
    )
    assert changed == 0 or version(driver) == driver.epoch, "the old placement, repaired if need be"
    assert last(driver)[0] == "abandoned"


def test_a_joiner_comes_first(driver: Driver) -> None:
    ranks = ranks_of(driver)
    driver.exited(ranks[2])
    driver.advance(1.0)
    ranks[0].copies_experts = False
    wish(driver, with_copy(in_force(driver), 1))
    assert migration(driver).moving is not None
    driver.enter("decode", "decode-9")
    driver.advance(2.0)
    assert driver.ranks == [0, 1, 2] and last(driver) == ("abandoned", "ranks join")


def test_copying_has_a_deadline(driver: Driver) -> None:
    ranks_of(driver)[1].copies_experts = False
    wish(driver, with_copy(in_force(driver), 1))
    driver.advance(CONFIG.planner.stage_timeout_s + 1.0)
    assert last(driver) == ("abandoned", "not staged in time by rank 1")


def test_entering_has_a_deadline(driver: Driver) -> None:
    """All have staged and one says ready never; those that did are bound, so a view of a higher number ends it."""
    ranks = ranks_of(driver)
    epoch = driver.epoch
    ranks[1].follows = False
    wish(driver, with_copy(in_force(driver), 1))
    ranks[1].staged = ranks[0].staged
    driver.advance(1.0)
    prepared = driver.monitor.group.prepared
    assert prepared is not None and driver.epoch == epoch
    ranks[1].follows = True
    ranks[1].received.clear()
    patience_s = CONFIG.planner.stage_timeout_s + CONFIG.monitor.prepare_timeout_s
    ranks[1].follows = False
    driver.advance(patience_s)
    assert driver.epoch > prepared.view.epoch
    assert last(driver)[0] == "abandoned"


def test_a_new_monitor_knows_nothing_of_it(driver: Driver) -> None:
    for rank in ranks_of(driver):
        rank.copies_experts = False
    before = in_force(driver)
    wish(driver, with_copy(before, 1))
    staged = ranks_of(driver)[0].got(StagePlacement)[-1].placement.version
    ranks_of(driver)[0].staged = staged
    driver.replace_monitor("monitor-2")
    for puppet in driver.puppets.values():
        driver.hello(puppet)
    driver.advance(5.0)
    assert driver.view is not None and in_force(driver) == before
    assert driver.epoch > staged, "a number that was given out is not given out again"
    assert migration(driver).moving is None


def test_a_drained_rank_is_emptied_first() -> None:
    """One copy of each: the others take over what only it holds, then it leaves in a view that repairs nothing."""
    decode = DecodeConfig(num_ranks=3, max_ranks=5, num_redundant_experts=3, num_staging_experts=1)
    driver = Driver(ClusterConfig(decode=decode))
    driver.form()
    driver.advance(1.0)
    assert driver.fault("a", "drain", rank=1) == "accepted"
    assert driver.ranks == [0, 1, 2], "not before others hold its experts"
    driver.advance(8.0)
    moves = [event for event in driver.events if event["kind"] == "migration" and event["status"] == "in force"]
    assert len(moves) >= 2 and {event["cause"] for event in moves} == {"ranks that leave are emptied"}
    removal = driver.last_event("masked")
    assert driver.ranks == [0, 2] and removal["evidence"] == "drain, event a"
    views = [view for view in driver.views if len(view.members) == 2]
    before = [view for view in driver.views if len(view.members) == 3][-1]
    assert views[0].placement == before.placement, "nothing had to be repaired"


def test_a_rank_that_cannot_be_emptied_in_time_goes_all_the_same() -> None:
    decode = DecodeConfig(num_ranks=3, max_ranks=5, num_redundant_experts=3, num_staging_experts=1)
    driver = Driver(ClusterConfig(decode=decode))
    ranks = driver.form()
    driver.advance(1.0)
    ranks[0].copies_experts = False
    driver.fault("a", "drain", rank=1)
    driver.advance(driver.config.monitor.empty_s - 1.0)
    assert driver.ranks == [0, 1, 2]
    driver.advance(2.0)
    assert driver.ranks == [0, 2] and "not emptied within 20 s" in driver.last_event("masked")["evidence"]
    assert driver.view is not None and not orphans(driver.view.placement, (ranks[0].rank, ranks[2].rank), NUM_EXPERTS)


def test_emptying_comes_before_a_plan_and_a_scaled_rank_is_emptied_too() -> None:
    decode = DecodeConfig(num_ranks=3, max_ranks=5, num_redundant_experts=3, num_staging_experts=4)
    driver = Driver(ClusterConfig(decode=decode))
    for rank in driver.form():
        rank.copies_experts = False
    driver.advance(1.0)
    driver.fault("a", "scale", decode=2)
    driver.advance(0.5)
    assert driver.last_event("migration")["cause"] == "ranks that leave are emptied"
    wish(driver, with_copy(in_force(driver), 1))
    assert driver.last_event("plan_refused")["reason"] == "a rank is being emptied"
    for rank in ranks_of(driver):
        rank.copies_experts = True
    driver.advance(3.0)
    assert driver.ranks == [0, 1]
