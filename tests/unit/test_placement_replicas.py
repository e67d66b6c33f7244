"""Policies of replica choice: which copies take the tokens of a rank, and how evenly."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import ReplicaPolicy
from common.placement import EMPTY, PhysicalToLogical
from common.replica_choice import ReplicaChoice, balancedness, rank_loads

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


@pytest.mark.parametrize("policy", list(ReplicaPolicy))
@given(data=st.data())
def test_rank_loads_foretell_where_tokens_go(policy: ReplicaPolicy, data: st.DataObject) -> None:
    """Of as many tokens from every member, counted one by one."""
    num_ranks, num_experts = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    members = data.draw(st.lists(st.integers(0, num_ranks - 1), min_size=1, unique=True))
    experts = st.lists(st.integers(0, num_experts - 1), min_size=3, max_size=3, unique=num_experts > 2)
    rows = tuple(tuple(dict.fromkeys((*data.draw(experts), EMPTY))) for _ in range(num_ranks))
    load_E = np.array(data.draw(st.lists(st.integers(0, 9), min_size=num_experts, max_size=num_experts)), np.float64)
    counted_R, num_tokens = np.zeros(num_ranks), 60 * 64
    for own in members:
        choice = ReplicaChoice((rows,), members, num_experts, own, policy)
        rank_TE, _ = choice.choose(0, np.tile(np.arange(num_experts), (num_tokens, 1)), np.arange(num_tokens))
        for expert, load in enumerate(load_E):
            held_T = rank_TE[:, expert][rank_TE[:, expert] >= 0]
            counted_R += np.bincount(held_T, minlength=num_ranks) * load / num_tokens / len(members)
    # The table of copies has 64 columns, which three copies cannot divide evenly.
    assert rank_loads(load_E, rows, members, policy) == pytest.approx(counted_R[members], abs=load_E.sum() / 32 + 1e-9)


def test_gather_makes_copies_useless_for_balance() -> None:
    load_LE = np.array([[90.0, 10.0]])
    both_on_both: PhysicalToLogical = (((0, 1), (0, 1)),)
    assert balancedness(load_LE, both_on_both, [0, 1], ReplicaPolicy.LOCAL_FIRST) == 1.0
    assert balancedness(load_LE, both_on_both, [0, 1], ReplicaPolicy.GATHER) == pytest.approx(50 / 90)
