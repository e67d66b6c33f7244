"""Which expert lies in which slot. Pure; numpy only.

The map is ``physical_to_logical[layer][rank][local]``: a logical expert, or -1 for an empty expert slot. ``rank`` runs
over all max_ranks slots, members or not. Three rules hold for whatever this module returns:

* copies of one logical expert lie on distinct ranks, so a copy more is a lost rank more that can be borne;
* a repair moves orphans only, and only into slots that are empty or whose expert keeps another live copy;
* equal arguments give equal results, in every process.

Shapes: L mixture-of-experts layers, E logical experts.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from common.config import DecodeConfig

PhysicalToLogical = tuple[tuple[tuple[int, ...], ...], ...]
IntArray = npt.NDArray[np.int64]

EMPTY = -1
# Any two ranks may be lost before a repair has been made.
AUTOMATIC_COPIES = 3


def num_local_experts(decode: DecodeConfig, num_logical_experts: int) -> int:
    """Expert slots of one rank in each layer.

    ``num_redundant_experts`` counts copies beyond the first, over the whole group, as is usual in the field; -1 asks
    for three copies of each expert, or one on every rank where there are fewer ranks. Never fewer than one copy of each
    expert fits, and never more slots than experts, since a second copy on the same rank is of no use.
    """
    num_ranks = decode.num_ranks
    if decode.num_redundant_experts < 0:
        num_physical = num_logical_experts * min(AUTOMATIC_COPIES, num_ranks)
    else:
        num_physical = num_logical_experts + decode.num_redundant_experts
    return min(-(-num_physical // num_ranks), num_logical_experts)


def num_staging_experts(decode: DecodeConfig, num_logical_experts: int) -> int:
    """Experts, over all layers, that a rank can take in beside those in use: with as many as a layer has slots, any
    plan can be carried out layer by layer."""
    if decode.num_staging_experts > 0:
        return decode.num_staging_experts
    return num_local_experts(decode, num_logical_experts)


def initial_placement(
    num_layers: int, num_logical_experts: int, max_ranks: int, num_ranks: int, num_local: int
) -> PhysicalToLogical:
    """A placement that knows no loads: equal numbers of copies (or one apart), on distinct ranks.

    Copies of one expert follow each other and are dealt to the ranks in turn, hence to distinct ones. Each layer starts
    at another rank, so that a rank holds other experts in each layer, where there are fewer copies than ranks. Ranks
    beyond ``num_ranks`` get a run of experts each, further copies for the day when they join. Raises ValueError when
    ``num_ranks`` ranks have no room for all experts.

    >>> initial_placement(num_layers=1, num_logical_experts=4, max_ranks=3, num_ranks=2, num_local=3)
    (((0, 1, 2), (0, 1, 3), (0, 1, 2)),)
    """
    if num_ranks * num_local < num_logical_experts:
        raise ValueError(f"{num_ranks} ranks of {num_local} expert slots cannot hold {num_logical_experts} experts")
    if num_local > num_logical_experts:
        raise ValueError(f"{num_local} expert slots a rank are more than {num_logical_experts} experts")
    return tuple(
        _initial_layer(layer, num_logical_experts, max_ranks, num_ranks, num_local) for layer in range(num_layers)
    )


def _initial_layer(
    layer: int, num_logical_experts: int, max_ranks: int, num_ranks: int, num_local: int
) -> tuple[tuple[int, ...], ...]:
    num_copies, num_with_one_more = divmod(num_ranks * num_local, num_logical_experts)
    rows: list[list[int]] = [[] for _ in range(max_ranks)]
    position = layer
    for expert in range(num_logical_experts):
        has_one_more = (expert - layer) % num_logical_experts < num_with_one_more
        for _ in range(num_copies + has_one_more):
            rows[position % num_ranks].append(expert)
            position += 1
    for rank in range(num_ranks, max_ranks):
        first = (rank - num_ranks) * num_local + layer
        rows[rank] = [(first + local) % num_logical_experts for local in range(num_local)]
    return tuple(tuple(row) for row in rows)


@dataclass(frozen=True, slots=True)
class Move:
    """``logical_expert`` is to be loaded into this expert slot, in place of whatever it holds."""

    layer: int
    rank: int
    local: int
    logical_expert: int


@dataclass(frozen=True, slots=True)
class Repair:
    """The repaired map, what moved in it, and the (layer, logical expert) pairs that no slot could take."""

    physical_to_logical: PhysicalToLogical
    moved: tuple[Move, ...]
    orphans: tuple[tuple[int, int], ...]


def repair(physical_to_logical: PhysicalToLogical, members: Sequence[int], num_logical_experts: int) -> Repair:
    """Gives every orphan (an expert without a copy on any of ``members``) a slot, least harm first.

    In this order: empty slots, second copies on one rank, then copies of the expert that has most; among equals on the
    rank that was given the fewest orphans in this layer, so that no rank loads all of them. Rows of ranks that are no
    members stay: the next process in such a slot loads what stands there.
    """
    layers: list[tuple[tuple[int, ...], ...]] = []
    moved: list[Move] = []
    orphans: list[tuple[int, int]] = []
    everything = set(range(num_logical_experts))
    for layer, rows in enumerate(physical_to_logical):
        num_copies = Counter(chain.from_iterable([rows[rank] for rank in members]))
        missing = sorted(everything.difference(num_copies))
        moves, left = _repair_layer(layer, rows, members, num_copies, missing) if missing else ([], [])
        moved += moves
        orphans += [(layer, expert) for expert in left]
        layers.append(_with_moves(rows, moves))
    return Repair(tuple(layers), tuple(moved), tuple(orphans))


def _repair_layer(
    layer: int,
    rows: tuple[tuple[int, ...], ...],
    members: Sequence[int],
    num_copies: Counter[int],
    missing: list[int],
) -> tuple[list[Move], list[int]]:
    # The only copy of an expert stays where it is, also when others have been placed: it is no candidate ever.
    left = {expert: count for expert, count in num_copies.items() if count > 1 or expert == EMPTY}
    spare = [(rank, local, expert) for rank in members for local, expert in enumerate(rows[rank]) if expert in left]
    is_plain = EMPTY not in left and len({(rank, expert) for rank, _, expert in spare}) == len(spare)
    num_here = {} if is_plain else Counter((rank, expert) for rank, _, expert in spare)
    num_moved = dict.fromkeys(members, 0)

    def harm(rank: int, local: int) -> tuple[int, int, int, int]:
        expert = rows[rank][local]
        first = -left[expert]
        if expert == EMPTY:
            first = -len(rows) - 2
        elif not is_plain and num_here[rank, expert] > 1:
            first = -len(rows) - 1
        return (first, num_moved[rank], rank, local)

    if is_plain:
        least = _least_copies(list(left.values()), len(missing))
        candidates = [(-left[expert], 0, rank, local) for rank, local, expert in spare if left[expert] >= least]
    else:
        candidates = [harm(rank, local) for rank, local, _ in spare]
    heapq.heapify(candidates)
    moves: list[Move] = []
    for number, orphan in enumerate(missing):
        slot = _least_harmful(candidates, harm)
        if slot is None:
            return moves, missing[number:]
        rank, local = slot
        left[rows[rank][local]] -= 1
        if not is_plain:
            num_here[rank, rows[rank][local]] -= 1
        num_moved[rank] += 1
        moves.append(Move(layer, rank, local, orphan))
    return moves, []


def _least_copies(num_copies: list[int], num_wanted: int) -> int:
    """Experts with fewer copies are not asked for any of ``num_wanted`` slots: one with n copies gives up n - k before
    one with k does."""
    num_given = 0
    for least in range(max(num_copies, default=2), 2, -1):
        num_given += sum(map(least.__le__, num_copies))
        if num_given >= num_wanted:
            return least
    return 2


def _least_harmful(
    candidates: list[tuple[int, int, int, int]], harm: Callable[[int, int], tuple[int, int, int, int]]
) -> tuple[int, int] | None:
    """Pops the best slot. Harm only grows while orphans are placed, so an outdated entry is put back as it is now."""
    while candidates:
        entry = heapq.heappop(candidates)
        rank, local = entry[2:]
        now = harm(rank, local)
        if now != entry:
            heapq.heappush(candidates, now)
        elif entry[0] == -1:
            return None  # every slot left holds the only live copy of its expert
        else:
            return rank, local
    return None


def _with_moves(rows: tuple[tuple[int, ...], ...], moves: list[Move]) -> tuple[tuple[int, ...], ...]:
    if not moves:
        return rows
    changed = {move.rank: list(rows[move.rank]) for move in moves}
    for move in moves:
        changed[move.rank][move.local] = move.logical_expert
    after = list(rows)
    for rank, row in changed.items():
        after[rank] = tuple(row)
    return tuple(after)
