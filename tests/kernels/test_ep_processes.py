"""Real processes over shared memory; one is killed or stopped at each kind of point. What survivors commit is exact."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.rank_process import NUM_LAYERS, NUM_ROUNDS_AFTER, POINTS, Scenario, kind_of

Reports = list[dict[str, Any]]
Run = Callable[[Scenario], Reports]
DEADLINE_S = 1.5  # who is healthy must not need so long on a busy machine


@pytest.fixture(scope="module")
def zygote() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-m", "tests.kernels.rank_process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 0


@pytest.fixture
def run(zygote: subprocess.Popen[str], heap_dir: Path) -> Iterator[Run]:
    def ask(scenario: Scenario) -> Reports:
        assert zygote.stdin is not None
        assert zygote.stdout is not None
        print(json.dumps(asdict(scenario)), file=zygote.stdin, flush=True)
        reports: Reports = json.loads(zygote.stdout.readline())
        for report in reports:
            assert not report.get("error"), report["error"]
        return reports

    yield ask
    for path in heap_dir.iterdir():
        path.unlink()


def test_four_processes_exchange_exact_tokens(run: Run, heap_dir: Path) -> None:
    reports = run(Scenario(str(heap_dir), 4, 20.0, num_rounds=20))
    for report in reports:
        assert (report["exit"], report["num_wrong"], report["void_reason"]) == (0, 0, "")
        assert report["num_exact"] == 20 * (1 + NUM_LAYERS)


@pytest.mark.parametrize(
    ("point", "kind"),
    [*((point, "compiled") for point in POINTS), ("mid_dispatch", "reference"), ("mid_combine", "reference")],
)
def test_sigkill_voids_one_round_and_nothing_else(run: Run, heap_dir: Path, point: str, kind: str) -> None:
    victim = 1 if kind == "compiled" else 2
    assert kind_of(victim) == kind
    reports = run(Scenario(str(heap_dir), 4, DEADLINE_S, victim, signal.SIGKILL, point))
    assert reports[victim] == {"exit": -signal.SIGKILL}
    for report in reports:
        if report is reports[victim]:
            continue
        assert (report["exit"], report["num_wrong"]) == (0, 0)
        # Two whole rounds before; whether the third was whole depends on the words that were out.
        assert report["num_exact"] >= (2 + NUM_ROUNDS_AFTER) * (1 + NUM_LAYERS)
        assert report["void_reason"] in ("deadline", "peer_poison", "stopped")
        assert (report["void_reason"] == "stopped") <= (point == "before_header")
        accused = [int(rank == victim and report["void_reason"] == "deadline") for rank in range(4)]
        assert report["observed"] == accused
        # One deadline in all, however many operations were left.
        assert report["void_after_s"] < 2 * DEADLINE_S


def test_a_stopped_rank_wakes_up_removed_and_harms_nobody(run: Run, heap_dir: Path) -> None:
    """SIGSTOP in the middle of a combine, SIGCONT when the others have the next view: it finds itself poisoned."""
    reports = run(Scenario(str(heap_dir), 4, DEADLINE_S, 1, signal.SIGSTOP, "mid_combine"))
    for rank, report in enumerate(reports):
        assert (report["exit"], report["num_wrong"]) == (0, 0)
        if rank == 1:
            assert (report["void_reason"], report["observed"]) == ("peer_poison", [0, 0, 0, 0])
        else:
            assert report["num_exact"] >= (2 + NUM_ROUNDS_AFTER) * (1 + NUM_LAYERS)
            assert report["observed"] in ([0, 1, 0, 0], [0, 0, 0, 0])
