"""What routers have not been told yet, and when they are. Pure.

An output goes out at most every ``interval_s``, together with all others that have come meanwhile; so a router handles
one message for several rounds. What somebody waits for goes at once: a request's first output, its end, an answer. Then
whatever else the same router has not been told goes along.

A request stands here with the output from which on it has news, and its tokens are read when they are sent.
"""

from common.ids import ProcessId, RequestId
from common.messages import Tokens
from services.decode.request import Request

NEVER = float("inf")


class News:
    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._untold: dict[ProcessId, dict[RequestId, tuple[Request, int]]] = {}
        self._not_before: dict[ProcessId, float] = {}  # routers that were told something lately

    @property
    def due_at(self) -> float:
        """When the next message has to leave; NEVER if there is nothing to tell."""
        return min((self._not_before.get(router, 0.0) for router in self._untold), default=NEVER)

    def add(self, request: Request, start: int, at_once: bool) -> None:
        """Outputs from number ``start`` on, of which there may be none: that says that the request is alive."""
        router, id = request.announce.router, request.announce.request
        untold = self._untold.setdefault(router, {})
        before = untold.get(id)
        untold[id] = (request, min(start, before[1]) if before else start)
        if at_once:
            self.hurry(request)

    def hurry(self, request: Request) -> None:
        """What its router has not been told is due now."""
        self._not_before.pop(request.announce.router, None)

    def hurry_all(self) -> None:
        """What no router has been told is due now."""
        self._not_before.clear()

    def forget(self, request: Request) -> None:
        """Nobody wants to know of it any more."""
        router, id = request.announce.router, request.announce.request
        untold = self._untold.get(router, {})
        untold.pop(id, None)
        if not untold:
            self._untold.pop(router, None)

    def take(self, now: float) -> list[tuple[ProcessId, tuple[Tokens, ...]]]:
        """All that is due, by router."""
        due = [router for router in self._untold if self._not_before.get(router, 0.0) <= now]
        if not due:
            return []
        self._not_before = {router: at for router, at in self._not_before.items() if at > now}
        self._not_before |= dict.fromkeys(due, now + self._interval_s)
        return [
            (router, tuple(request.tokens(start) for request, start in self._untold.pop(router).values()))
            for router in due
        ]

    def clear(self) -> None:
        self._untold.clear()
        self._not_before.clear()
