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
        if num_tokens <= 4:
            return self._plan(num_tokens, 1024, 4, self.num_resident)
        if num_tokens <= 64:
            return self._plan(num_tokens, 4096, 8 if num_tokens <= 32 else 4, self.num_resident)
        return self._plan(num_tokens, 8192, 4, 4 * self.num_resident)  # only the last program waits

    def combine(self, num_tokens: int, ordered: bool) -> LaunchPlan:
        if ordered:
            part, num_warps = (512, 4) if num_tokens <= 4 else (1024, 4) if num_tokens <= 32 else (4096, 8)
        else:
            part, num_warps = (1024, 4) if num_tokens <= 32 else (4096, 8)
        return self._plan(num_tokens, part, num_warps, self.num_resident)

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
