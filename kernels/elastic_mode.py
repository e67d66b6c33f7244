"""What a rank does when others are late."""

from enum import Enum


class ElasticMode(Enum):
    """VIEWS: a deadline makes the round void; somebody else decides who is a member (``adopt``). ALONE: for engines
    without such a somebody: each rank masks who is late, for itself, and goes on. OFF: a deadline raises
    LateRanksError. BARE: no masks, no poison, no deadlines; to measure what they cost.
    """

    VIEWS = "views"
    ALONE = "alone"
    OFF = "off"
    BARE = "bare"


class LateRanksError(RuntimeError):
    """In mode OFF: some rank did not come in time."""
