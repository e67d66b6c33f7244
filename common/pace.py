"""How long a process's own work takes, between its waits for others; a fault can make it take a multiple. Pure.

    resume --own work--> pause --wait for others--> resume ...

The clock runs on the wall: what a process loses to a busy machine is its own time too, since the others wait for it.
"""

from collections.abc import Callable


class Pace:
    """``factor``: 1 = as fast as it can. ``own_s`` is the time of own work since the last `take`, as others feel it."""

    def __init__(self, clock: Callable[[], float], sleep: Callable[[float], None]) -> None:
        self._clock, self._sleep = clock, sleep
        self._since: float | None = None
        self.factor = 1.0
        self.own_s = self.work_s = 0.0  # the latter without what the factor adds

    def resume(self) -> None:
        """A wait for others has ended."""
        self._since = self._clock()

    def pause(self) -> None:
        """The own work is done, and others are about to get its result."""
        if self._since is None:
            return
        work_s = self._clock() - self._since
        if self.factor > 1.0:
            self._sleep((self.factor - 1.0) * work_s)
        self.work_s += work_s
        self.own_s += self._clock() - self._since
        self._since = None

    def add(self, seconds: float) -> None:
        """Own work that was done while paused."""
        self.work_s += seconds
        self.own_s += seconds

    def take(self) -> tuple[float, float]:
        """(own_s, work_s) since the last call, which begin anew."""
        taken = self.own_s, self.work_s
        self.own_s = self.work_s = 0.0
        return taken
