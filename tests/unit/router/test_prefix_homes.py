"""Where a prompt has been computed before, as the router remembers it."""

from common.ids import ProcessId
from services.router.prefix_homes import PrefixHomes

ONE, TWO = ProcessId("prefill-1"), ProcessId("prefill-2")


def test_whole_blocks_of_the_longest_known_beginning_count() -> None:
    homes = PrefixHomes(block_size=2)
    homes.on_sent(ONE, [1, 2, 3, 4, 5])
    assert homes.num_known_tokens([1, 2, 3, 4, 9]) == {ONE: 4}
    assert homes.num_known_tokens([1, 2, 3, 4]) == {ONE: 2}, "the last token is always computed"
    assert homes.num_known_tokens([1, 2, 9, 4, 9]) == {ONE: 2}
    assert homes.num_known_tokens([9, 2, 3, 4, 9]) == {}


def test_the_last_worker_counts_for_each_beginning() -> None:
    homes = PrefixHomes(block_size=2)
    homes.on_sent(ONE, [1, 2, 3, 4, 5, 6])
    homes.on_sent(TWO, [1, 2, 7, 7])
    assert homes.num_known_tokens([1, 2, 3, 4, 5, 6, 7]) == {TWO: 2, ONE: 6}


def test_the_longest_unused_is_forgotten_and_the_end_of_a_prompt_before_its_beginning() -> None:
    homes = PrefixHomes(block_size=1, max_prefixes=3)
    homes.on_sent(ONE, [1, 2])
    homes.on_sent(TWO, [5, 6])
    assert homes.num_known_tokens([1, 2, 9]) == {ONE: 1}
    assert homes.num_known_tokens([5, 6, 9]) == {TWO: 2}
