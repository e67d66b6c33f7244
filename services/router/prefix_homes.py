"""Which prefill worker has seen the beginning of a prompt before, as far as this router knows. Pure, and a guess.

Workers keep KV of prompts in a cache of whole blocks (`services/prefill/prefix_cache.py`); nobody tells the router what
is in it. It remembers whom it sent what, by a hash of each prompt's first n blocks, n = 1, 2, ...; what was not used
for longest is forgotten first, here as there. A wrong guess costs the time of a prompt and changes no token.
"""

from collections.abc import Iterator, Sequence

from common.ids import ProcessId

MAX_PREFIXES = 16384


class PrefixHomes:
    def __init__(self, block_size: int, max_prefixes: int = MAX_PREFIXES) -> None:
        self._block_size, self._max_prefixes = block_size, max_prefixes
        self._homes: dict[int, ProcessId] = {}  # the last one, by the hash of a prefix; the longest unused first

    def num_known_tokens(self, tokens: Sequence[int]) -> dict[ProcessId, int]:
        """How many tokens from the beginning each worker may have in its cache; workers without any are left out."""
        known: dict[ProcessId, int] = {}
        for number, prefix in enumerate(self._prefixes(tokens[:-1]), 1):
            if (home := self._homes.get(prefix)) is None:
                break
            known[home] = number * self._block_size
        return known

    def on_sent(self, worker: ProcessId, tokens: Sequence[int]) -> None:
        for prefix in reversed(list(self._prefixes(tokens))):
            self._homes.pop(prefix, None)
            self._homes[prefix] = worker
        while len(self._homes) > self._max_prefixes:
            del self._homes[next(iter(self._homes))]

    def _prefixes(self, tokens: Sequence[int]) -> Iterator[int]:
        prefix, size = 0, self._block_size
        for start in range(0, len(tokens) - size + 1, size):
            prefix = hash((prefix, tuple(tokens[start : start + size])))
            yield prefix
