"""Betters a placement move by move, in all layers at once: the moves that even out most for what they cost. Pure.

Two kinds of move. `replace`, cost 1: a slot whose expert has another copy takes a further copy of some expert; one load
changes hands on every rank that holds either. `swap`, cost 2: the heaviest rank exchanges an expert with a light one.
Numbers of copies and their places are thus decided together. What is made small is the sum over ranks of
(load / mean load)^8, a smooth stand-in for the largest load, plus a price for experts whose copies all lie in one fault
domain; each step takes the move that lowers it most per slot loaded. The change by a move is summed rank by rank as if
no rank held both experts of a `replace`, which is rare; an estimate that was wrong costs a later step, nothing else.

Only promising moves are valued: slots whose copy is least missed, experts whose further copy relieves most, light
ranks.

Shapes: L layers, R ranks, S slots of the largest rank, P = R * S slots, E logical experts (E + 1 columns: the last
stands for EMPTY), H hosts, Q slots and K experts considered for a replace, M light ranks considered for a swap.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from common.placement import EMPTY
from services.planner.cluster_shape import BoolArray, ClusterShape, FloatArray, IntArray
from services.planner.placement_array import held_by, num_copies
from services.planner.search_path import SearchPath

NUM_SLOTS, NUM_EXPERTS, NUM_LIGHT = 16, 32, 3
NO_SLOT = -1
_LEAST_GAIN = 1e-9
_WORTH_NARROWING = 0.85


def power8(value: FloatArray) -> FloatArray:
    value = value * value
    value *= value
    value *= value
    return value


class LocalSearch:
    """``load_LE`` is scaled so that 1 is a rank's mean load; every rank of ``shape`` takes experts."""

    def __init__(
        self, load_LE: FloatArray, placement_LRS: IntArray, shape: ClusterShape, coverage_price: float
    ) -> None:
        num_layers, self._num_ranks, self._width = placement_LRS.shape
        self._num_experts = num_experts = load_LE.shape[1]
        self._price = coverage_price
        self._layers = np.arange(num_layers)
        self._load = np.concatenate([load_LE, np.zeros((num_layers, 1))], axis=1)
        self._held = np.where(placement_LRS == EMPTY, num_experts, placement_LRS).reshape(num_layers, -1)
        # EMPTY counts as an expert without load that has a copy to spare.
        counts = num_copies(placement_LRS, num_experts).astype(np.float64)
        self._counts = np.concatenate([counts, np.full((num_layers, 1), 2.0)], axis=1)
        self._load[self._counts == 0] = 0.0
        self._is_held = held_by(placement_LRS, num_experts)
        self._host_R = np.array(shape.host_R or (0,) * self._num_ranks)
        self._has_hosts = len(set(shape.host_R)) > 1
        self._on_host = self._count_on_hosts()
        self._exists_P = shape.exists_RS().ravel()
        self._rank_P = np.repeat(np.arange(self._num_ranks), self._width)
        self._column_L = (self._layers * (num_experts + 1))[:, None]
        self._cost_L = np.zeros(num_layers, dtype=np.int64)

    def run(self, max_steps: int, most_L: IntArray) -> SearchPath:
        """Steps from the given placement on; no layer loads more than ``most_L`` slots."""
        self._weigh()
        start_LP, layers_L, changed = self._held.copy(), self._layers, []
        cost: list[npt.NDArray[Any]] = [self._cost_L.copy()]
        largest: list[npt.NDArray[Any]] = [self._rank_load.max(axis=1)]
        deficit: list[npt.NDArray[Any]] = [self._deficit_L()]
        while len(cost) <= max_steps:
            good_L, moves_L4 = self._improve(most_L)
            # A layer without a good move has none ever after.
            if good_L.sum() < _WORTH_NARROWING * len(good_L):
                self._narrow(good_L)
                layers_L, most_L, moves_L4 = layers_L[good_L], most_L[good_L], moves_L4[good_L]
            if not len(layers_L):
                break
            self._weigh()
            for states in (cost, largest, deficit):
                states.append(states[-1].copy())
            cost[-1][layers_L], deficit[-1][layers_L] = self._cost_L, self._deficit_L()
            largest[-1][layers_L] = self._rank_load.max(axis=1)
            changed.append(np.full((len(start_LP), 4), NO_SLOT))
            changed[-1][layers_L] = moves_L4
        changed_LN4 = np.stack(changed, axis=1) if changed else np.zeros((len(start_LP), 0, 4), dtype=np.int64)
        return SearchPath(start_LP, changed_LN4, np.stack(cost), np.stack(largest), np.stack(deficit))

    def _narrow(self, kept_L: BoolArray) -> None:
        self._load, self._held, self._counts = self._load[kept_L], self._held[kept_L], self._counts[kept_L]
        self._is_held, self._on_host, self._cost_L = self._is_held[kept_L], self._on_host[kept_L], self._cost_L[kept_L]
        self._layers = np.arange(len(self._load))
        self._column_L = self._column_L[: len(self._load)]

    def _count_on_hosts(self) -> IntArray:
        """[L, H, E + 1] copies; the last column says 2, so that EMPTY never lacks coverage."""
        hosts = range(int(self._host_R.max()) + 1) if self._has_hosts else range(0)
        on_host = [self._is_held[:, self._host_R == host].sum(axis=1, dtype=np.int64) for host in hosts]
        if not on_host:
            return np.zeros((len(self._layers), 0, self._num_experts + 1), dtype=np.int64)
        counted = np.stack(on_host, axis=1)
        counted[:, :, self._num_experts] = 2
        return counted

    def _deficit_L(self) -> FloatArray:
        """Experts with one copy, and once more those on one host where there are several."""
        single = (self._counts == 1).sum(axis=1)
        if self._has_hosts:
            single = single + (self._num_hosts == 1).sum(axis=1)
        return np.asarray(single, dtype=np.float64)

    def _weigh(self) -> None:
        """Loads under the present placement, and what a copy less or more of an expert does to its other holders."""
        counts, load, flat = self._counts, self._load, self._column_L + self._held
        share = load / np.maximum(counts, 1.0)
        self._share_if_more = load / (counts + 1.0)
        rise = load / np.maximum(counts - 1.0, 1.0) - share
        self._slot_share = share.take(flat)
        by_rank = self._slot_share.reshape(-1, self._num_ranks, self._width)
        self._rank_load = by_rank[:, :, 0].copy()
        for local in range(1, self._width):  # one after the other: the order of a sum is part of its value
            self._rank_load += by_rank[:, :, local]
        self._rank_cost = power8(self._rank_load)
        load_P = np.repeat(self._rank_load, self._width, axis=1)
        cost_P = np.repeat(self._rank_cost, self._width, axis=1)
        harm_P = power8(load_P + rise.take(flat)) - cost_P
        relief_P = power8(load_P - (share - self._share_if_more).take(flat)) - cost_P
        size = counts.size
        harm = np.bincount(flat.ravel(), harm_P.ravel(), size).reshape(counts.shape)
        self._relief = np.bincount(flat.ravel(), relief_P.ravel(), size).reshape(counts.shape)
        self._left_P = load_P - self._slot_share
        # Cost of a slot's rank losing its share is valued with what replaces it; this is the rest.
        self._rest_P = harm.take(flat) - harm_P - cost_P
        self._can_go_P = (counts.take(flat) > 1.5) & self._exists_P
        if self._has_hosts:
            self._num_hosts = (self._on_host > 0).sum(axis=1)

    def _improve(self, most_L: IntArray) -> tuple[BoolArray, IntArray]:
        """Makes one move in each layer that has a good one; says in which, and which slots hold what now."""
        slot_L, expert_L, replace_L = self._best_replace()
        from_L, to_L, swap_L = self._best_swap()
        swap_cost_L = 2 - (self._held[self._layers, to_L] == self._num_experts)
        can_swap_L = self._cost_L + swap_cost_L <= most_L
        use_swap_L = can_swap_L & (swap_L / swap_cost_L < replace_L)
        gain_L = np.where(use_swap_L, swap_L, replace_L)
        cost_L = np.where(use_swap_L, swap_cost_L, 1)
        good_L = (gain_L < -_LEAST_GAIN) & (self._cost_L + cost_L <= most_L)
        replacing, swapping = self._layers[good_L & ~use_swap_L], self._layers[good_L & use_swap_L]
        moves_L4 = np.full((len(good_L), 4), NO_SLOT)
        moves_L4[replacing, 0], moves_L4[replacing, 1] = slot_L[replacing], expert_L[replacing]
        self._put(replacing, slot_L[replacing], expert_L[replacing])
        first, second = self._held[swapping, from_L[swapping]], self._held[swapping, to_L[swapping]]
        moves_L4[swapping] = np.stack([from_L[swapping], second, to_L[swapping], first], axis=1)
        self._put(swapping, from_L[swapping], second)
        self._put(swapping, to_L[swapping], first)
        self._cost_L += np.where(good_L, cost_L, 0)
        return np.asarray(good_L), moves_L4

    def _put(self, layer_N: IntArray, slot_N: IntArray, new_N: IntArray) -> None:
        old_N, rank_N, empty = self._held[layer_N, slot_N], self._rank_P[slot_N], self._num_experts
        self._held[layer_N, slot_N] = new_N
        self._counts[layer_N, old_N] -= 1.0
        self._counts[layer_N, new_N] += 1.0
        self._counts[:, empty] = 2.0
        self._is_held[layer_N, rank_N, old_N] = False
        self._is_held[layer_N, rank_N, new_N] = True
        self._is_held[:, :, empty] = False
        if self._has_hosts:
            self._on_host[layer_N, self._host_R[rank_N], old_N] -= 1
            self._on_host[layer_N, self._host_R[rank_N], new_N] += 1
            self._on_host[:, :, empty] = 2

    def _best_replace(self) -> tuple[IntArray, IntArray, FloatArray]:
        """Slot, expert and change (inf if there is none), [L] each."""
        layers, counts, num_slots = self._layers[:, None], self._counts, self._held.shape[1]
        Q, K = min(NUM_SLOTS, num_slots), min(NUM_EXPERTS, self._num_experts)
        lost_P = self._price * self._lost_coverage_P()
        least_P = np.where(self._can_go_P, self._rest_P + power8(self._left_P) + lost_P, np.inf)
        slot_LQ = _smallest(least_P, Q)
        hope = self._relief - self._price * (counts == 1)
        hope[counts == 0] = np.inf
        expert_LK = _smallest(hope[:, : self._num_experts], K)
        rank_LQ = self._rank_P[slot_LQ]
        slot_flat, expert_flat = layers * num_slots + slot_LQ, self._column_L + expert_LK
        left_LQ, added_LK = self._left_P.take(slot_flat), self._share_if_more.take(expert_flat)
        change = power8(left_LQ[:, :, None] + added_LK[:, None, :])
        least_LQ = least_P.take(slot_flat) - power8(left_LQ)  # inf where the slot must stay
        change += least_LQ[:, :, None]
        change += hope.take(expert_flat)[:, None, :]
        if self._has_hosts:
            # What a copy on another host is worth beyond a second copy.
            host_flat = (layers * self._on_host.shape[1] + self._host_R[rank_LQ]) * counts.shape[1]
            is_new_host = self._on_host.take(host_flat[:, :, None] + expert_LK[:, None, :]) == 0
            change -= is_new_host * (self._price * (self._num_hosts.take(expert_flat) == 1))[:, None, :]
        held_flat = (layers * self._num_ranks + rank_LQ) * counts.shape[1]
        change[self._is_held.take(held_flat[:, :, None] + expert_LK[:, None, :])] = np.inf
        flat = change.reshape(len(self._layers), -1)
        best_L = flat.argmin(axis=1)
        slot_L, expert_L = slot_LQ[self._layers, best_L // K], expert_LK[self._layers, best_L % K]
        return slot_L, expert_L, flat[self._layers, best_L]

    def _lost_coverage_P(self) -> FloatArray:
        """Deficit that arises when a slot's copy goes."""
        is_second = (self._counts == 2).astype(np.float64)
        is_second[:, self._num_experts] = 0.0
        lost = is_second.take(self._column_L + self._held)
        if self._has_hosts:
            is_last_of_two = (self._on_host == 1) & (self._num_hosts == 2)[:, None, :]
            flat = self._layers[:, None] * self._on_host.shape[1] + self._host_R[self._rank_P]
            lost += is_last_of_two.take(flat * is_second.shape[1] + self._held)
        return np.asarray(lost)

    def _best_swap(self) -> tuple[IntArray, IntArray, FloatArray]:
        """Slot of the heaviest rank, slot of a light one and change (inf if there is none), [L] each."""
        layers, width = self._layers, self._width
        heavy_L = self._rank_load.argmax(axis=1)
        light_LM = self._light_ranks(heavy_L)
        M = light_LM.shape[1]
        from_LS = heavy_L[:, None] * width + np.arange(width)
        to_LMS = light_LM[:, :, None] * width + np.arange(width)
        index = layers[:, None]
        given_LS, taken_LMS = self._held[index, from_LS], self._held[index[:, :, None], to_LMS]
        moved = self._slot_share[index, from_LS][:, :, None, None]
        moved = moved - self._slot_share[index[:, :, None], to_LMS][:, None]
        change = power8(self._rank_load[layers, heavy_L][:, None, None, None] - moved)
        moved += self._rank_load[index, light_LM][:, None, :, None]
        change += power8(moved)
        change -= (self._rank_cost[index, light_LM] + self._rank_cost[index, heavy_L[:, None]])[:, None, :, None]
        bad_given = self._is_held[index[:, :, None], light_LM[:, None, :], given_LS[:, :, None]]
        bad_given |= ~self._exists_P[from_LS][:, :, None] | (light_LM == heavy_L[:, None])[:, None, :]
        bad_taken = self._is_held[index[:, :, None], heavy_L[:, None, None], taken_LMS] | ~self._exists_P[to_LMS]
        if self._has_hosts and self._price:
            change += self._price * self._host_change(heavy_L, light_LM, given_LS, taken_LMS)
        change[bad_given[:, :, :, None] | bad_taken[:, None]] = np.inf
        flat = change.reshape(len(layers), -1)
        best_L = flat.argmin(axis=1)
        slots = M * width
        to_L = to_LMS.reshape(len(layers), -1)[layers, best_L % slots]
        return from_LS[layers, best_L // slots], to_L, flat[layers, best_L]

    def _light_ranks(self, heavy_L: IntArray) -> IntArray:
        """[L, M]: the lightest, and the lightest on the host of the heaviest: there a swap costs no coverage."""
        M = min(NUM_LIGHT - self._has_hosts, self._num_ranks)
        light_LM = _smallest(self._rank_load, M)
        if not self._has_hosts:
            return light_LM
        elsewhere = self._host_R[None, :] != self._host_R[heavy_L][:, None]
        here_LM = _smallest(self._rank_load + self._num_ranks * elsewhere, M)
        return np.concatenate([light_LM, here_LM], axis=1)

    def _host_change(
        self, heavy_L: IntArray, light_LM: IntArray, given_LS: IntArray, taken_LMS: IntArray
    ) -> FloatArray:
        """[L, S, M, S]: how many more experts a swap leaves on one host."""
        index = self._layers[:, None, None]
        heavy_host = self._host_R[heavy_L][:, None, None]
        light_host_LM = self._host_R[light_LM]
        elsewhere_LM = light_host_LM != heavy_host[:, :, 0]
        given, light_host = given_LS[:, :, None], light_host_LM[:, None, :]
        given_change = self._moved_deficit(index, given, heavy_host, light_host) * elsewhere_LM[:, None, :]
        taken_change = self._moved_deficit(index, taken_LMS, light_host_LM[:, :, None], heavy_host)
        taken_change = taken_change * elsewhere_LM[:, :, None]
        return np.asarray(given_change[:, :, :, None] + taken_change[:, None], dtype=np.float64)

    def _moved_deficit(self, layer: IntArray, expert: IntArray, source: IntArray, target: IntArray) -> IntArray:
        size, hosts = self._num_experts + 1, self._on_host.shape[1]
        num_hosts = self._num_hosts.take(layer * size + expert)
        is_last = self._on_host.take((layer * hosts + source) * size + expert) == 1
        is_first = self._on_host.take((layer * hosts + target) * size + expert) == 0
        # EMPTY counts two on every host, so it is neither.
        return np.asarray((num_hosts - is_last + is_first < 2).astype(np.int64) - (num_hosts < 2))


def _smallest(values: FloatArray, count: int) -> IntArray:
    """Where the smallest of each row are, smallest first, and of equal ones the first."""
    return np.argsort(values, axis=1, kind="stable")[:, :count]


def to_placement(held_LP: IntArray, num_ranks: int, num_logical_experts: int) -> IntArray:
    held_LRS = held_LP.reshape(len(held_LP), num_ranks, -1)
    return np.where(held_LRS == num_logical_experts, EMPTY, held_LRS)
