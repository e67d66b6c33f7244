"""Which copy of an expert serves a token, and how evenly that loads the ranks. Pure; numpy only.

Every choice gives the same tokens, bit for bit; only where they are computed differs, and so which rank a round waits
for. What a policy does to the load of the ranks is said here too (`rank_loads`), so that plans, the decision whether
they pay, and what is shown all speak of the policy in force.

Shapes: L mixture-of-experts layers, E logical experts, T tokens, K experts of one token, R members, N live copies.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from common.config import ReplicaPolicy
from common.placement import EMPTY, IntArray, PhysicalToLogical

FloatArray = npt.NDArray[np.float64]

# Columns of the replica table: a power of two, so that a hash is cut by a mask; large enough to split a load by 3 or 5
# within a few percent.
_NUM_COLUMNS = 64


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
        order = sorted(members)
        self._tables = []
        for rows in physical_to_logical:
            places_E = [
                _preferred(places, order, own_rank, policy, avoid)
                for places in _places(rows, order, num_logical_experts)
            ]
            self._tables.append(_replica_table(_gathered(places_E) if policy is ReplicaPolicy.GATHER else places_E))

    def choose(
        self, layer: int, logical_TK: npt.NDArray[np.integer], hash_T: npt.NDArray[np.integer]
    ) -> tuple[IntArray, IntArray]:
        """(rank_TK, local_TK), int64; -1 and -1 for an expert without live copy.

        ``hash_T`` spreads tokens over copies; its low six bits must be well mixed, positions or counters are.
        """
        rank_table, local_table = self._tables[layer]
        index_TK = logical_TK * _NUM_COLUMNS + (hash_T & (_NUM_COLUMNS - 1))[:, None]
        return rank_table.take(index_TK), local_table.take(index_TK)


def _places(rows: Sequence[Sequence[int]], members: list[int], num_logical_experts: int) -> list[list[tuple[int, int]]]:
    """(rank, local) of the live copies of each expert."""
    copies: list[list[tuple[int, int]]] = [[] for _ in range(num_logical_experts)]
    for rank in members:
        for local, expert in enumerate(rows[rank]):
            if expert != EMPTY:
                copies[expert].append((rank, local))
    return copies


def _preferred(
    places: list[tuple[int, int]], members: list[int], own_rank: int, policy: ReplicaPolicy, avoid: int | None
) -> list[tuple[int, int]]:
    places = [place for place in places if place[0] != avoid] or places
    own = [place for place in places if place[0] == own_rank]
    match policy:
        case ReplicaPolicy.LOCAL_FIRST:
            return own[:1] or places
        case ReplicaPolicy.HASH | ReplicaPolicy.GATHER:
            return places
        case ReplicaPolicy.REMOTE_FIRST:
            return [place for place in places if place[0] != own_rank] or places
        case ReplicaPolicy.STATIC:
            return places and [places[bisect_left(members, own_rank) % len(places)]]


def _gathered(places_E: list[list[tuple[int, int]]]) -> list[list[tuple[int, int]]]:
    """One of each expert's places: experts with the fewest copies first, each to the rank that serves fewest so far."""
    num_served: Counter[int] = Counter()
    gathered: list[list[tuple[int, int]]] = [[] for _ in places_E]
    for expert in sorted(range(len(places_E)), key=lambda expert: (len(places_E[expert]), expert)):
        if places_E[expert]:
            place = min(places_E[expert], key=lambda place: (num_served[place[0]], place))
            num_served[place[0]] += 1
            gathered[expert] = [place]
    return gathered


def _replica_table(places_E: list[list[tuple[int, int]]]) -> tuple[IntArray, IntArray]:
    """Two flat tables [E * columns]: rank and local of the copy that serves (expert, column)."""
    table = np.full((len(places_E), _NUM_COLUMNS, 2), -1, dtype=np.int64)
    columns = np.arange(_NUM_COLUMNS)
    for expert, places in enumerate(places_E):
        if places:
            # Shifted by the expert, so that one token's experts with equal holders do not all go to the same one.
            table[expert] = np.array(places)[(columns + expert) % len(places)]
    return np.ascontiguousarray(table[:, :, 0]).ravel(), np.ascontiguousarray(table[:, :, 1]).ravel()


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
    order = sorted(members)
    held = [[expert for expert in rows[rank] if expert != EMPTY] for rank in members]
    expert_N = np.array([expert for experts in held for expert in experts], dtype=np.int64)
    member_N = np.repeat(np.arange(len(members)), [len(experts) for experts in held])
    if policy in (ReplicaPolicy.GATHER, ReplicaPolicy.STATIC):
        part_N = _uneven_parts(rows, order, len(load_E), policy, expert_N, np.array(members, dtype=np.int64)[member_N])
    else:
        part_N = 1.0 / np.maximum(np.bincount(expert_N, minlength=len(load_E)), 1)[expert_N]
    loads_R: FloatArray = np.bincount(member_N, load_E[expert_N] * part_N, len(members)).astype(np.float64)
    return loads_R


def _uneven_parts(
    rows: Sequence[Sequence[int]],
    order: list[int],
    num_logical_experts: int,
    policy: ReplicaPolicy,
    expert_N: IntArray,
    rank_N: IntArray,
) -> FloatArray:
    """Part of its expert's tokens that each copy serves."""
    places_E = _places(rows, order, num_logical_experts)
    senders_E = [_senders(places, len(order)) for places in places_E]
    if policy is ReplicaPolicy.GATHER:
        senders_E = [Counter(rank for rank, _ in places) for places in _gathered(places_E)]
    parts = [senders_E[e][r] / senders_E[e].total() for e, r in zip(expert_N.tolist(), rank_N.tolist(), strict=True)]
    return np.array(parts, dtype=np.float64)


def _senders(places: list[tuple[int, int]], num_members: int) -> Counter[int]:
    """By rank of a copy: how many members send it their tokens under the static policy."""
    return Counter(places[sender % len(places)][0] for sender in range(num_members)) if places else Counter()


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
