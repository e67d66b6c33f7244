"""How much each expert has been used of late. Pure.

Tokens count fully when they are reported, and fade with time: after `window_s` to 1/e. So the sum behaves like a window
of that length without keeping what came when.

Shapes: L mixture-of-experts layers, E logical experts.
"""

import math

import numpy as np
import numpy.typing as npt


class ExpertLoad:
    def __init__(self, num_layers: int, num_logical_experts: int, window_s: float, now: float) -> None:
        self._load_LE = np.zeros((num_layers, num_logical_experts))
        self._window_s, self._now = window_s, now

    def on_report(self, tokens: tuple[tuple[int, ...], ...], now: float) -> bool:
        """Adds tokens[layer][expert] routed since the last report of the same rank; False if the shape is another."""
        num_layers, num_experts = self._load_LE.shape
        if len(tokens) != num_layers or any(len(row) != num_experts for row in tokens):
            return False
        self._fade(now)
        self._load_LE += np.array(tokens, dtype=np.float64)
        return True

    def at(self, now: float) -> npt.NDArray[np.float64]:
        """[L, E], tokens; a copy."""
        self._fade(now)
        return self._load_LE.copy()

    def _fade(self, now: float) -> None:
        # Reports may arrive with times that go back a little; fading never does.
        elapsed_s = max(0.0, now - self._now)
        self._load_LE *= math.exp(-elapsed_s / self._window_s)
        self._now += elapsed_s
