"""The monitor's trust in its own sense of time (PROTOCOL 3.4).

A monitor that was stopped, or starved, finds every timer expired and every heartbeat old, and would remove the healthy.
So all waiting is measured from the later of its start and the last late tick: whoever was silent while the monitor
itself was away gets the whole time again.
"""


class TickClock:
    def __init__(self, late_tick_s: float, now: float) -> None:
        self._late_tick_s = late_tick_s
        self._last_tick = self._restarted_at = now

    def tick(self, now: float) -> bool:
        """To be called at every tick. True when it came late and all timers started anew."""
        late = now - self._last_tick > self._late_tick_s
        if late:
            self._restarted_at = now
        self._last_tick = now
        return late

    def elapsed(self, since: float, now: float) -> float:
        """Seconds since ``since`` that the monitor was awake for without a break. Between ticks, only what it may
        rely on: the time since the last tick counts when the next one is in time."""
        return min(now, self._last_tick) - max(since, self._restarted_at)
