"""How a kernel is cut into programs: chosen by measurement on two H100s (docs/kernels.md), never part of the result.

Legend: T tokens, H hidden_size.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """``part``: elements of a row that one program moves at a time, a power of two. ``overlap``: start while the
    kernel before still runs, as far as its results are not needed (programmatic dependent launch)."""

    part: int
    num_programs: int
    num_warps: int = 4
    overlap: bool = False


@dataclass(frozen=True, slots=True)
class LaunchPlanner:
    """``num_resident``: programs that are surely on the device at once; those of combine wait for one another."""

    hidden_size: int
    num_resident: int
    overlap: bool

    def dispatch(self, num_tokens: int) -> LaunchPlan:
        part = 1024 if num_tokens <= 16 else 4096 if num_tokens <= 64 else 8192
        return self._plan(num_tokens, part, 4, 4 * self.num_resident)

    def combine(self, num_tokens: int, ordered: bool) -> LaunchPlan:
        if ordered:
            return self._plan(num_tokens, 1024, 4, self.num_resident)
        part = 1024 if num_tokens <= 16 else 2048
        return self._plan(num_tokens, part, 4, self.num_resident)

    def _plan(self, num_tokens: int, part: int, num_warps: int, most: int) -> LaunchPlan:
        part = min(part, 1 << (self.hidden_size - 1).bit_length())
        num_parts = -(-self.hidden_size // part)
        return LaunchPlan(part, max(1, min(most, num_tokens * num_parts)), num_warps, self.overlap)


@dataclass(frozen=True, slots=True)
class OneProgram(LaunchPlanner):
    """For the interpreter, which runs programs one after another: none may wait for a later one."""

    hidden_size: int
    num_resident: int = 1
    overlap: bool = False

    def _plan(self, num_tokens: int, part: int, num_warps: int, most: int) -> LaunchPlan:
        return LaunchPlan(1 << (self.hidden_size - 1).bit_length(), 1)
