"""From the placement in force towards a wished one, in steps that fit into the memory for experts on their way in.

Every step is a placement of its own that can be served: no expert loses its last live copy. Shapes of a placement as in
`common.placement`.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import chain

from common.placement import EMPTY, Move, PhysicalToLogical

Rows = tuple[tuple[int, ...], ...]


def moves_to(present: PhysicalToLogical, wished: PhysicalToLogical, ranks: Sequence[int]) -> list[Move]:
    """What ``ranks`` must load to get from one placement to the other. A rank that only changes the slots of what it
    holds loads nothing."""
    return [
        Move(layer, rank, local, expert)
        for layer, (before, after) in enumerate(zip(present, wished, strict=True))
        for rank in ranks
        for local, expert in enumerate(after[rank])
        if expert != EMPTY and expert not in before[rank]
    ]


def next_step(
    present: PhysicalToLogical, wished: PhysicalToLogical, members: Sequence[int], num_staging: int
) -> PhysicalToLogical | None:
    """The placement to go to next: ``wished``, or as many of its changes as ``members`` have memory for, each rank for
    ``num_staging`` experts. None when nothing is left to do, or nothing can be done.

    Layers are taken whole while they fit, and then change by change, as far as each leaves a live copy of what it
    replaces. With ``num_staging`` not below the slots of a layer there is always a next step.
    """
    free = dict.fromkeys(members, num_staging)
    layers: list[Rows] = []
    left_over: list[int] = []
    for layer, (before, after) in enumerate(zip(present, wished, strict=True)):
        needed = Counter(move.rank for move in moves_to((before,), (after,), members))
        if all(count <= free[rank] for rank, count in needed.items()):
            free = {rank: room - needed[rank] for rank, room in free.items()}
            layers.append(after)
        else:
            left_over.append(layer)
            layers.append(before)
    for layer in left_over:
        layers[layer] = _partly(layers[layer], wished[layer], members, free)
    return None if tuple(layers) == present else tuple(layers)


def _partly(before: Rows, after: Rows, members: Sequence[int], free: dict[int, int]) -> Rows:
    rows = [list(row) for row in before]
    num_copies = Counter(chain.from_iterable(before[rank] for rank in members))
    for rank in members:
        for local, expert in enumerate(after[rank]):
            present = rows[rank][local]
            if expert in (EMPTY, present) or expert in rows[rank] or free[rank] == 0:
                continue
            if present == EMPTY or num_copies[present] > 1:
                num_copies[present] -= 1
                num_copies[expert] += 1
                rows[rank][local] = expert
                free[rank] -= 1
    return tuple(tuple(row) for row in rows)
