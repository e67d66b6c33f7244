"""The states of a rank, and the moves between them; what causes them is in `services.decode.membership`."""

from enum import Enum

from common.state_machine import transition_table


class RankState(Enum):
    STANDBY = "standby"
    JOINING = "joining"
    SERVING = "serving"
    VOID = "void"
    STOPPED = "stopped"


MOVES = transition_table(
    {
        RankState.STANDBY: {RankState.JOINING, RankState.STOPPED},
        RankState.JOINING: {RankState.STANDBY, RankState.SERVING, RankState.STOPPED},
        RankState.SERVING: {RankState.VOID, RankState.STANDBY, RankState.STOPPED},
        RankState.VOID: {RankState.SERVING, RankState.JOINING, RankState.STANDBY, RankState.STOPPED},
        RankState.STOPPED: set(),
    }
)
