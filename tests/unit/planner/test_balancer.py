"""From loads to wishes: when there is one, how it goes on step by step, and what ends it."""

from pathlib import Path

import pytest
from msgspec.structs import replace

from common.config import ClusterConfig, DecodeConfig, PlannerConfig, ReplicaPolicy
from common.ids import Epoch, Incarnation, ProcessId, Rank
from common.messages import ExpertLoad, Member, Placement, View
from common.placement import PhysicalToLogical, initial_placement, num_local_experts
from common.placement_file import PlacementFile, parse_placement_file
from services.planner.balancer import Balancer, ModelShape
from services.planner.plan import answer, first_plan
from services.planner.rebalance_trigger import Verdict

PLANNER = ProcessId("planner-a")
NUM_EXPERTS, NUM_LAYERS = 8, 2
DECODE = DecodeConfig(num_ranks=2, max_ranks=3, num_redundant_experts=2, num_staging_experts=2)
SETTINGS = PlannerConfig(window_size=40, step_interval=20, least_gain=0.01, replica_policy=ReplicaPolicy.HASH)
CONFIG = ClusterConfig(decode=DECODE, planner=SETTINGS)
# Most of it on the first rank, with the placement that knows no loads.
SKEWED = ((5, 5, 90, 5, 90, 5, 90, 5), (5, 5, 5, 90, 5, 90, 5, 90))
EVEN = ((10,) * NUM_EXPERTS,) * NUM_LAYERS


def view(version: int, placement: PhysicalToLogical | None = None, num_ranks: int = 2) -> View:
    members = tuple(Member(Rank(r), Incarnation(1), ProcessId(f"d{r}"), f"h{r}", "e", "x") for r in range(num_ranks))
    local = num_local_experts(DECODE, NUM_EXPERTS)
    rows = placement or initial_placement(NUM_LAYERS, NUM_EXPERTS, 3, 2, local)
    return View(ProcessId("m"), 1, Epoch(version), members, Placement(version, rows))


class Life:
    """A balancer, and a clock that the test moves."""

    def __init__(self, config: ClusterConfig = CONFIG) -> None:
        self.now = 0.0
        self.balancer = Balancer(PLANNER, config, ModelShape(NUM_LAYERS, NUM_EXPERTS, 1, 1000))
        self.balancer.on_view(view(1030), self.now)

    def second(self, tokens: tuple[tuple[int, ...], ...], num_passes: int = 10) -> Verdict | None:
        """Both ranks report; a plan that is asked for is made at once."""
        self.now += 1.0
        for rank in range(2):
            self.balancer.on_load(ExpertLoad(Rank(rank), Incarnation(1), 1030, tokens, num_passes, 0.5))
        question = self.balancer.on_tick(self.now)
        return self.balancer.on_answer(answer(question), self.now) if question else None

    def seconds(self, tokens: tuple[tuple[int, ...], ...], count: int) -> list[Verdict | None]:
        return [self.second(tokens) for _ in range(count)]

    def carry_out(self) -> View:
        """What the monitor does with a wish."""
        wish, present = self.balancer.wish, self.balancer.view
        assert wish is not None and present is not None and wish.base_version == present.placement.version
        following = view(present.epoch + 2, wish.physical_to_logical)
        self.balancer.on_view(following, self.now)
        return following


def test_skewed_traffic_leads_to_a_wish_at_the_second_look() -> None:
    life = Life()
    verdicts = [verdict for verdict in life.seconds(SKEWED, 4) if verdict]
    assert verdicts == [Verdict.WAITING_FOR_A_SECOND_WINDOW, Verdict.REBALANCE]
    assert life.balancer.wish is not None and life.balancer.wish.base_version == 1030
    assert life.balancer.wish.balancedness > 0.9


def test_a_target_is_reached_in_steps_that_fit() -> None:
    life, num_steps = Life(), 0
    life.seconds(SKEWED, 4)
    while life.balancer.wish is not None:
        life.carry_out()
        num_steps += 1
        assert num_steps < 10
    assert num_steps > 1 and life.balancer.num_steps == num_steps
    figures = life.balancer.assess()
    assert figures is not None and figures["balancedness"] > 0.9
    assert Verdict.REBALANCE not in life.seconds(SKEWED, 4), "what has been reached is even enough"


def test_what_the_policy_of_copies_makes_useless_is_not_wished_for() -> None:
    """The same traffic and the same plan; but no copy more takes anything off the one that serves."""
    one_busy = ((5, 5, 600, 5, 5, 5, 5, 5),) * NUM_LAYERS
    even, gathered = Life(), Life(replace(CONFIG, planner=replace(CONFIG.planner, replica_policy=ReplicaPolicy.GATHER)))
    for life in (even, gathered):
        life.seconds(one_busy, 8)
    assert even.balancer.wish is not None and even.balancer.wish.balancedness > 0.9
    assert gathered.balancer.wish is None and gathered.balancer.last_verdict is Verdict.EVEN_ENOUGH


@pytest.mark.parametrize("tokens", [((0,) * NUM_EXPERTS,) * NUM_LAYERS, EVEN])
def test_dead_and_even_traffic_changes_nothing(tokens: tuple[tuple[int, ...], ...]) -> None:
    life = Life()
    life.balancer.on_view(view(1031, initial_placement(NUM_LAYERS, NUM_EXPERTS, 3, 2, NUM_EXPERTS // 2)), 0.0)
    life.seconds(tokens, 10)
    assert life.balancer.wish is None


def test_another_placement_ends_it() -> None:
    life = Life()
    life.seconds(SKEWED, 4)
    assert life.balancer.wish is not None
    life.balancer.on_view(view(1040), life.now)
    assert life.balancer.wish is None, "made for what is no longer in force"


def test_a_wish_that_nobody_carries_out_is_given_up() -> None:
    life = Life()
    life.seconds(SKEWED, 4)
    life.now += CONFIG.planner.stage_timeout_s + 10.0
    life.balancer.on_tick(life.now)
    assert life.balancer.wish is None


def test_a_plan_that_is_late_changes_nothing_and_is_asked_for_again() -> None:
    life = Life()
    life.seconds(SKEWED, 1)
    life.now += 1.0
    life.balancer.on_load(ExpertLoad(Rank(0), Incarnation(1), 1030, SKEWED, 10, 0.5))
    assert life.balancer.on_tick(life.now) is not None
    assert life.balancer.on_tick(life.now + 1.0) is None, "one at a time"
    assert life.balancer.on_answer(None, life.now + 5.0) is None
    assert life.balancer.num_late == 1 and life.balancer.on_tick(life.now + 6.0) is not None


def test_vacant_slots_and_what_a_plan_may_move() -> None:
    life = Life(replace(CONFIG, planner=replace(CONFIG.planner, max_moves=8)))
    life.balancer.on_load(ExpertLoad(Rank(0), Incarnation(1), 1030, SKEWED, 20, 0.5))
    question = life.balancer.on_tick(1.0)
    assert question is not None
    made = answer(question)
    assert 0 < made.num_moves <= 8
    before = question.view.placement.physical_to_logical
    assert [rows[2] for rows in made.physical_to_logical] == [rows[2] for rows in before]


def test_a_recorded_placement_or_recorded_loads_come_first() -> None:
    local = num_local_experts(DECODE, NUM_EXPERTS)
    plain = first_plan(PLANNER, DECODE, NUM_LAYERS, NUM_EXPERTS).physical_to_logical
    other = tuple(tuple(rows[::-1]) for rows in plain)
    assert first_plan(PLANNER, DECODE, NUM_LAYERS, NUM_EXPERTS, PlacementFile(other)).physical_to_logical == other
    loads = parse_placement_file('{"tokens": [[[9, 8, 7, 6, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]]]}')
    planned = first_plan(PLANNER, DECODE, NUM_LAYERS, NUM_EXPERTS, loads).physical_to_logical
    assert planned != plain and [len(row) for rows in planned for row in rows] == [local] * 6
    assert {0, 1} <= set(planned[0][0]) & set(planned[0][1]), "the busiest experts have a copy on both ranks"
    with pytest.raises(ValueError, match="not of"):
        first_plan(PLANNER, DECODE, NUM_LAYERS + 1, NUM_EXPERTS, PlacementFile(other))
    with pytest.raises(ValueError, match="not of"):
        first_plan(PLANNER, DECODE, NUM_LAYERS + 1, NUM_EXPERTS, loads)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "neither"),
        ('{"physical_to_logical": [1]}', "lists"),
        ('{"physical_to_logical": [[["a"]]]}', "numbers"),
        ('{"loads": [[-1]]}', "negative"),
        ('{"loads": [[NaN]]}', "no numbers"),
        ('{"tokens": [[[1], [2]], [[1]]]}', "one shape"),
    ],
)
def test_files_that_are_no_record_are_refused(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_placement_file(text)


def test_what_is_exported_is_read_again() -> None:
    record = PlacementFile((((0, 1), (1, -1)),), ((1.0, 2.5),), "abacus", 1030)
    assert parse_placement_file(record.to_text()) == record
    trace = Path(__file__).parents[3] / "benchmarks" / "planner" / "traces" / "abacus_mixes.json"
    loads = parse_placement_file(trace.read_text()).loads
    assert loads is not None and len(loads) == 4 and len(loads[0]) == 32
