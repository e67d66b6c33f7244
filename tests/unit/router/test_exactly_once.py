"""Through any sequence of faults that leaves one rank, every client gets the tokens of a fault-free run: each once, in
order, to the end; and nobody keeps anything for a request that is over. Prefill workers may all be gone."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.router.lossy_workers import whole_output
from tests.unit.router.lossy_world import World

# Longer than every deadline on the way: asks, refusals, a handoff that got lost.
_QUIET_S = 60.0

_STEPS = st.one_of(
    st.tuples(st.just("submit"), st.integers(1, 6)),
    st.tuples(st.just("leave"), st.integers(0, 99)),
    st.tuples(st.just("join"), st.just(0)),
    st.tuples(st.just("kill"), st.integers(0, 7)),
    st.tuples(st.just("kill unseen"), st.integers(0, 7)),
    st.tuples(st.just("mask"), st.integers(0, 7)),
    st.tuples(st.just("add worker"), st.just(0)),
    st.tuples(st.just("kill worker"), st.integers(0, 7)),
    st.tuples(st.just("forget"), st.integers(0, 7)),
    st.tuples(st.just("run"), st.integers(1, 40)),
)


def _take(world: World, step: tuple[str, int]) -> None:
    match step:
        case "submit", count:
            for _ in range(count):
                world.submit()
        case "leave", index:
            unfinished = [request for request, client in world.clients.items() if not client.finish]
            if unfinished:
                world.leave(unfinished[index % len(unfinished)])
        case "join", _ if len(world.members) < 8:
            world.join()
        case "kill", index if world.members:
            world.kill(index)
        case "kill unseen", index if world.members:
            world.kill(index, detected=False)
        case "mask", index if world.members:
            world.mask(index)
        case "add worker", _:
            world.add_worker()
        case "kill worker", index if world.workers:
            world.kill_worker(index)
        case "forget", index if world.members:
            world.forget(index)
        case "run", steps:
            world.run(steps * 0.02)
        case _:
            pass


def _end_faults(world: World, worker: bool = True) -> None:
    world.loss = world.doubling = 0.0
    world.max_delay_s = 0.02
    world.bury_zombies()
    _take(world, ("join", 0))
    if worker:
        world.add_worker()
    world.run(_QUIET_S, until_over=True)


def _check(world: World) -> None:
    for request, client in world.clients.items():
        expected, finish = whole_output(client.prompt, client.max_tokens)
        assert (client.received, client.finish) == (expected, finish), request
    assert world.is_over, "somebody keeps what is over"


@settings(max_examples=500, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    steps=st.lists(_STEPS, max_size=40),
    loss=st.sampled_from([0.0, 0.05, 0.3]),
    doubling=st.sampled_from([0.0, 0.3]),
    max_delay_s=st.sampled_from([0.02, 0.2, 1.0]),
    worker=st.booleans(),
)
def test_every_client_gets_every_token_once(
    seed: int, steps: list[tuple[str, int]], loss: float, doubling: float, max_delay_s: float, worker: bool
) -> None:
    world = World(seed, loss, doubling, max_delay_s)
    world.join()
    world.join()
    world.add_worker()
    for step in steps:
        _take(world, step)
    _end_faults(world, worker)
    _check(world)


def test_without_prefill_workers_ranks_compute_the_prompts() -> None:
    world = World(seed=3, loss=0.1)
    world.join()
    world.join()
    world.add_worker()
    for _ in range(6):
        world.submit()
    world.run(0.2)
    assert world.num_prompts_on_ranks == 0
    world.kill_worker(0)
    world.kill(0)
    for _ in range(6):
        world.submit()
    _end_faults(world, worker=False)
    assert world.num_prompts_on_ranks >= 6
    _check(world)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), rows=st.integers(1, 3))
def test_ranks_that_refuse_are_asked_again_until_there_is_room(seed: int, rows: int) -> None:
    world = World(seed)
    world.rows_per_rank = rows
    world.add_worker()
    for _ in range(12):
        world.submit()
    world.join()
    world.run(1.0)
    assert world.reasons["refused"] > 0
    _end_faults(world)
    _check(world)


def test_a_new_rank_takes_over_running_requests() -> None:
    world = World(seed=5)
    world.add_worker()
    world.join()
    for _ in range(9):
        world.submit()
    world.run(0.1)
    running = len(world.table)
    world.join()
    assert 1 <= world.reasons["moved"] <= running // 2
    _end_faults(world)
    _check(world)
    assert set(world.reasons) == {"moved"}


def test_without_faults_nothing_is_placed_twice() -> None:
    world = World(seed=1)
    world.join()
    world.join()
    world.add_worker()
    for _ in range(20):
        world.submit()
    world.run(10.0)
    _check(world)
    assert not world.reasons


def test_a_request_whose_rank_died_unseen_is_placed_again_by_its_silence() -> None:
    world = World(seed=2)
    world.join()
    world.join()
    world.add_worker()
    for _ in range(6):
        world.submit()
    world.run(0.1)
    assert any(not row.finish for row in world.members[0].rows.values())
    world.kill(0, detected=False)
    world.run(10.0)
    _check(world)
    assert set(world.reasons) == {"no answer"}
