"""What a local search has done, step by step, and where each layer had best stop. Pure.

Shapes: L layers, N steps, P slots of a layer.
"""

from dataclasses import dataclass

import numpy as np

from services.planner.cluster_shape import FloatArray, IntArray


@dataclass(frozen=True, slots=True)
class SearchPath:
    """After n steps, n = 0..N: slots loaded so far, largest rank load, coverage deficit. A layer that has come to its
    end stays as it is. ``changed_LN4``: slot, what it holds from then on, and the same once more; slot -1 for none."""

    start_LP: IntArray
    changed_LN4: IntArray
    cost_NL: IntArray
    largest_NL: FloatArray
    deficit_NL: FloatArray

    def held(self, num_steps_L: IntArray) -> IntArray:
        """held_LP after so many steps of each layer."""
        held_LP = self.start_LP.copy()
        for step in range(self.changed_LN4.shape[1]):
            for half in (0, 2):
                slot_L, expert_L = self.changed_LN4[:, step, half], self.changed_LN4[:, step, half + 1]
                layers = np.flatnonzero((num_steps_L > step) & (slot_L >= 0))
                held_LP[layers, slot_L[layers]] = expert_L[layers]
        return held_LP

    def best(self, weight_L: FloatArray, coverage_price: float, total: int) -> IntArray:
        """held_LP: for each layer the state that makes the weighted sum of largest loads least, within ``total`` slots.

        A price per slot loaded is sought by bisection: under it each layer stops where a further slot is not worth it.
        """
        cost_NL, score_NL = self.cost_NL, weight_L * (self.largest_NL + coverage_price * self.deficit_NL)
        layers_L = np.arange(len(weight_L))
        low, high = 0.0, float(np.ptp(score_NL, axis=0).max()) + 1.0
        chosen_L = score_NL.argmin(axis=0)
        if cost_NL[chosen_L, layers_L].sum() > total:
            for _ in range(40):
                price = (low + high) / 2
                candidate_L = (score_NL + price * cost_NL).argmin(axis=0)
                if cost_NL[candidate_L, layers_L].sum() > total:
                    low = price
                else:
                    high, chosen_L = price, candidate_L
        if cost_NL[chosen_L, layers_L].sum() > total:
            chosen_L = np.zeros_like(chosen_L)
        return self.held(chosen_L)
