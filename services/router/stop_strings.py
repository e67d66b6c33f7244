"""Finding stop strings in a text that arrives in pieces.

What could still become a stop string is held back, so that no client ever sees the start of one. The answer does not
depend on how the text is cut: it is that of a reader who takes one character at a time and stops at the first
stop string that is complete.

    >>> finder = StopStrings(("END", "ENOUGH"))
    >>> finder.push("one EN")
    ('one ', None)
    >>> finder.push("D two")
    ('', 'END')
"""

from collections.abc import Sequence


class StopStrings:
    def __init__(self, stops: Sequence[str]) -> None:
        """Raises ValueError for an empty stop string, which would be everywhere."""
        if not all(stops):
            raise ValueError("a stop string must not be empty")
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Text that may be shown now, and the stop string that ends it, or None. Nothing may follow a stop string."""
        if not self._stops:
            return text, None
        text = self._held + text
        # The first to be complete; of those that end together, the longest.
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            _, at, stop = min(found)
            self._held = ""
            return text[:at], stop
        num_held = max((self._overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], None

    def flush(self) -> str:
        """What is held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of ``text`` that ``stop`` starts with."""
        longest = min(len(text), len(stop) - 1)
        return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
