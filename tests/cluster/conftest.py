"""Clusters shared by the tests of a file: starting one takes seconds, and each test leaves it whole."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.provenance import provenance
from services.cli.chat_client import Stream
from tests.cluster import fault_runs
from tests.cluster.harness import Cluster


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four decode ranks and two prefill workers on the random checkpoint."""
    run_dir: Path = tmp_path_factory.mktemp("cluster") / "run"
    running = Cluster(run_dir, "--decode-ranks", "4", "--prefill-workers", "2")
    try:
        yield running.wait_ready()
    finally:
        running.stop()


@pytest.fixture(scope="module")
def expected(cluster: Cluster) -> list[Stream]:
    """The fault-free run."""
    return fault_runs.fault_free(cluster)


@pytest.fixture(scope="session", autouse=True)
def faults_table() -> Iterator[None]:
    """What the fault tests of this run have measured, where REGROW_FAULTS_TABLE names a file for it."""
    path = os.environ.get("REGROW_FAULTS_TABLE")
    origin = provenance() | {"command": os.environ.get("REGROW_FAULTS_COMMAND", "pytest")} if path else {}
    yield
    if path and fault_runs.ROWS:
        text = "\n".join(f"- {key.replace('_', ' ')}: {value}" for key, value in origin.items())
        fault_runs.write_table(Path(path), f"# Faults against real processes\n\n{text}\n")
