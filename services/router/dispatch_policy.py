"""Which decode rank and which prefill worker a request goes to, and which running ones move to a new rank.

Load is what this router has in flight itself, the moment it sends it; what ranks report comes later and is only ever
a floor under it (other routers' requests). Ties go to the rank with more free KV blocks, then to the lower number, so
equal inputs give equal answers.
"""

from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass

from common.ids import ProcessId, Rank, RequestId
from common.messages import Member

# Reports come with tokens: an idle rank sends none, and its last one must not count for ever.
REPORT_TTL_S = 1.0


@dataclass(slots=True)
class RankLoad:
    """One decode rank as this router sees it. Blocks are KV blocks."""

    member: Member
    num_blocks: int
    num_in_flight: int = 0
    num_reserved_blocks: int = 0  # that requests in flight are admitted with
    reported_running: int = 0
    reported_free_blocks: int = 0
    reported_at: float = float("-inf")

    def load(self, now: float) -> int:
        return max(self.num_in_flight, self.reported_running if self._is_fresh(now) else 0)

    def num_free_blocks(self, now: float) -> int:
        free = self.num_blocks - self.num_reserved_blocks
        return min(free, self.reported_free_blocks) if self._is_fresh(now) else free

    def _is_fresh(self, now: float) -> bool:
        return now - self.reported_at <= REPORT_TTL_S


def choose_rank(ranks: Collection[RankLoad], num_blocks: int, avoid: Set[ProcessId], now: float) -> RankLoad | None:
    """The least loaded rank with room for ``num_blocks``; one in ``avoid`` or without room only if there is no other.

    A rank that looks full is still chosen before nothing: the rank itself decides, and refuses.
    """

    def order(rank: RankLoad) -> tuple[bool, bool, int, int, Rank]:
        free = rank.num_free_blocks(now)
        return rank.member.process in avoid, free < num_blocks, rank.load(now), -free, rank.member.rank

    return min(ranks, key=order, default=None)


def choose_prefill(
    num_pending_tokens: Mapping[ProcessId, int], num_known_tokens: Mapping[ProcessId, int], avoid: Set[ProcessId]
) -> ProcessId | None:
    """The prefill worker that is done with this prompt first: with the fewest tokens still to compute, those of the
    prompt included that it has not in its cache already."""

    def order(worker: ProcessId) -> tuple[bool, int, ProcessId]:
        return worker in avoid, num_pending_tokens[worker] - num_known_tokens.get(worker, 0), worker

    return min(num_pending_tokens, key=order, default=None)


def plan_moves(
    running: Mapping[Rank, Sequence[tuple[int, RequestId]]], added: Set[Rank], difference: int
) -> list[tuple[RequestId, Rank]]:
    """Requests to move to the ``added`` ranks, while the busiest other rank has more than ``difference`` more.

    ``running`` lists (cost, request) by rank, cost being the tokens a move computes again: the cheapest go first.
    With loads {0: 5, 1: 5}, rank 2 added and a difference of 2, rank 2 gets two: the loads end as 4, 4, 2.
    """
    loads = {rank: len(requests) for rank, requests in running.items()}
    cheapest = {rank: sorted(requests, reverse=True) for rank, requests in running.items() if rank not in added}
    moves: list[tuple[RequestId, Rank]] = []
    if not cheapest or not added:
        return moves
    while True:
        source = max(cheapest, key=lambda rank: (loads[rank], -rank))
        target = min(added, key=lambda rank: (loads.get(rank, 0), rank))
        if not cheapest[source] or loads[source] - loads.get(target, 0) <= max(difference, 1):
            return moves
        moves.append((cheapest[source].pop()[1], target))
        loads[source] -= 1
        loads[target] = loads.get(target, 0) + 1
