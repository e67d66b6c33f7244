"""Groups of Triton ranks (interpreted) and reference ranks in real processes: what survivors commit is exact."""

import signal
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from kernels.elastic_mode import ElasticMode
from tests.kernels.line_process import LineProcess, interpreted
from tests.kernels.rank_process import Scenario

# Interpreted operations take tenths of a second, seconds on a busy machine: few tests rest on a real deadline.
DEADLINE_S = 6.0
ALONE_DEADLINE_S = 12.0  # a rank alone would mask for good who is merely slow
LIMIT_S = 90.0
VICTIM = 1
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


def small(directory: Path, kinds: list[str], deadline_s: float = 30.0, **fault: Any) -> Scenario:
    """The fault happens in the only layer of the first of two rounds; one round after it in the next view."""
    return Scenario(
        str(directory),
        len(kinds),
        deadline_s,
        at_round=0,
        at_layer=0,
        num_rounds=2,
        num_layers=1,
        num_rounds_after=1,
        kinds=kinds,
        limit_s=LIMIT_S,
        **fault,
    )


def test_exchange_is_exact(zygote: LineProcess, heap_dir: Path) -> None:
    scenario = small(heap_dir, [TRITON, REFERENCE, TRITON])
    scenario.num_layers = 2
    for report in run(zygote, scenario):
        assert (report["exit"], report["num_wrong"], report["void_reason"]) == (0, 0, "")
        assert report["num_exact"] == 2 * (1 + 2)


@pytest.mark.parametrize(
    ("kinds", "point"),
    [
        ([TRITON, TRITON], "before_dispatch"),
        ([TRITON, TRITON, REFERENCE], "between"),
        ([TRITON, REFERENCE, TRITON], "mid_combine"),
        ([REFERENCE, TRITON, TRITON], "before_barrier"),
    ],
)
def test_sigkill_voids_one_round_and_nothing_else(
    zygote: LineProcess, heap_dir: Path, kinds: list[str], point: str
) -> None:
    """The view without the victim comes when its death is seen; each host ends its own waits with it.

    mid_combine is the cascade: the victim's word is out to the first rank, which goes on and waits for the third,
    which waits for the victim.
    """
    fault: dict[str, Any] = {"victim": VICTIM, "signal_number": signal.SIGKILL, "point": point}
    reports = run(zygote, small(heap_dir, kinds, view_at_death=True, **fault))
    assert reports[VICTIM] == {"exit": -signal.SIGKILL}
    for report in survivors(reports):
        assert report["num_exact"] >= 2, "the round after it"
        assert report["void_reason"] in ("host_poison", "peer_poison")
        assert report["observed"] == [0, 0, 0, 0]


def test_only_the_dead_rank_is_accused_at_the_deadline(zygote: LineProcess, heap_dir: Path) -> None:
    fault: dict[str, Any] = {"victim": VICTIM, "signal_number": signal.SIGKILL, "point": "between"}
    reports = run(zygote, small(heap_dir, [TRITON, REFERENCE, TRITON], DEADLINE_S, **fault))
    for report in survivors(reports):
        assert report["num_exact"] >= 2
        accused = [int(report["void_reason"] == "deadline" and rank == VICTIM) for rank in range(4)]
        assert report["void_reason"] in ("deadline", "peer_poison") and report["observed"] == accused
        assert report["void_after_s"] < 2 * DEADLINE_S, "one deadline in all"


def test_without_a_monitor_survivors_mask_the_dead_and_nobody_else(zygote: LineProcess, heap_dir: Path) -> None:
    """The cascade: the victim's word is out to the first rank, which goes on and waits for the third too."""
    fault: dict[str, Any] = {"victim": VICTIM, "signal_number": signal.SIGKILL, "point": "mid_combine"}
    kinds = [TRITON, REFERENCE, TRITON]
    reports = run(zygote, small(heap_dir, kinds, ALONE_DEADLINE_S, elastic=ElasticMode.ALONE.value, **fault))
    for report in survivors(reports):
        assert (report["void_reason"], report["masked"]) == ("", [0, 1, 0, 1])
        assert report["num_exact"] == 2 * (1 + 1), "every round commits"


def test_the_host_ends_a_patient_wait(zygote: LineProcess, heap_dir: Path) -> None:
    """Killed before its header: nobody has a deadline there, the next view ends the wait by poison of the own host."""
    fault: dict[str, Any] = {"victim": VICTIM, "signal_number": signal.SIGKILL, "point": "before_header"}
    for report in survivors(run(zygote, small(heap_dir, [TRITON, REFERENCE], **fault))):
        assert (report["num_exact"], report["void_reason"], report["observed"]) == (2, "host_poison", [0, 0, 0, 0])


def test_a_stopped_rank_wakes_up_removed_and_harms_nobody(zygote: LineProcess, heap_dir: Path) -> None:
    """Its late writes go to the heap of a rank that is in the next view."""
    fault: dict[str, Any] = {"victim": VICTIM, "signal_number": signal.SIGSTOP, "point": "between"}
    reports = run(zygote, small(heap_dir, [TRITON, TRITON], DEADLINE_S, **fault))
    zombie = reports[VICTIM]
    assert (zombie["exit"], zombie["num_wrong"]) == (0, 0)
    assert zombie["void_reason"] in ("peer_poison", "host_poison")
    assert all(report["num_exact"] >= 2 for report in survivors(reports))


def survivors(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    alive = [report for rank, report in enumerate(reports) if rank != VICTIM]
    for report in alive:
        assert (report["exit"], report["num_wrong"]) == (0, 0)
    return alive
