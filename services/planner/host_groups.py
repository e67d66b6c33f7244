"""Experts that come in groups: each group goes to one host, and each host is planned as a cluster of its own. Pure.

A token of such a model (DeepSeek-V3) chooses a few groups first, so a group on one host keeps its traffic there. Done
when the groups divide evenly over hosts that are alike; otherwise groups are of no account.

Shapes: L layers, H hosts, G groups, E experts, R ranks, S slots of the largest rank; inside a host E/H and R/H.
"""

from dataclasses import dataclass

import numpy as np

from common.placement import EMPTY
from services.planner.cluster_shape import ClusterShape, FloatArray, IntArray
from services.planner.relabel import relabel
from services.planner.search import pack


def goes_by_groups(shape: ClusterShape, num_logical_experts: int) -> bool:
    """Whether groups divide over hosts that have equal ranks, and experts over groups."""
    hosts: dict[int, list[int]] = {host: [] for host in shape.host_R}
    for host, num_local in zip(shape.host_R, shape.num_local_R, strict=True):
        hosts[host].append(num_local)
    alike = len({tuple(ranks) for ranks in hosts.values()}) == 1
    divides = shape.num_groups % len(hosts) == 0 and num_logical_experts % shape.num_groups == 0
    return len(hosts) > 1 and alike and divides


@dataclass(frozen=True, slots=True)
class HostSplit:
    """Each (layer, host) as a layer of its own: its experts, and what each logical expert is called there."""

    shape: ClusterShape
    rank_HR: IntArray
    expert_LHE: IntArray

    def loads(self, load_LE: FloatArray) -> FloatArray:
        """[L * H, E / H]"""
        split = np.take_along_axis(load_LE[:, None, :], self.expert_LHE, axis=2)
        return np.asarray(split.reshape(-1, split.shape[2]))

    def inside(self, placement_LRS: IntArray) -> IntArray:
        """[L * H, R / H, S]; EMPTY for experts of other hosts."""
        num_layers, num_hosts, size = self.expert_LHE.shape
        local_LHE = np.full((num_layers, num_hosts, num_hosts * size + 1), EMPTY, dtype=np.int64)
        np.put_along_axis(local_LHE, self.expert_LHE, np.arange(size)[None, None, :], axis=2)
        by_host = placement_LRS[:, self.rank_HR]
        flat = np.take_along_axis(local_LHE, by_host.reshape(num_layers, num_hosts, -1), axis=2)
        return flat.reshape(num_layers * num_hosts, *by_host.shape[2:])

    def outside(self, inside: IntArray) -> IntArray:
        """[L, R, S] from what `inside` gives."""
        num_layers, num_hosts, size = self.expert_LHE.shape
        with_empty = np.concatenate([self.expert_LHE, np.full((num_layers, num_hosts, 1), EMPTY)], axis=2)
        flat = np.take_along_axis(with_empty, inside.reshape(num_layers, num_hosts, -1) % (size + 1), axis=2)
        by_host = flat.reshape(num_layers, num_hosts, *inside.shape[1:])
        out_LRS = np.empty((num_layers, self.rank_HR.size, inside.shape[2]), dtype=np.int64)
        out_LRS[:, self.rank_HR] = by_host
        return out_LRS


def split_by_host(load_LE: FloatArray, shape: ClusterShape, before_LRS: IntArray, *, keep: bool) -> HostSplit:
    """Groups packed onto hosts by load, near to how ``before_LRS`` has them, or exactly so with ``keep``."""
    num_layers, num_experts = load_LE.shape
    hosts = np.array(shape.host_R)
    num_hosts = int(hosts.max()) + 1
    rank_HR = np.argsort(hosts, kind="stable").reshape(num_hosts, -1)
    size = num_experts // shape.num_groups
    group_shape = ClusterShape((shape.num_groups // num_hosts,) * num_hosts)
    held_LHG = _groups_on_hosts(before_LRS, rank_HR, shape.num_groups, size)
    load_LG = load_LE.reshape(num_layers, shape.num_groups, size).sum(axis=2)
    group_LHG = pack(load_LG, np.ones_like(load_LG, dtype=np.int64), group_shape)
    old_LHG = _assigned(held_LHG, group_shape)
    group_LHG = relabel(group_LHG, old_LHG, group_shape, load_LG)
    if keep:
        is_whole_L = (old_LHG != EMPTY).all(axis=(1, 2))
        group_LHG = np.where(is_whole_L[:, None, None], old_LHG, group_LHG)
    expert_LHE = (group_LHG[:, :, :, None] * size + np.arange(size)).reshape(num_layers, num_hosts, -1)
    inner = ClusterShape(tuple(shape.num_local_R[rank] for rank in rank_HR[0]))
    return HostSplit(inner, rank_HR, expert_LHE)


def _groups_on_hosts(placement_LRS: IntArray, rank_HR: IntArray, num_groups: int, size: int) -> IntArray:
    """[L, H, G]: slots that hold an expert of the group."""
    by_host = placement_LRS[:, rank_HR].reshape(len(placement_LRS), len(rank_HR), -1)
    group = np.where(by_host == EMPTY, EMPTY, by_host // size)
    return np.stack([(group == number).sum(axis=2) for number in range(num_groups)], axis=2)


def _assigned(held_LHG: IntArray, group_shape: ClusterShape) -> IntArray:
    """[L, H, G / H]: the groups of each host as they are, ascending; EMPTY throughout a layer where they are mixed."""
    per_host = group_shape.num_local_R[0]
    present = held_LHG > 0
    is_whole_L = (present.sum(axis=1) == 1).all(axis=1) & (present.sum(axis=2) == per_host).all(axis=1)
    groups_LHG = np.argsort(~present, axis=2, kind="stable")[:, :, :per_host]
    return np.where(is_whole_L[:, None, None], groups_LHG, EMPTY)
