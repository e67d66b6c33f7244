"""Clusters shared by the tests of a file: starting one takes seconds, and each test leaves it whole."""

from collections.abc import Iterator
from pathlib import Path

import pytest

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
