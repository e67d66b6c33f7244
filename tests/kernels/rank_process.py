"""Rank processes for the tests that kill them.

``python -m tests.kernels.rank_process`` imports torch once, forks a group of ranks for every scenario that it reads
(a line of JSON), and answers with how each ended and what it saw.

Every rank runs rounds of ``NUM_LAYERS`` layers and compares its tokens bit by bit with the oracle. When a round is
void it says so, waits for the next view (a file), adopts it and goes on.
"""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from kernels.compiled_group import CompiledGroup
from kernels.elastic_mode import ElasticMode
from kernels.epoch_state import VOID
from kernels.heap_layout import HeapLayout
from kernels.reference import ElasticGroup
from kernels.symmetric_memory.shm import ShmHeap, ShmProvider
from tests.kernels.local_group import DIGEST, GENEROUS_S, SHAPE, Placement, Tokens, expert_mlp, oracle, without

NUM_LAYERS = 3
NUM_ROUNDS_AFTER = 3
POINTS = (
    "before_header",
    "before_dispatch",
    "mid_dispatch",
    "between",
    "mid_combine",
    "after_combine",
    "before_barrier",
)


@dataclass
class Scenario:
    """Rank ``victim`` gets ``signal_number`` (0: nobody does) from itself, at ``point`` in round ``at_round``."""

    directory: str
    num_ranks: int
    deadline_s: float
    victim: int = 0
    signal_number: int = 0
    point: str = ""
    at_round: int = 2
    at_layer: int = 1
    num_rounds: int = 5
    num_layers: int = NUM_LAYERS
    num_rounds_after: int = NUM_ROUNDS_AFTER
    view_at_death: bool = False  # the monitor saw it die; otherwise the next view waits until all survivors are void
    # Per rank "triton", "compiled" or "reference"; the latter two in turn when none is named.
    kinds: list[str] = field(default_factory=list)
    elastic: str = ElasticMode.VIEWS.value
    limit_s: float = GENEROUS_S  # for all of it


@dataclass
class Report:
    """What one rank saw."""

    num_exact: int = 0
    num_wrong: int = 0
    void_reason: str = ""
    observed: list[int] = field(default_factory=list)
    masked: list[int] = field(default_factory=list)
    void_after_s: float = 0.0
    round_ms: list[float] = field(default_factory=list)
    error: str = ""


def await_file(path: Path) -> None:
    give_up = time.monotonic() + GENEROUS_S
    while not path.exists():
        if time.monotonic() > give_up:
            raise TimeoutError(f"{path} never came")
        time.sleep(0.002)


def suicide_points(group: ElasticGroup, scenario: Scenario) -> Callable[[str], None]:
    """Arms the victim: what to call at each of POINTS."""

    def die_at(point: str) -> None:
        if scenario.signal_number and group.rank == scenario.victim and point == scenario.point:
            os.kill(os.getpid(), scenario.signal_number)

    return die_at


class DyingRow:
    """Stands in for a word row of the last peer: dies when the payload and all other words are out."""

    def __init__(self, row: memoryview, die: Callable[[], None]) -> None:
        self.row, self.die = row, die

    def __getitem__(self, slot: int) -> int:
        return int(self.row[slot])

    def __setitem__(self, slot: int, word: int) -> None:
        self.die()
        self.row[slot] = word


def kind_of(rank: int) -> str:
    return "compiled" if rank % 2 else "reference"


def make_group(scenario: Scenario, layout: HeapLayout, heap: ShmHeap, rank: int) -> ElasticGroup:
    elastic, kind = ElasticMode(scenario.elastic), scenario.kinds[rank] if scenario.kinds else kind_of(rank)
    if kind in ("reference", "compiled"):
        make = CompiledGroup if kind == "compiled" else ElasticGroup
        return make(layout, heap, rank, deadline_s=scenario.deadline_s, elastic=elastic)
    from tests.kernels.interpreted_group import InterpretedGroup  # only where TRITON_INTERPRET is set

    return InterpretedGroup(layout, heap, rank, deadline_s=scenario.deadline_s, elastic=elastic)


def run_rank(scenario: Scenario, rank: int) -> Report:
    directory = Path(scenario.directory)
    layout = HeapLayout.build(SHAPE)
    provider = ShmProvider(directory)
    heap = provider.allocate(f"heap{rank}", layout.nbytes)
    layout.format(heap.bytes_U8)
    group = make_group(scenario, layout, heap, rank)
    (directory / f"made{rank}").touch()
    members = list(range(scenario.num_ranks))
    for peer in members:
        await_file(directory / f"made{peer}")
        if peer != rank:
            group.map_peer(peer, provider.map_peer(f"shm:{layout.nbytes}:{directory}/heap{peer}"))
    report = Report()
    group.adopt(1, members, DIGEST)
    run_rounds(group, scenario, members, report, suicide_points(group, scenario))
    report.masked = group.query_mask_buffer().tolist()
    if group.status == VOID:
        report.void_reason = group.void_reason.value if group.void_reason else ""
        report.observed = group.observation_mask().tolist()
        (directory / f"void{rank}").touch()
        await_file(directory / "view2")
        survivors = [member for member in members if member != scenario.victim]
        if rank in survivors:
            group.adopt(2, survivors, DIGEST)
            calm = replace(scenario, signal_number=0, num_rounds=scenario.num_rounds_after)
            run_rounds(group, calm, survivors, report, lambda point: None)
    return report


def run_rounds(
    group: ElasticGroup, scenario: Scenario, members: list[int], report: Report, die_at: Callable[[str], None]
) -> None:
    view = Path(scenario.directory, f"view{group.epoch + 1}")
    for number in range(scenario.num_rounds):
        began = time.monotonic()
        dying = number == scenario.at_round
        if dying:
            die_at("before_header")
        results = [group.allgather([number], stop=view.exists) is not None]
        for layer in range(scenario.num_layers):
            if group.status == VOID:
                break
            armed = die_at if dying and layer == scenario.at_layer else lambda point: None
            results.append(one_layer(group, members, 1000 * group.epoch + 10 * number + layer, armed, scenario.victim))
        if dying:
            die_at("before_barrier")
        if group.status != VOID:
            group.clean_buffer(scenario.deadline_s)
        if group.status == VOID:  # not committed: whatever was right or wrong in it
            report.void_after_s = time.monotonic() - began
            return
        report.num_exact += sum(results)
        report.num_wrong += len(results) - sum(results)
        report.round_ms.append((time.monotonic() - began) * 1e3)


def one_layer(group: ElasticGroup, members: list[int], seed: int, die_at: Callable[[str], None], victim: int) -> bool:
    """Whether the tokens are exact: those of the oracle, or, once the victim is masked, without its experts' part."""
    tokens = Tokens.random(seed + 100 * group.rank, (seed + group.rank) % (SHAPE.max_tokens + 1))
    placement = Placement.random(seed, members)
    rank_TK, local_TK = placement.route(tokens)
    last = group._windows[members[-1]]
    dispatch_row, combine_row = last.dispatch_word, last.combine_word
    last.dispatch_word = DyingRow(dispatch_row, lambda: die_at("mid_dispatch"))  # type: ignore[assignment]
    last.combine_word = DyingRow(combine_row, lambda: die_at("mid_combine"))  # type: ignore[assignment]
    try:
        die_at("before_dispatch")
        received = group.dispatch(tokens.x_TH, rank_TK, local_TK, tokens.weight_TK)
        if received is None:
            return False
        die_at("between")
        rows = expert_mlp(received.x_NH(), placement.logical[group.rank][received.local_expert_N])
        out = group.combine(rows, received)
        die_at("after_combine")
        left = without(tokens, placement, victim) if group.query_mask_buffer()[victim] else tokens
        return out is not None and torch.equal(out, oracle(left))
    finally:
        last.dispatch_word, last.combine_word = dispatch_row, combine_row


def fork_rank(scenario: Scenario, rank: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        report = run_rank(scenario, rank)
    except BaseException:
        report = Report(error=traceback.format_exc())
    Path(scenario.directory, f"report{rank}").write_text(json.dumps(asdict(report)))
    os._exit(0)


def run_scenario(scenario: Scenario) -> list[dict[str, Any]]:
    """Fork the ranks, give them the view without the victim once all survivors are void, reap them."""
    directory = Path(scenario.directory)
    pids = [fork_rank(scenario, rank) for rank in range(scenario.num_ranks)]
    give_up = time.monotonic() + scenario.limit_s
    ends: dict[int, int] = {}
    while len(ends) < len(pids) and time.monotonic() < give_up:
        for rank, pid in enumerate(pids):
            if rank not in ends:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    ends[rank] = os.waitstatus_to_exitcode(status)
        if (scenario.point == "before_header" or scenario.view_at_death) and scenario.victim in ends:
            (directory / "view2").touch()  # a wait for headers is patient: the view ends it
        void = [rank for rank in range(len(pids)) if (directory / f"void{rank}").exists()]
        if len(set(void) - {scenario.victim}) == len(pids) - 1 and not (directory / "view2").exists():
            (directory / "view2").touch()
            if scenario.signal_number == signal.SIGSTOP:
                os.kill(pids[scenario.victim], signal.SIGCONT)
        time.sleep(0.002)
    for rank, pid in enumerate(pids):
        if rank not in ends:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            ends[rank] = -999
    reports = []
    for rank in range(len(pids)):
        path = directory / f"report{rank}"
        reports.append({"exit": ends[rank], **(json.loads(path.read_text()) if path.exists() else {})})
    return reports


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(run_scenario(Scenario(**json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
