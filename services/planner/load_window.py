"""The load of experts over the last forward passes, the newest counting most. Pure.

Loads come in buckets of some forward passes each. A bucket leaves the window when it is `window_size` passes old; until
then it counts `decay` to the power of its age in windows, so 1.0 is a plain sliding window.

Shapes: L mixture-of-experts layers, E logical experts.
"""

from collections import deque

import numpy as np

from services.planner.cluster_shape import FloatArray, checked_loads


class LoadWindow:
    def __init__(self, num_layers: int, num_logical_experts: int, window_size: int, decay: float = 0.5) -> None:
        if window_size < 1 or not 0.0 < decay <= 1.0:
            raise ValueError(f"window_size {window_size} must be positive, decay {decay} above 0 and at most 1")
        self._shape = num_layers, num_logical_experts
        self._window_size, self._decay = window_size, decay
        self._buckets: deque[tuple[int, FloatArray]] = deque()
        self._num_passes = 0

    def on_load(self, load_LE: FloatArray, num_passes: int) -> bool:
        """Tokens of the last ``num_passes`` forward passes; False if the shape is another, or a number is no load.

        A bucket without tokens is idle time: it neither enters nor ages the window.
        """
        if load_LE.shape != self._shape or num_passes < 1:
            return False
        try:
            checked_loads(load_LE)
        except ValueError:
            return False
        if load_LE.any():
            self._num_passes += num_passes
            self._buckets.append((self._num_passes, load_LE.astype(np.float64)))
            while self._num_passes - self._buckets[0][0] >= self._window_size:
                self._buckets.popleft()
        return True

    @property
    def num_passes(self) -> int:
        """Forward passes with tokens, ever."""
        return self._num_passes

    def load(self) -> FloatArray:
        """[L, E], a copy."""
        total = np.zeros(self._shape)
        for at, load_LE in self._buckets:
            total += load_LE * self._decay ** ((self._num_passes - at) / self._window_size)
        return total
