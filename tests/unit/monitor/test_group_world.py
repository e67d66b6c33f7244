"""Random faults against the whole group: promises hold throughout, and it is whole again when the faults end."""

import random

import pytest

from tests.unit.monitor.group_nodes import Bad
from tests.unit.monitor.group_world import World

QUIET_S, SETTLED_S = 12.0, 70.0


def inject(world: World, rng: random.Random) -> None:
    """One random fault. At least two ranks are left alone, so that there is always a group."""
    alive = [rank for rank in world.ranks if rank.is_alive]
    running = [rank for rank in alive if rank.is_running]
    kind = rng.random()
    if kind < 0.35 and len(running) > 2:
        world.kill_rank(rng.choice(running))
    elif kind < 0.6 and len(running) > 2:
        rng.choice(running).stop_for(rng.choice((0.1, 0.5, rng.uniform(1.0, 8.0))))
    elif kind < 0.7:
        rng.choice(running or alive).flap()
    elif kind < 0.85:
        world.kill_monitor(rng.uniform(0.3, 2.0))
    elif world.monitor.is_alive:
        world.monitor.stop_for(rng.choice((0.3, rng.uniform(0.5, 6.0))))


def simulate(seed: int) -> World:
    world, rng = World(seed), random.Random(seed * 7 + 1)
    for _ in range(rng.randint(1, 10)):
        world.at(rng.uniform(0.5, QUIET_S), lambda: inject(world, rng))
    try:
        world.run_until(QUIET_S)
        end_s = QUIET_S
        while end_s < QUIET_S + SETTLED_S and (world.settled() or end_s < QUIET_S + 4):
            end_s += 1.0
            world.run_until(end_s)
        if trouble := world.settled():
            raise Bad(f"not whole {SETTLED_S} s after the last fault: {trouble}")
    except (Bad, AssertionError) as error:
        raise AssertionError(f"seed {seed} at {world.now:.3f}: {error}\n" + "\n".join(world.log[-60:])) from error
    return world


def test_without_faults_the_group_forms_once_and_stays() -> None:
    world = World(1, loss=0.0)
    world.random.random = lambda: 0.5  # type: ignore[method-assign]
    world.run_until(10.0)
    assert world.settled() == ""
    assert [event["kind"] for event in world.events if event["kind"] in ("roll_call", "removed")] == []
    assert len(world.views) == 1


@pytest.mark.parametrize("first_seed", range(0, 100, 20))
def test_random_faults(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + 20):
        simulate(seed)


def test_the_same_seed_is_the_same_run() -> None:
    assert simulate(3).log == simulate(3).log
