"""Compile the expert MLP for sm_90, with no GPU: ``python -m tests.kernels.compile_experts_sm90`` prints a line of JSON
for each kernel and model.
"""

import json
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.expert_plan import ROW_BLOCK, ProductPlan, plan_experts
from kernels.heap_layout import EpShape, HeapLayout
from kernels.triton_experts import down_kernel, gate_up_kernel, list_entries_kernel, sum_rows_kernel

# name, hidden_size, intermediate_size, local experts, top_k, ranks
MODELS = (
    ("DeepSeek-V2-Lite", 2048, 1408, 32, 6, 2),
    ("Qwen3-30B-A3B", 2048, 768, 64, 8, 2),
    ("DeepSeek-V3", 7168, 2048, 32, 8, 8),
)
_WORDS = ("flags", "counts_E", "entry_EC")
_INTEGERS = ("rank", "num_experts")


def compile_one(kernel: Any, name: str, plan: ProductPlan | None, values: dict[str, Any]) -> None:
    names = kernel.arg_names
    descriptor = f"tensordesc<bf16[{plan.block},{plan.block_k}]>" if plan and plan.tma else "constexpr"
    if plan:
        sizes = {"BN": plan.block, "BK": plan.block_k, "TMA": plan.tma}
        values = {**values, **sizes, "gate_up_descriptor": None, "down_descriptor": None}

    def kind(name: str) -> str:
        if name in _WORDS:
            return "*i32"
        if name in _INTEGERS:
            return "i32"
        if name.endswith("_descriptor"):
            return descriptor
        return "i64" if name == "heap" else "constexpr" if name in values else "*bf16"

    signature = {n: kind(n) for n in names}
    aligned = [n for n in names if signature[n].startswith("*") or n == "heap"]
    compiled = triton.compile(
        ASTSource(
            fn=kernel,
            signature=signature,
            constexprs={(names.index(n),): values[n] for n in names if signature[n] == "constexpr"},
            attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
        ),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 4, "num_stages": plan.num_stages if plan else 3, "launch_pdl": True},
    )
    ptx = compiled.asm["ptx"]
    facts = {
        "matrix_instructions": ptx.count("wgmma.mma_async"),
        "tile_copies": ptx.count("cp.async.bulk.tensor"),
        "row_copies": ptx.count("cp.async.cg.shared.global"),
        "shared_bytes": compiled.metadata.shared,
        "programs": plan.programs_per_processor if plan else 1,
        "local_memory": ptx.count(".local"),
        "waits_for_predecessor": ptx.count("griddepcontrol.wait"),
    }
    print(json.dumps({"kernel": name, **facts}), flush=True)


def main() -> None:
    for model, hidden, intermediate, num_local, top_k, ranks in MODELS:
        ep = EpShape(ranks, 128, top_k, hidden, dtype=torch.bfloat16)
        layout = HeapLayout.build(ep)
        plan = plan_experts(hidden, intermediate, on_gpu=True)
        values = {
            "W": ranks,
            "M": ep.max_tokens,
            "K": top_k,
            "H": hidden,
            "I": intermediate,
            "C": ranks * ep.max_tokens * top_k,
            "ROW_WORDS": ep.row_bytes // 4,
            "X_WORD": ep.row_header_words,
            "SCALE_WORD": ep.scale_word,
            "FP8": False,
            "DISPATCH_WORDS": layout.regions["ep_dispatch_word"].offset,
            "DISPATCH_ROWS": layout.regions["ep_dispatch_rows"].offset,
            "ROWS": ROW_BLOCK,
            "WP": ranks,
            "EP": num_local,
            "CHUNK": 1024,
            "PART": 1024,
            "OVERLAP": True,
            "AHEAD": plan.ahead,
        }
        compile_one(gate_up_kernel, f"{model} gate_up", plan.gate_up, values)
        compile_one(down_kernel, f"{model} down", plan.down, values)
        if model == MODELS[-1][0]:  # little of these depends on the model
            compile_one(gate_up_kernel, "float8 rows", plan.gate_up, {**values, "FP8": True})
            compile_one(list_entries_kernel, f"{model} list", None, values)
            compile_one(sum_rows_kernel, f"{model} sum", None, values)


if __name__ == "__main__":
    main()
