"""The radix tree of known prompts: what it finds, what it forgets first, and that it never exceeds its budget."""

from hypothesis import given
from hypothesis import strategies as st

from services.prefill.prefix_cache import Insertion, PrefixCache

SIZE = 2


def make(max_blocks: int = 4) -> PrefixCache[str]:
    return PrefixCache(budget_bytes=10 * max_blocks + 9, block_bytes=10, block_size=SIZE)


def find(cache: PrefixCache[str], *tokens: int) -> tuple[int, ...]:
    blocks = cache.acquire("finder", tokens)
    cache.release("finder")
    return blocks


def test_prompts_share_what_they_have_in_common() -> None:
    cache = make()
    assert cache.insert([1, 2, 3, 4, 5], [7, 8, 9]) == Insertion(frozenset({7, 8}), frozenset())
    assert cache.insert([1, 2, 5, 6], [20, 21]) == Insertion(frozenset({21}), frozenset()), "block 7 is there already"
    assert find(cache, 1, 2, 3, 4, 9) == (7, 8)
    assert find(cache, 1, 2, 5, 6, 9) == (7, 21)
    assert find(cache, 1, 2, 3, 4) == (7,), "the last token is never taken from the cache"
    assert find(cache, 2, 1, 3, 4, 9) == ()
    assert cache.num_bytes == 30


def test_the_longest_unused_leaf_goes_first() -> None:
    cache = make()
    cache.insert([1, 1, 2, 2], [0, 1])
    cache.insert([3, 3, 4, 4], [2, 3])
    find(cache, 1, 1, 2, 2, 9)
    assert cache.insert([5, 5], [4]).evicted == {3}
    assert cache.insert([6, 6], [5]).evicted == {2}
    assert find(cache, 1, 1, 2, 2, 9) == (0, 1)


def test_what_somebody_reads_stays() -> None:
    cache = make(max_blocks=2)
    cache.insert([1, 1, 2, 2], [0, 1])
    assert cache.acquire("a", [1, 1, 2, 2, 3]) == cache.acquire("b", [1, 1, 2, 2, 4]) == (0, 1)
    cache.release("a")
    assert cache.insert([5, 5], [4]) == Insertion(frozenset(), frozenset())
    cache.release("b")
    cache.release("b")
    assert cache.insert([5, 5], [4]) == Insertion(frozenset({4}), frozenset({1}))


def test_a_prompt_longer_than_the_budget_keeps_its_beginning() -> None:
    cache = make(max_blocks=2)
    assert cache.insert(list(range(10)), list(range(5))).taken == {0, 1}
    assert make(max_blocks=0).insert([1, 2], [0]).taken == frozenset()


_prompts = st.lists(st.integers(1, 2), min_size=1, max_size=12)


@given(st.lists(st.tuples(st.sampled_from(["insert", "acquire", "release"]), st.sampled_from("ab"), _prompts)))
def test_blocks_found_hold_the_tokens_asked_for(history: list[tuple[str, str, list[int]]]) -> None:
    cache, num_made = make(), 0
    prefix_of_block: dict[int, tuple[int, ...]] = {}
    held: dict[str, tuple[int, ...]] = {}
    for kind, owner, prompt in history:
        if kind == "insert":
            table = list(range(num_made, num_made + len(prompt) // SIZE))
            num_made += len(table)
            insertion = cache.insert(prompt, table)
            assert not insertion.evicted & {block for blocks in held.values() for block in blocks}
            for block in insertion.evicted:
                del prefix_of_block[block]
            for number, block in enumerate(table, 1):
                if block in insertion.taken:
                    prefix_of_block[block] = tuple(prompt[: number * SIZE])
        elif kind == "acquire" and owner not in held:
            held[owner] = cache.acquire(owner, prompt)
            known = {number * SIZE for number in range(len(prompt)) if number * SIZE < len(prompt)}
            longest = max((n for n in known if tuple(prompt[:n]) in prefix_of_block.values()), default=0)
            assert [len(prefix_of_block[block]) for block in held[owner]] == list(range(SIZE, longest + 1, SIZE))
            assert all(prefix_of_block[block] == tuple(prompt[: len(prefix_of_block[block])]) for block in held[owner])
        elif kind == "release":
            held.pop(owner, None)
            cache.release(owner)
        cache.check_invariants()
        assert cache.num_blocks == len(prefix_of_block) <= 4
