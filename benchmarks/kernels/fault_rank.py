"""What a rank does while its peers are killed: replays one captured graph through all views.

The graph: NUM_LAYERS of (dispatch, reduced combine), then a barrier; at the middle layer, and before the barrier, the
gates at which a victim can be made to stop.

Legend: W ranks, T tokens, K top_k, H hidden_size.
"""

import threading
import time
from typing import Any

import torch

from benchmarks.kernels.gate import Gate
from benchmarks.kernels.timing_rank import TimingRank

NUM_LAYERS = 32


class FaultRank(TimingRank):
    def prepare_layers(self, variant: str, num_tokens: int, deadline_s: float) -> None:
        """Loads the kernels (a void rank's do nothing) and captures the graph, so it needs no peer and no epoch."""
        self.use_plan(None)
        group, batch, rows = self.groups[variant][0], self.batch(num_tokens), self.random_rows(False)
        self.fault_group, self.kept_layers = group, (batch, rows, batch.rank_TK.clone())
        for each in self.groups[variant]:
            each.set_deadline(deadline_s)
            each._state.set_barrier_deadline(deadline_s)
        gate = self.gate = self.make_gate(variant)
        launch = group.launch

        def layers(number: int) -> None:
            for layer in range(number):
                stops = layer == number // 2
                if stops:
                    gate.launch("before_dispatch")
                launch.dispatch(batch.x_TH, batch.rank_TK, batch.local_TK, batch.weight_TK)
                if stops:
                    gate.launch("between")
                    gate.launch("partial_combine")
                launch.combine(rows, batch.out_TH, False)
            gate.launch("before_barrier")
            launch.barrier()

        if group.void_reason() is not None:
            layers(1)
        torch.cuda.synchronize()
        self.layers = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.layers):
            layers(NUM_LAYERS)
        torch.cuda.synchronize()

    def make_gate(self, variant: str) -> Gate:
        """In a partial combine half of the rows for the first rank are out; with more than two ranks its word too."""
        group, first = self.groups[variant][0], 0 if self.rank else 1
        if first not in self.peers:
            return Gate(group, (0, 0), 0)
        heap = self.peers[first][list(self.groups).index(variant) * len(self.groups[variant])].address
        regions, ep = group.layout.regions, self.ep
        row_words = ep.top_k * ep.hidden_size // 2
        rows = heap + regions["ep_combine_rows"].offset + self.rank * ep.max_tokens * row_words * 4
        word = heap + regions["ep_combine_word"].offset + self.rank * 8
        return Gate(group, (rows, 16 * row_words), word if self.num_ranks > 2 else 0)

    def replay_layers(self, number: int) -> float:
        """Median milliseconds of a replay; all must be clean."""
        took = []
        for _ in range(number):
            begin = time.perf_counter()
            self.layers.replay()
            torch.cuda.synchronize()
            took.append((time.perf_counter() - begin) * 1e3)
        if self.fault_group.void_reason() is not None:
            raise RuntimeError(f"void: {self.void_reasons()} {self.fault_group.observation_mask().tolist()}")
        return sorted(took)[number // 2]

    def replay_to_point(self, point: str, after: int) -> int:
        """Replay, and stop at the point in the replay number ``after``: returns when the device waits there."""
        for number in range(1 << 30):
            if number == after:
                self.gate.arm(point)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.layers.replay()
            done.record()
            while not done.query():  # type: ignore[no-untyped-call]
                if self.gate.is_reached:
                    return number
        raise AssertionError

    def replay_until_void(self, limit_s: float) -> dict[str, Any]:
        group, give_up = self.fault_group, time.perf_counter() + limit_s
        number, waited_ns = 0, group.wait_ns_by_source()
        while time.perf_counter() < give_up:
            begin = time.perf_counter()
            self.layers.replay()
            reason = group.void_reason()
            number += 1
            if reason is not None:
                torch.cuda.synchronize()
                took_ms = (time.perf_counter() - begin) * 1e3
                again = time.perf_counter()
                self.layers.replay()
                torch.cuda.synchronize()
                return {
                    "replays": number,
                    "void_replay_ms": round(took_ms, 2),
                    "next_void_replay_ms": round((time.perf_counter() - again) * 1e3, 3),
                    "reason": reason.value,
                    "observed": group.observation_mask().tolist(),
                    "waited_ms": ((group.wait_ns_by_source() - waited_ns) / 1e6).round().tolist(),
                }
        raise RuntimeError("the group never became void")

    def replay_until_masked(self, limit_s: float, number_after: int) -> dict[str, Any]:
        """In mode ALONE: replay until somebody is masked, then go on; what came of this rank's own experts is exact."""
        group, give_up = self.fault_group, time.perf_counter() + limit_s
        batch, rows, _ = self.kept_layers
        while time.perf_counter() < give_up:
            begin = time.perf_counter()
            self.layers.replay()
            torch.cuda.synchronize()
            took_ms = (time.perf_counter() - begin) * 1e3
            masked = group.query_mask_buffer().tolist()
            if any(masked):
                after_ms = self.replay_layers(number_after)
                held_T = (batch.rank_TK == self.rank).any(1)
                wanted = torch.where(held_T[:, None], rows[self.rank, : len(held_T)], 0)
                only_own = sum(masked) == self.num_ranks - 1
                return {
                    "masking_replay_ms": round(took_ms, 2),
                    "replay_ms_after": round(after_ms, 3),
                    "masked": masked,
                    "is_exact": bool(torch.equal(batch.out_TH, wanted)) if only_own else None,
                }
        raise RuntimeError("nobody was masked")

    def poisoned_by_host(self, after_s: float) -> dict[str, Any]:
        """Replay with a peer that does nothing; another thread poisons."""
        group, epoch = self.fault_group, self.fault_group.epoch
        timer = threading.Timer(after_s, lambda: group.poison_self(epoch))
        begin = time.perf_counter()
        self.layers.replay()
        timer.start()
        reason = group.void_reason()
        timer.join()
        took_ms = (time.perf_counter() - begin) * 1e3
        return {"took_ms": round(took_ms, 2), "reason": str(reason), "observed": group.observation_mask().tolist()}

    def reroute(self, members: list[int]) -> None:
        """Send the captured graph's tokens to members only, as routing by a new placement does."""
        batch, _, rank_TK = self.kept_layers
        batch.rank_TK.copy_(torch.tensor(members, device="cuda", dtype=torch.int32)[rank_TK.long() % len(members)])
