"""Names of the things that messages talk about.

A *process id* is new for every life of a process; a *rank* is a slot number in the expert-parallel group that many
processes may hold one after the other, told apart by their *incarnation* (the epoch that gave the slot out).
"""

from typing import NewType

ProcessId = NewType("ProcessId", str)
RequestId = NewType("RequestId", str)
Rank = NewType("Rank", int)
Incarnation = NewType("Incarnation", int)
Epoch = NewType("Epoch", int)

NO_RANK = Rank(-1)


def make_process_id(name: str, nonce: int) -> ProcessId:
    """``name-nonce``: unique over restarts, because names and pids are reused and nonces (64 random bits) are not."""
    return ProcessId(f"{name}-{nonce:016x}")


def make_request_id(router_nonce: int, number: int) -> RequestId:
    """Holds the router's nonce, so a restarted router can never reuse an id that decode ranks still know."""
    return RequestId(f"{router_nonce:016x}.{number}")
