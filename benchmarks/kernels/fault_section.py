"""Kills and rejoins under a replaying graph. Every cycle asserts who is accused and what it cost."""

import statistics
import time
from typing import Any

from benchmarks.kernels.bench_group import LARGE, BenchGroup, show
from benchmarks.kernels.gate import POINTS
from benchmarks.kernels.rank_pool import RankProcess, call_all

NUM_CYCLES = 20
NUM_TOKENS = 32
KILL_DEADLINE_S = 0.3
SHARED_KILL_DEADLINE_S = 2.0  # of ranks that share a GPU: they take turns, in milliseconds
SLACK_MS = 60.0
AT_RANDOM = "at random"
VARIANTS = ["views", "alone"]  # made together, at the start: NVSHMEM can allocate nothing more when one has died


def require(holds: bool, what: str) -> None:
    if not holds:
        raise RuntimeError(f"not so: {what}")


def run_faults(group: BenchGroup, num_cycles: int = NUM_CYCLES) -> None:
    victim = group.num_ranks - 1
    shares = group.num_devices < group.num_ranks
    deadline_s = SHARED_KILL_DEADLINE_S if shares else KILL_DEADLINE_S
    standbys = [group.spawn(victim) for _ in range(num_cycles + 1)]
    for standby in standbys:
        standby.start("open_provider", **group.memory("", victim))
    group.form(LARGE, VARIANTS)
    call_all(group.ranks, "prepare_layers", variant="views", num_tokens=NUM_TOKENS, deadline_s=deadline_s)
    call_all(group.ranks, "replay_layers", number=20)
    normal = call_all(group.ranks, "replay_layers", number=100)
    show("32 layers", provider=group.provider, replay_ms=[round(ms, 3) for ms in normal], deadline_s=deadline_s)
    for standby in standbys:
        standby.finish()
    cycles = [one_cycle(group, cycle, standby, deadline_s) for cycle, standby in enumerate(standbys[:-1])]
    memory = [cycle["memory_mib"] for cycle in cycles]
    together = [cycle["together_ms"] for cycle in cycles]
    first, last = statistics.median(together[:5]), statistics.median(together[-5:])
    require(max(memory[1:]) <= memory[0] + 2, f"memory does not grow: {memory} MiB")
    require(shares or last <= 1.1 * first, f"replays do not get slower: {together} ms")
    void = [survivor["void_replay_ms"] for cycle in cycles for survivor in cycle["survivors"]]
    show(
        "kill and rejoin",
        provider=group.provider,
        cycles=num_cycles,
        only_the_dead_accused=True,
        void_replay_ms=[min(void), max(void)],
        memory_mib=[min(memory), max(memory)],
        together_ms=[round(first, 3), round(last, 3)],
    )
    call_all(group.ranks, "set_deadline", deadline_s=5.0)
    poisoned = group.ranks[0].call("poisoned_by_host", after_s=0.2)
    require(not any(poisoned["observed"]) and poisoned["took_ms"] < 1000, f"poison ends the graph: {poisoned}")
    show("poison of the own host after 200 ms, deadline 5 s", **poisoned)
    run_alone(group, deadline_s)
    standbys[-1].kill()


def one_cycle(group: BenchGroup, cycle: int, standby: RankProcess, deadline_s: float) -> dict[str, Any]:
    """SIGKILL at a point; the survivors leave the graph together and go on alone; the standby joins; all go on."""
    began, victim = time.monotonic(), group.num_ranks - 1
    everyone, survivors = list(range(group.num_ranks)), list(range(group.num_ranks - 1))
    point = [AT_RANDOM, *POINTS][cycle % (1 + len(POINTS))]
    found = kill_at(group, point, cycle)
    for report in found:
        accused = [int(report["reason"] == "deadline" and rank == victim) for rank in everyone]
        require(report["observed"] == accused, f"cycle {cycle}, {point}: only the dead rank is accused: {report}")
        took_ms = report["void_replay_ms"]
        require(took_ms < deadline_s * 1e3 * 1.1 + SLACK_MS, f"cycle {cycle}, {point}: one deadline in all: {report}")
        if report["reason"] == "deadline":
            waited_ms = report["waited_ms"]
            require(max(waited_ms[:victim]) < waited_ms[victim] / 2, f"the wait is the dead rank's: {report}")
    require(any(report["reason"] == "deadline" for report in found), f"somebody accuses: {found}")
    group.enter(survivors)
    for rank in survivors:
        group.ranks[rank].call("reroute", members=survivors)
    alone = call_all([group.ranks[rank] for rank in survivors], "replay_layers", number=30)
    group.replace(victim, standby, LARGE, VARIANTS)
    standby.call("prepare_layers", variant="views", num_tokens=NUM_TOKENS, deadline_s=deadline_s)
    standby.call("announce", epoch=group.epoch + 1, members=survivors)
    seen = [group.ranks[rank].call("sees_announcement", epoch=group.epoch + 1, rank=victim) for rank in survivors]
    require(all(seen), "the newcomer's first header is there before it is a member")
    group.enter(everyone)
    call_all(group.ranks, "reroute", members=everyone)
    together = call_all(group.ranks, "replay_layers", number=60)
    facts = {
        "survivors": found,
        "alone_ms": round(max(alone), 3),
        "together_ms": round(max(together), 3),
        "memory_mib": group.ranks[0].call("memory_used_mib"),
    }
    if cycle < 1 + len(POINTS) or cycle == NUM_CYCLES - 1:
        show("SIGKILL", cycle=cycle, point=point, **facts, cycle_s=round(time.monotonic() - began, 2))
    return facts


def kill_at(group: BenchGroup, point: str, cycle: int) -> list[dict[str, Any]]:
    """What the survivors report."""
    survivors, victim = group.ranks[:-1], group.ranks[-1]
    for process in survivors:
        process.start("replay_until_void", limit_s=20.0)
    if point == AT_RANDOM:
        victim.start("replay_until_void", limit_s=20.0)
        time.sleep(0.05 + 0.007 * cycle)
    else:
        victim.call("replay_to_point", point=point, after=20 + cycle)
    victim.kill()
    return [process.finish() for process in survivors]


def run_alone(group: BenchGroup, deadline_s: float) -> None:
    """Without views: the survivor masks the dead rank in mid-graph and goes on."""
    call_all(group.ranks, "prepare_layers", variant="alone", num_tokens=NUM_TOKENS, deadline_s=deadline_s)
    call_all(group.ranks, "replay_layers", number=20)
    survivors, victim = group.ranks[:-1], group.ranks[-1]
    for process in survivors:
        process.start("replay_until_masked", limit_s=20.0, number_after=30)
    victim.call("replay_to_point", point="between", after=20)
    victim.kill()
    for process in survivors:
        report = process.finish()
        wanted = [int(rank == group.num_ranks - 1) for rank in range(group.num_ranks)]
        require(report["masked"] == wanted and report["is_exact"] is not False, f"goes on alone: {report}")
        show("stand-alone", provider=group.provider, **report)
