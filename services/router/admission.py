"""How many requests may be in flight, and what a client is told when it has to come back later."""

from dataclasses import dataclass

from common.config import RouterConfig

RETRY_AFTER_S = 1  # the time in which a few streams of a busy cluster end
RETRY_AFTER_OUTAGE_S = 5  # the time in which a group forms or a rank comes back


@dataclass(frozen=True, slots=True)
class Turnaway:
    """A request is not accepted: HTTP status, reason, and seconds for the Retry-After header."""

    status: int
    message: str
    retry_after_s: int


@dataclass(slots=True)
class Admission:
    """Bounded: a queue that grows without end turns overload into late answers for everybody."""

    config: RouterConfig
    draining: bool = False

    def consider(self, num_in_flight: int, num_more: int = 1) -> Turnaway | None:
        """None when ``num_more`` requests may come in together."""
        if self.draining:
            return Turnaway(503, "this router is shutting down; send the request again", RETRY_AFTER_S)
        if num_in_flight + num_more > self.config.max_queued:
            limit = self.config.max_queued
            return Turnaway(
                429, f"too many requests: {num_in_flight} of at most {limit} are in flight already", RETRY_AFTER_S
            )
        return None
