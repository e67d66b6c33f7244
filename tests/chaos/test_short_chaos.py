"""A short run of `tests.chaos.run` in every test run; `make chaos` runs it for minutes or hours."""

import asyncio
import itertools
from pathlib import Path

import pytest

from tests.chaos.run import NUM_RANKS, report, run_chaos
from tests.chaos.schedule import schedule
from tests.cluster.harness import Cluster


def test_a_seed_gives_one_schedule_and_seeds_differ() -> None:
    first, again, other = (list(itertools.islice(schedule(seed), 200)) for seed in (1, 1, 2))
    assert first == again != other
    assert {(fault.action, fault.kind) for fault in first} >= {("kill", "decode"), ("stop", "monitor")}


@pytest.mark.timeout(300)
def test_twenty_seconds_of_faults_change_no_stream(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "run", "--decode-ranks", str(NUM_RANKS), "--prefill-workers", "2")
    try:
        cluster.wait_ready()
        tally = asyncio.run(run_chaos(cluster, seed=1, seconds=20.0))
        assert tally.wrong == [], f"{report(1, tally)}\n{cluster.logs()}"
        assert sum(tally.faults.values()) >= 3, "hardly any fault happened"
    finally:
        cluster.stop()
