"""Which links to decode ranks are kept. Pure.

A request names the endpoint that its KV goes to; views tell which endpoints still exist. A view may be older here than
at the router, so an endpoint that no view holds is given up only when it has not been used for a while.
"""

from collections.abc import Iterable

UNUSED_S = 10.0


class DecodeLinks:
    def __init__(self) -> None:
        self._used_at: dict[str, float] = {}

    def use(self, endpoint: str, now: float) -> bool:
        """True when the link must be made first."""
        is_new = endpoint not in self._used_at
        self._used_at[endpoint] = now
        return is_new

    def on_endpoints(self, endpoints: Iterable[str], now: float) -> list[str]:
        """The links to close, given all endpoints that exist."""
        alive = set(endpoints)
        gone = [
            endpoint
            for endpoint, used_at in self._used_at.items()
            if endpoint not in alive and now - used_at > UNUSED_S
        ]
        for endpoint in gone:
            del self._used_at[endpoint]
        return gone
