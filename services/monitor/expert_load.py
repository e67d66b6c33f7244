"""How evenly experts load the ranks of the placement in force, from what the ranks publish on topic ``load``.

Two figures. One is measured: what each rank has computed for everybody in this epoch. The other is foretold: the tokens
of late, whatever placement they met, spread as the placement in force and the replica policy would spread them. They
come together as the epoch grows older; the foretold one is known at once after a change.

Legend: L mixture-of-experts layers, E logical experts, R members.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.config import ReplicaPolicy
from common.ids import Epoch, Rank
from common.messages import ExpertLoad, View
from common.replica_choice import FloatArray, evenness, rank_loads
from common.view import ranks

# Half of the weight lies on what came within this time.
_HALF_LIFE_S = 30.0


def _fading(since: float, now: float) -> float:
    return float(0.5 ** ((now - since) / _HALF_LIFE_S))


class LoadWindow:
    """load_LE: tokens routed to expert E in mixture-of-experts layer L, older ones fading."""

    def __init__(self, num_moe_layers: int, num_logical_experts: int, policy: ReplicaPolicy) -> None:
        self._load_LE: FloatArray = np.zeros((num_moe_layers, num_logical_experts))
        self._policy = policy
        self._faded_at = 0.0

    def on_load(self, load: ExpertLoad, now: float) -> None:
        """Loads of another shape are of another model, or nonsense, and dropped."""
        num_layers, num_experts = self._load_LE.shape
        if len(load.tokens) != num_layers or any(len(row) != num_experts for row in load.tokens):
            return
        self._load_LE *= _fading(self._faded_at, now)
        self._faded_at = now
        self._load_LE += np.asarray(load.tokens, dtype=np.float64)

    def rank_loads(self, view: View) -> FloatArray:
        """[L, R]"""
        layers = zip(self._load_LE, view.placement.physical_to_logical, strict=True)
        return np.array([rank_loads(load_E, rows, ranks(view), self._policy) for load_E, rows in layers])


@dataclass(slots=True)
class _Served:
    entries_L: npt.NDArray[np.float64]
    passes: float = 0.0
    at: float = 0.0


class ServedLoad:
    """Entries by layer and rank and pass, since ranks make their passes together but do not report together."""

    def __init__(self, num_moe_layers: int) -> None:
        self._num_moe_layers = num_moe_layers
        self._epoch = Epoch(0)
        self._by_rank: dict[Rank, _Served] = {}
        self.num_entries = 0

    def on_load(self, load: ExpertLoad, now: float) -> None:
        """Whatever tells of an older epoch, or of another model, is dropped."""
        if load.epoch < self._epoch or len(load.served) != self._num_moe_layers or min(load.served, default=0) < 0:
            return
        if load.epoch > self._epoch:
            self._epoch, self._by_rank, self.num_entries = load.epoch, {}, 0
        served = self._by_rank.setdefault(load.rank, _Served(np.zeros(self._num_moe_layers), at=now))
        fading = _fading(served.at, now)
        served.entries_L = served.entries_L * fading + np.array(load.served)
        served.passes, served.at = served.passes * fading + load.served_passes, now
        self.num_entries += sum(load.served)

    def rank_loads(self, view: View) -> FloatArray | None:
        """[L, R], entries a pass; None until every member has told of this epoch."""
        if self._epoch != view.epoch or not view.members:
            return None
        told = [self._by_rank.get(rank) for rank in map(Rank, ranks(view))]
        columns = [served.entries_L / served.passes for served in told if served is not None and served.passes > 0]
        return np.stack(columns, axis=1) if len(columns) == len(told) else None


class ExpertBalance:
    """Both figures, for whoever asks what the cluster is like."""

    def __init__(self, num_moe_layers: int, num_logical_experts: int, policy: ReplicaPolicy) -> None:
        self._asked, self._served = LoadWindow(num_moe_layers, num_logical_experts, policy), ServedLoad(num_moe_layers)

    def on_load(self, load: ExpertLoad, now: float) -> None:
        self._asked.on_load(load, now)
        self._served.on_load(load, now)

    def figures(self, view: View) -> dict[str, object]:
        """``balancedness`` is the measured one; the foretold one stands in for it while nothing has been measured."""
        foretold_LR, served_LR = self._asked.rank_loads(view), self._served.rank_loads(view)
        shown_LR = foretold_LR if served_LR is None else served_LR
        return {
            "balancedness": round(evenness(shown_LR), 4),
            "foretold_balancedness": round(evenness(foretold_LR), 4),
            "served_entries": 0 if served_LR is None else self._served.num_entries,
            "layers": [round(evenness(load_R[None]), 4) for load_R in shown_LR],
        }
