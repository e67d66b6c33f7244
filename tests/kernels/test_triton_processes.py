"""Groups of Triton ranks (interpreted) and reference ranks in real processes: what survivors commit is exact."""

import signal
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.line_process import LineProcess, interpreted
from tests.kernels.rank_process import Scenario

# Interpreted operations take tenths of a second, more on a busy machine.
DEADLINE_S = 3.0
TRITON, REFERENCE = "triton", "reference"


@pytest.fixture(scope="module")
def zygote() -> Iterator[LineProcess]:
    with interpreted("tests.kernels.rank_process") as process:
        yield process


def run(zygote: LineProcess, scenario: Scenario) -> list[dict[str, Any]]:
    reports: list[dict[str, Any]] = zygote.ask(asdict(scenario))
    for path in Path(scenario.directory).iterdir():
        path.unlink()
    for report in reports:
        assert not report.get("error"), report["error"]
    return reports


def small(directory: Path, kinds: list[str], deadline_s: float = DEADLINE_S, **fault: Any) -> Scenario:
    """One round of one layer in which the fault happens, one round after it."""
    return Scenario(
        str(directory),
        len(kinds),
        deadline_s,
        at_round=0,
        at_layer=0,
        num_rounds=1,
        num_layers=1,
        num_rounds_after=1,
        kinds=kinds,
        **fault,
    )


@pytest.mark.parametrize("kinds", [[TRITON, REFERENCE, TRITON], [TRITON, TRITON]], ids="-".join)
def test_exchange_is_exact(zygote: LineProcess, heap_dir: Path, kinds: list[str]) -> None:
    scenario = small(heap_dir, kinds, 20.0)
    scenario.num_rounds, scenario.num_layers = 2, 3
    for report in run(zygote, scenario):
        assert (report["exit"], report["num_wrong"], report["void_reason"]) == (0, 0, "")
        assert report["num_exact"] == 2 * (1 + 3)


@pytest.mark.parametrize(
    ("kinds", "point"),
    [
        ([TRITON, TRITON, REFERENCE], "before_dispatch"),
        ([TRITON, TRITON, TRITON], "between"),
        ([TRITON, REFERENCE, TRITON], "mid_combine"),
    ],
)
def test_sigkill_voids_one_round_and_nothing_else(
    zygote: LineProcess, heap_dir: Path, kinds: list[str], point: str
) -> None:
    victim = 1
    reports = run(zygote, small(heap_dir, kinds, victim=victim, signal_number=signal.SIGKILL, point=point))
    assert reports[victim] == {"exit": -signal.SIGKILL}
    for report in (reports[0], reports[2]):
        assert (report["exit"], report["num_wrong"]) == (0, 0)
        assert report["num_exact"] >= 2, "the round after it"
        if report["void_reason"]:
            assert report["void_reason"] in ("deadline", "peer_poison")
            assert report["observed"] == ([0, 1, 0, 0] if report["void_reason"] == "deadline" else [0, 0, 0, 0])
            assert report["void_after_s"] < 3 * DEADLINE_S, "one deadline in all"
    assert any(report["void_reason"] for report in reports if "void_reason" in report)


def test_the_host_ends_a_patient_wait(zygote: LineProcess, heap_dir: Path) -> None:
    """Killed before its header: nobody has a deadline there, the next view ends the wait by poison of the own host."""
    fault: dict[str, Any] = {"victim": 1, "signal_number": signal.SIGKILL, "point": "before_header"}
    reports = run(zygote, small(heap_dir, [TRITON, REFERENCE, TRITON], **fault))
    for report in (reports[0], reports[2]):
        assert (report["exit"], report["num_wrong"]) == (0, 0)
        assert report["num_exact"] == 2
        assert report["void_reason"] in ("host_poison", "peer_poison")
        assert report["observed"] == [0, 0, 0, 0]


def test_a_stopped_rank_wakes_up_removed_and_harms_nobody(zygote: LineProcess, heap_dir: Path) -> None:
    fault: dict[str, Any] = {"victim": 1, "signal_number": signal.SIGSTOP, "point": "between"}
    reports = run(zygote, small(heap_dir, [TRITON, TRITON, REFERENCE], **fault))
    assert (reports[1]["exit"], reports[1]["num_wrong"], reports[1]["void_reason"]) == (0, 0, "peer_poison")
    for report in (reports[0], reports[2]):
        assert (report["exit"], report["num_wrong"]) == (0, 0)
        assert report["num_exact"] >= 2
