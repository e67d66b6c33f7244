"""How long things take on a rank: a few milliseconds, and now and then much longer."""

from dataclasses import dataclass
from random import Random


@dataclass(slots=True)
class Pace:
    """``pause_chance``: of losing the processor between two stores."""

    random: Random
    wake_from_s: float = 0.002
    wake_to_s: float = 0.03
    pause_chance: float = 0.01
    pause_max_s: float = 0.3

    def wake_s(self) -> float:
        return self.random.uniform(self.wake_from_s, self.wake_to_s)

    def pause_s(self) -> float:
        if self.random.random() >= self.pause_chance:
            return 0.0
        return self.pause_max_s * self.random.random() ** 3
