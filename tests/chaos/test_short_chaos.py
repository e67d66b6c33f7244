"""A short run of `tests.chaos.run` in every test run; `make chaos` runs it for minutes or hours."""

import asyncio
import itertools
from pathlib import Path

import pytest

from tests.chaos.run import CLUSTER_OPTIONS, CONFIG, new_tally, report, run_chaos
from tests.chaos.schedule import SIGNALS, UNDONE_BY, schedule
from tests.cluster.harness import Cluster


def test_a_seed_gives_one_schedule_and_seeds_differ() -> None:
    first, again, other = (list(itertools.islice(schedule(seed), 200)) for seed in (1, 1, 2))
    assert first == again != other
    faults = [fault for group in first for fault in group]
    assert {(fault.action, fault.kind) for fault in faults} >= {("kill", "decode"), ("stop", "monitor")}
    assert {fault.action for fault in faults} == {
        *SIGNALS,
        *UNDONE_BY,
        "drop_network",
        "corrupt_heap",
        "kill in a round",
    }
    assert {len(group) for group in first} == {1, 2}


# In its first dozen seconds: planner stopped, a path cut, a prefill worker killed, a rank drained, two killed, one of
# them in a round, and the monitor killed right behind it.
SEED = 359


@pytest.mark.timeout(300)
def test_a_dozen_seconds_of_faults_change_no_stream(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "run", *CLUSTER_OPTIONS, config=CONFIG)
    try:
        cluster.wait_ready()
        tally = new_tally(cluster)
        asyncio.run(run_chaos(cluster, SEED, 12.0, tally))
        story = "\n".join([report(SEED, tally), *tally.wrong, *tally.injector.witness.story()])
        assert tally.wrong == [], f"{story}\n{cluster.logs()}"
        assert tally.num_faults >= 5, f"hardly any fault happened\n{story}"
    finally:
        cluster.stop()
