"""Correctness of one rank's results, on fresh random tokens.

Legend: W ranks, M max_tokens, T tokens, K top_k, H hidden_size.
"""

import torch

from benchmarks.kernels.bench_rank import Batch, BenchRank
from kernels.device_group import DeviceGroup
from kernels.fp8 import dequantise, quantise


class CheckRank(BenchRank):
    def check(self, num_tokens: int, drop: float, variant: str) -> dict[str, float]:
        """Relative errors against float64; elements in which the ordered result differs from torch's sum; bytes in
        which float8 rows differ from torch's quantisation; entries that the load counters miss.
        """
        results: dict[str, float] = {}
        for ordered, group in zip((False, True), self.groups[variant], strict=True):
            batch = self.batch(num_tokens, drop)
            before = group.expert_load()
            group.dispatch(batch.x_TH, batch.rank_TK, batch.local_TK, batch.weight_TK)
            if variant == "fp8":
                results["wrong_fp8_bytes"] = self.wrong_fp8_bytes(group, batch)
            group.combine(self.fake_experts(group, ordered), batch.out_TH, ordered=ordered)
            reason = group.void_reason()
            if reason is not None:
                raise RuntimeError(f"void: {reason.value}")
            results |= self.compare(batch, ordered, variant)
            sent = (batch.rank_TK >= 0).flatten()
            place = (batch.rank_TK * self.num_local + batch.local_TK).flatten()[sent].long()
            wanted = torch.bincount(place, minlength=self.num_experts).cpu()
            got = (group.expert_load() - before).flatten()[: self.num_experts]
            results["wrong_load"] = float((got != wanted).sum())
        return results

    def check_graph(self, num_tokens: int) -> dict[str, float]:
        """Three layers in one captured graph, replayed with other tokens, weights and routing each time."""
        group, batch = self.groups["views"][0], self.batch(num_tokens)
        self.layer(group, batch)  # warms up
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(3):
                self.layer(group, batch)
        worst = 0.0
        for _ in range(5):
            fresh = self.batch(num_tokens, drop=0.2)
            for name in ("x_TH", "rank_TK", "local_TK", "weight_TK", "out_TH"):
                getattr(batch, name).copy_(getattr(fresh, name))
            graph.replay()
            if group.void_reason() is not None:
                raise RuntimeError(f"void: {self.void_reasons()}")
            worst = max(worst, self.compare(batch, True, "views")["wrong_bits"])
        return {"wrong_bits": worst}

    def layer(self, group: DeviceGroup, batch: Batch) -> None:
        group.dispatch(batch.x_TH, batch.rank_TK, batch.local_TK, batch.weight_TK)
        group.combine(self.fake_experts(group, True), batch.out_TH, ordered=True)

    def fake_experts(self, group: DeviceGroup, ordered: bool) -> torch.Tensor:
        """Expert e multiplies by 1 + e / experts. Rows that nobody sent are NaN."""
        ep = group.layout.ep
        header = group.row_header_WMC
        code_WMK = header[:, :, 1 : 1 + ep.top_k]
        weight_WMK = header[:, :, 1 + ep.top_k :].contiguous().view(torch.float32)
        mine = (code_WMK >> 16) == self.rank
        rows = torch.arange(ep.max_tokens, device="cuda")
        member = torch.arange(ep.max_ranks, device="cuda") < self.num_ranks
        arrived = (rows[None] < group.num_rows_W[:, None]) & member[:, None]
        mine &= arrived[:, :, None]
        factor = 1 + ((code_WMK & 0xFFFF) + self.rank * self.num_local) / self.num_experts
        x_WMH = group.row_x_WMH.float()
        if ep.is_fp8:
            x_WMH *= group.row_scale_WMG.repeat_interleave(128, dim=2)
        nan = torch.full((), float("nan"), device="cuda")
        if ordered:
            y_WMKH = (x_WMH[:, :, None] * factor[..., None]).to(ep.dtype)
            return torch.where(mine[..., None], y_WMKH, nan.to(ep.dtype))
        total = torch.where(mine, factor * weight_WMK, 0).sum(-1, keepdim=True)
        return torch.where(mine.any(-1, keepdim=True), (x_WMH * total).to(ep.dtype), nan.to(ep.dtype))

    def compare(self, batch: Batch, ordered: bool, variant: str) -> dict[str, float]:
        x_TH = dequantise(*quantise(batch.x_TH)) if variant == "fp8" else batch.x_TH.float()
        expert_TK = batch.rank_TK * self.num_local + batch.local_TK
        factor_TK = torch.where(batch.rank_TK >= 0, 1 + expert_TK / self.num_experts, 0)
        exact = x_TH.double() * (factor_TK.double() * batch.weight_TK.double()).sum(-1, keepdim=True)
        error = float((batch.out_TH.double() - exact).norm()) / (float(exact.norm()) or 1.0)
        if not ordered:
            return {"reduced": error}
        total = torch.zeros_like(x_TH)
        for k in range(self.ep.top_k):
            row = (x_TH * factor_TK[:, k, None]).to(self.ep.dtype).float()
            sent = (batch.rank_TK[:, k] >= 0)[:, None]
            total = torch.where(sent, total + batch.weight_TK[:, k, None] * row, total)
        return {"ordered": error, "wrong_bits": float((total.to(batch.out_TH.dtype) != batch.out_TH).sum())}

    def wrong_fp8_bytes(self, group: DeviceGroup, batch: Batch) -> float:
        """In what dispatch left of the own tokens in the own heap."""
        held_T = (batch.rank_TK == self.rank).any(1)
        q_TH, scale_TG = quantise(batch.x_TH)
        got_q = group.row_x_WMH[self.rank, : len(held_T)].contiguous().view(torch.uint8)[held_T]
        got_scale = group.row_scale_WMG[self.rank, : len(held_T)].contiguous().view(torch.int32)[held_T]
        wrong_q = (got_q != q_TH.view(torch.uint8)[held_T]).sum()
        return float(wrong_q + (got_scale != scale_TG.view(torch.int32)[held_T]).sum())
