"""Which copy of an expert serves a token, and how evenly that loads the ranks. Pure; numpy only.

Every choice gives the same tokens, bit for bit; only where they are computed differs, and so which rank a round waits
for. What a policy does to the load of the ranks is said here too (`rank_loads`), so that plans, the decision whether
they pay, and what is shown all speak of the policy in force.

Shapes: L mixture-of-experts layers, E logical experts, T tokens, K experts of one token, R members, N live copies.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from common.config import ReplicaPolicy
from common.placement import EMPTY, IntArray, PhysicalToLogical

FloatArray = npt.NDArray[np.float64]

# Columns of the replica table: a power of two, so that a hash is cut by a mask; large enough to split a load by 3 or 5
# within a few percent.
NUM_COLUMNS = 64


class ReplicaChoice:
    """Where the tokens of one rank go under one view: a local copy if there is one, else a live copy by hash.

    Built once per view, asked once per layer and round. Another ``policy`` may be given, and a rank to ``avoid`` where
    there is another live copy. Every choice gives the same tokens; only where they are computed differs.
    """

    def __init__(
        self,
        physical_to_logical: PhysicalToLogical,
        members: Sequence[int],
        num_logical_experts: int,
        own_rank: int,
        policy: ReplicaPolicy = ReplicaPolicy.LOCAL_FIRST,
        avoid: int | None = None,
    ) -> None:
        self._tables: list[tuple[IntArray, IntArray]] = []
        self._only: list[tuple[IntArray, IntArray] | None] = []  # by expert, in layers where no hash makes a difference
        for rows in physical_to_logical:
            copies = _Copies.live(rows, members, num_logical_experts).where(lambda copies: copies.rank_N != avoid)
            tables = _replica_table(_preferred(copies, sorted(members), own_rank, policy))
            self._tables.append(tables)
            rank_EC, local_EC = (table.reshape(-1, NUM_COLUMNS) for table in tables)
            is_one = (rank_EC == rank_EC[:, :1]).all() and (local_EC == local_EC[:, :1]).all()
            self._only.append((rank_EC[:, 0].copy(), local_EC[:, 0].copy()) if is_one else None)

    def tables(self, layer: int) -> tuple[IntArray, IntArray]:
        """What `choose` looks up: rank and local of the copy for (expert, column), flat [E * NUM_COLUMNS]."""
        return self._tables[layer]

    def choose(
        self, layer: int, logical_TK: npt.NDArray[np.integer], hash_T: npt.NDArray[np.integer]
    ) -> tuple[IntArray, IntArray]:
        """(rank_TK, local_TK), int64; -1 and -1 for an expert without live copy.

        ``hash_T`` spreads tokens over copies; its low six bits must be well mixed, positions or counters are.
        """
        if (only := self._only[layer]) is not None:
            return only[0].take(logical_TK), only[1].take(logical_TK)
        rank_table, local_table = self._tables[layer]
        index_TK = logical_TK * NUM_COLUMNS + (hash_T & (NUM_COLUMNS - 1))[:, None]
        return rank_table.take(index_TK), local_table.take(index_TK)


@dataclass(frozen=True, slots=True)
class _Copies:
    """Of one layer, by expert, then rank, then slot. ``num_E``: how many of each expert."""

    expert_N: IntArray
    rank_N: IntArray
    local_N: IntArray
    num_E: IntArray

    @classmethod
    def live(cls, rows: Sequence[Sequence[int]], members: Sequence[int], num_logical_experts: int) -> "_Copies":
        order = sorted(members)
        sizes = [len(rows[rank]) for rank in order]
        expert_N = np.fromiter(chain.from_iterable(rows[rank] for rank in order), np.int64, sum(sizes))
        rank_N = np.repeat(np.array(order, dtype=np.int64), sizes)
        local_N = np.concatenate([np.arange(size) for size in sizes]) if sizes else expert_N
        by_expert_N = np.argsort(expert_N, kind="stable")
        by_expert_N = by_expert_N[int((expert_N == EMPTY).sum()) :]
        return cls._of(expert_N[by_expert_N], rank_N[by_expert_N], local_N[by_expert_N], num_logical_experts)

    @classmethod
    def _of(cls, expert_N: IntArray, rank_N: IntArray, local_N: IntArray, num_logical_experts: int) -> "_Copies":
        return cls(expert_N, rank_N, local_N, np.bincount(expert_N, minlength=num_logical_experts))

    @property
    def first_E(self) -> IntArray:
        """Where the copies of an expert begin."""
        return np.cumsum(self.num_E) - self.num_E

    def only(self, kept_N: npt.NDArray[np.bool_] | IntArray) -> "_Copies":
        return self._of(self.expert_N[kept_N], self.rank_N[kept_N], self.local_N[kept_N], len(self.num_E))

    def where(self, wanted: "Callable[[_Copies], npt.NDArray[np.bool_]]") -> "_Copies":
        """Those wanted; of an expert that has no such copy, all."""
        wanted_N = np.broadcast_to(wanted(self), self.expert_N.shape)
        has_wanted_E = np.bincount(self.expert_N[wanted_N], minlength=len(self.num_E)) > 0
        return self.only(wanted_N | ~has_wanted_E[self.expert_N])


def _preferred(copies: _Copies, members: list[int], own_rank: int, policy: ReplicaPolicy) -> _Copies:
    match policy:
        case ReplicaPolicy.LOCAL_FIRST:
            return copies.where(lambda copies: copies.rank_N == own_rank)
        case ReplicaPolicy.HASH:
            return copies
        case ReplicaPolicy.REMOTE_FIRST:
            return copies.where(lambda copies: copies.rank_N != own_rank)
        case ReplicaPolicy.STATIC:
            place_E = bisect_left(members, own_rank) % np.maximum(copies.num_E, 1)
            return copies.only((copies.first_E + place_E)[copies.num_E > 0])
        case ReplicaPolicy.GATHER:
            return _gathered(copies)


def _gathered(copies: _Copies) -> _Copies:
    """One of each expert: experts with the fewest copies first, each at the rank that serves fewest so far."""
    num_served: Counter[int] = Counter()
    rank_N, first_E, num_E = copies.rank_N.tolist(), copies.first_E.tolist(), copies.num_E.tolist()
    kept = []
    for expert in sorted(range(len(num_E)), key=lambda expert: (num_E[expert], expert)):
        if num_E[expert]:
            places = range(first_E[expert], first_E[expert] + num_E[expert])
            kept.append(min(places, key=lambda place: (num_served[rank_N[place]], place)))
            num_served[rank_N[kept[-1]]] += 1
    return copies.only(np.array(sorted(kept), dtype=np.int64))


def _replica_table(copies: _Copies) -> tuple[IntArray, IntArray]:
    """Two flat tables [E * columns]: rank and local of the copy that serves (expert, column)."""
    place = np.full((len(copies.num_E), NUM_COLUMNS), len(copies.rank_N), dtype=np.int64)
    for num in set(copies.num_E.tolist()) - {0}:
        experts = np.flatnonzero(copies.num_E == num)
        # Shifted by the expert, so that one token's experts with equal holders do not all go to the same one.
        turn = (np.arange(num)[:, None] + np.arange(NUM_COLUMNS)) % num
        place[experts] = copies.first_E[experts, None] + turn[experts % num]
    flat = place.ravel()
    return np.append(copies.rank_N, -1).take(flat), np.append(copies.local_N, -1).take(flat)


def rank_loads(
    load_E: FloatArray,
    rows: Sequence[Sequence[int]],
    members: Sequence[int],
    policy: ReplicaPolicy = ReplicaPolicy.HASH,
) -> FloatArray:
    """[R]: the part of one layer's load that each member bears; loads of orphans count nowhere.

    Members are taken to send alike. Then hash, local-first and remote-first split an expert's load evenly over its
    copies: of c copies among n ranks each serves its own 1/n of the tokens and (n - c) / (c n) of the others', which
    is 1/c, and remote-first likewise. Static gives each copy whole senders, and gather everything to one.
    """
    copies = _Copies.live(rows, members, len(load_E))
    if policy is ReplicaPolicy.GATHER:
        copies = _gathered(copies)
    num_N, num_members = copies.num_E[copies.expert_N], len(members)
    part_N = 1.0 / num_N
    if policy is ReplicaPolicy.STATIC:
        turn_N = np.arange(len(num_N)) - copies.first_E[copies.expert_N]
        part_N = (num_members // num_N + (turn_N < num_members % num_N)) / num_members
    by_rank = np.bincount(copies.rank_N, load_E[copies.expert_N] * part_N, max(members, default=0) + 1)
    loads_R: FloatArray = by_rank[np.array(members, dtype=np.int64)].astype(np.float64)
    return loads_R


def balancedness(
    load_LE: FloatArray,
    physical_to_logical: PhysicalToLogical,
    members: Sequence[int],
    policy: ReplicaPolicy = ReplicaPolicy.HASH,
) -> float:
    """Of the loads that `rank_loads` says the members bear; 1.0 where there is none."""
    layers = zip(load_LE, physical_to_logical, strict=True)
    return evenness(np.array([rank_loads(load_E, rows, members, policy) for load_E, rows in layers]))


def evenness(load_LR: FloatArray) -> float:
    """Sum over layers of the mean rank load / sum over layers of the largest: 1.0 = even, 1 / R = worst."""
    if load_LR.size == 0 or not (largest := float(load_LR.max(axis=1).sum())):
        return 1.0
    return float(load_LR.mean(axis=1).sum()) / largest
