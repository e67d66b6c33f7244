"""How long requests wait for a prefill worker when there is none; then decode ranks compute prompts. Pure."""

# Before the first worker has come: it is loading the model, as the decode ranks are.
_START = 10


class PrefillWait:
    def __init__(self, wait_s: float) -> None:
        self._wait_s = wait_s
        self._num_workers = 0
        self._seen_any = False
        self._until: float | None = None  # None: not counting, nothing has been heard of workers

    def on_workers(self, num_workers: int, now: float) -> None:
        """What the directory says now."""
        if num_workers == 0 and (self._num_workers or self._until is None):
            self._until = now + (self._wait_s if self._seen_any else _START * self._wait_s)
        self._seen_any = self._seen_any or num_workers > 0
        self._num_workers = num_workers

    def is_on(self, now: float) -> bool:
        """Whether requests have to wait."""
        return self._num_workers == 0 and (self._until is None or now < self._until)
