"""What a plan is made for: expert slots and fault domain of every rank, groups of experts, and how much may move. Pure.

Shapes: L mixture-of-experts layers, R ranks, S expert slots of the largest rank, E logical experts.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class ClusterShape:
    """``num_local_R``: expert slots of each rank in each layer; 0 for a rank that takes none (absent, or leaving).

    ``host_R``: number of the host of each rank; all on one host if empty. ``num_groups``: groups of experts that a
    token chooses first; when they divide evenly over equal hosts, a group stays within one host.
    """

    num_local_R: tuple[int, ...]
    host_R: tuple[int, ...] = ()
    num_groups: int = 1

    def __post_init__(self) -> None:
        if min(self.num_local_R, default=0) < 0 or sum(self.num_local_R) == 0:
            raise ValueError(f"no rank has expert slots, or a number is negative: {self.num_local_R}")
        if self.host_R and len(self.host_R) != len(self.num_local_R):
            raise ValueError(f"hosts of {len(self.host_R)} ranks given, slots of {len(self.num_local_R)}")
        if self.num_groups < 1:
            raise ValueError(f"num_groups must be positive, not {self.num_groups}")

    @property
    def num_slots(self) -> int:
        return sum(self.num_local_R)

    @property
    def active_ranks(self) -> IntArray:
        """Ranks that take experts, ascending."""
        return np.flatnonzero(self.num_local_R)

    def active(self) -> "ClusterShape":
        """The same without ranks that take none; hosts renumbered from 0."""
        ranks = self.active_ranks
        hosts = np.unique(np.array(self.host_R or (0,) * len(self.num_local_R))[ranks], return_inverse=True)[1]
        num_local = tuple(self.num_local_R[rank] for rank in ranks)
        return ClusterShape(num_local, tuple(int(host) for host in hosts), self.num_groups)

    def canonical_order(self) -> IntArray:
        """Ranks host by host, alike hosts together: the same cluster however its ranks and hosts are numbered."""
        hosts = self.host_R or (0,) * len(self.num_local_R)
        members: dict[int, list[int]] = {host: [] for host in hosts}
        for host, num_local in sorted(zip(hosts, self.num_local_R, strict=True)):
            members[host].append(num_local)
        keys = [(members[host], host, num_local) for host, num_local in zip(hosts, self.num_local_R, strict=True)]
        return np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)

    def exists_RS(self) -> BoolArray:
        """Which (rank, local) are expert slots, where rows are padded to the longest."""
        return np.arange(max(self.num_local_R))[None, :] < np.array(self.num_local_R)[:, None]


@dataclass(frozen=True, slots=True)
class Budget:
    """Most slots that may be loaded with another expert by one plan; None for no bound. Repairs are made regardless."""

    total: int | None = None
    per_layer: int | None = None

    @property
    def is_unlimited(self) -> bool:
        return self.total is None and self.per_layer is None


UNLIMITED = Budget()


def checked_loads(load_LE: npt.NDArray[np.floating] | npt.NDArray[np.integer]) -> FloatArray:
    """A copy in which the largest load is 1, or all are 0. ValueError names the first that is no number of tokens."""
    if load_LE.ndim != 2 or load_LE.shape[1] == 0:
        raise ValueError(f"loads must be [layers, logical experts], not of shape {load_LE.shape}")
    load = load_LE.astype(np.float64)
    if (bad := ~(np.isfinite(load) & (load >= 0))).any():
        layer, expert = np.argwhere(bad)[0]
        raise ValueError(f"load of expert {expert} in layer {layer} is {load[layer, expert]}, not a number of tokens")
    # Scaled before any sum is taken: the sum of huge loads would overflow.
    return np.asarray(load / max(float(load.max(initial=0.0)), np.finfo(np.float64).tiny))
