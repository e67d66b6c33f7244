"""Whether a rank has been left alone: neither the monitor nor a header round for too long (PROTOCOL 5.1)."""

# A gap this long between two looks at the clock means that this process stood still itself, and so has judged nobody.
_STOOD_STILL = 0.25  # of limit_s


class Loneliness:
    """``limit_s``: how long a member goes on without a sign."""

    def __init__(self, limit_s: float, now: float) -> None:
        self.limit_s = limit_s
        self._last_sign = now  # of the monitor, or a completed header round
        self._looked_at = now

    def on_sign(self, now: float) -> None:
        self._last_sign = max(self._last_sign, now)

    def look(self, now: float) -> bool:
        """To be asked often, in waits too."""
        if now - self._looked_at > _STOOD_STILL * self.limit_s:
            self.on_sign(now)
        self._looked_at = now
        return now - self._last_sign > self.limit_s
