"""What each rank says at the start of a round, and what follows from all of them together. Pure.

Every member reads the same headers, so every member draws the same conclusions: whether there is work to compute,
whether all may rest, and whether a prepared view is entered at the end of the round.
"""

from collections.abc import Mapping, Sequence

import msgspec

from common.ids import Epoch

NUM_HEADER_WORDS = 4


class RoundHeader(msgspec.Struct, frozen=True):
    num_tokens: int = 0
    idle: bool = True  # neither work nor a prepared view: this rank may rest
    staged_epoch: int = 0  # prepared view that this rank is ready for, experts included; binding for this round
    num_rounds: int = 0  # of the group so far, as far as this rank knows; 32 bits

    def words(self) -> tuple[int, ...]:
        return (self.num_tokens, int(self.idle), self.staged_epoch, self.num_rounds)

    @classmethod
    def from_words(cls, words: Sequence[int]) -> "RoundHeader":
        return cls(words[0], bool(words[1]), words[2], words[3])


# The first header of a newcomer is written before anybody lets it in, so it must not depend on anything.
NEWCOMER_HEADER = RoundHeader()


class RoundPlan(msgspec.Struct, frozen=True):
    """The conclusions from all headers of a round."""

    num_tokens: int
    all_idle: bool
    next_epoch: Epoch  # all are ready for this prepared view; 0 = not all, or not for the same
    num_rounds: int  # of the group, this one included: all members count on from the one that knows most

    @classmethod
    def of(cls, headers: Mapping[int, RoundHeader]) -> "RoundPlan":
        staged = {header.staged_epoch for header in headers.values()}
        return cls(
            num_tokens=sum(header.num_tokens for header in headers.values()),
            all_idle=all(header.idle for header in headers.values()),
            next_epoch=Epoch(staged.pop() if len(staged) == 1 else 0),
            num_rounds=max(header.num_rounds for header in headers.values()) + 1 & 0xFFFFFFFF,
        )
