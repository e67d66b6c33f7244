"""Policies of replica choice: which copies take the tokens of a rank, and how evenly."""

import numpy as np
import pytest

from common.config import ReplicaPolicy
from common.placement import PhysicalToLogical, ReplicaChoice

# Expert 0 on ranks 0, 1 and 3; expert 1 on 2 alone. Rank 4 is no member.
_PLACEMENT: PhysicalToLogical = (((0,), (0,), (1,), (0,), (0,)),)
_MEMBERS = (3, 0, 2, 1)


def chosen(own_rank: int, policy: ReplicaPolicy, avoid: int | None = None) -> tuple[dict[int, int], set[int]]:
    """Tokens by rank of expert 0, and the ranks of expert 1, for 60 tokens."""
    choice = ReplicaChoice(_PLACEMENT, _MEMBERS, 2, own_rank, policy, avoid)
    rank_TK, _ = choice.choose(0, np.tile([0, 1], (60, 1)), np.arange(60))
    ranks, counts = np.unique(rank_TK[:, 0], return_counts=True)
    return dict(zip(ranks.tolist(), counts.tolist(), strict=True)), set(rank_TK[:, 1].tolist())


@pytest.mark.parametrize(
    ("own_rank", "policy", "avoid", "expected"),
    [
        (1, ReplicaPolicy.LOCAL_FIRST, None, {1: 60}),
        (2, ReplicaPolicy.LOCAL_FIRST, None, {0: 20, 1: 20, 3: 20}),
        (1, ReplicaPolicy.LOCAL_FIRST, 1, {0: 30, 3: 30}),
        (1, ReplicaPolicy.HASH, None, {0: 20, 1: 20, 3: 20}),
        (1, ReplicaPolicy.HASH, 0, {1: 30, 3: 30}),
        (1, ReplicaPolicy.REMOTE_FIRST, None, {0: 30, 3: 30}),
        (1, ReplicaPolicy.REMOTE_FIRST, 3, {0: 60}),
        (0, ReplicaPolicy.STATIC, None, {0: 60}),
        (2, ReplicaPolicy.STATIC, None, {3: 60}),
    ],
)
def test_where_tokens_go(own_rank: int, policy: ReplicaPolicy, avoid: int | None, expected: dict[int, int]) -> None:
    by_rank, _ = chosen(own_rank, policy, avoid)
    assert by_rank == expected


@pytest.mark.parametrize("policy", list(ReplicaPolicy))
def test_the_only_copy_serves_whatever_is_preferred(policy: ReplicaPolicy) -> None:
    assert chosen(2, policy, avoid=2)[1] == {2}


def test_static_divides_the_ranks_over_the_copies() -> None:
    places = [next(iter(chosen(rank, ReplicaPolicy.STATIC)[0])) for rank in (0, 1, 2, 3)]
    assert sorted(places) == [0, 0, 1, 3]


def test_an_expert_without_live_copy_goes_nowhere() -> None:
    for policy in ReplicaPolicy:
        rank_TK, local_TK = ReplicaChoice(_PLACEMENT, (0, 1), 2, 0, policy).choose(0, np.array([[1]]), np.array([5]))
        assert (rank_TK.tolist(), local_TK.tolist()) == ([[-1]], [[-1]])
