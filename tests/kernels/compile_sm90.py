"""Compile every kernel for sm_90, with no GPU: ``python -m tests.kernels.compile_sm90`` prints a line of JSON each."""

import json
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.heap_layout import EpShape, HeapLayout
from kernels.triton_combine import combine_kernel
from kernels.triton_control import allgather_kernel, announce_kernel, barrier_kernel, poison_kernel
from kernels.triton_dispatch import dispatch_kernel
from kernels.triton_wait import ALONE, BARE, VIEWS

LAYOUT = HeapLayout.build(EpShape(2, 128, 8, 7168, dtype=torch.bfloat16))
NUM_WARPS = 4
POINTERS = {
    "ctl": "*i64",
    "load_WL": "*i64",
    "flags": "*i32",
    "words_N": "*i64",
    "out_WN": "*i64",
    "x_TH": "*bf16",
    "rows": "*bf16",
    "out_TH": "*bf16",
    "rank_TK": "*i32",
    "local_TK": "*i32",
    "weight_TK": "*fp32",
}
INTEGERS = ("num_tokens", "rank", "reason", "step_in", "step_out", "step", "digest", "member_bits")
LONG_INTEGERS = ("step", "digest", "member_bits")


def constants(**more: Any) -> dict[str, Any]:
    ep = LAYOUT.ep
    offset = {name: region.offset for name, region in LAYOUT.regions.items()}
    return {
        "W": ep.max_ranks,
        "WP": ep.max_ranks,
        "N": ep.num_header_words,
        "NP": 16,
        "M": ep.max_tokens,
        "K": ep.top_k,
        "KP": ep.top_k,
        "H": ep.hidden_size,
        "ROW_WORDS": ep.row_bytes // 4,
        "X_WORD": ep.row_header_words,
        "POISON": offset["ep_poison"],
        "HEADER": offset["ep_header"],
        "BARRIER": offset["ep_barrier_word"],
        "DISPATCH_WORDS": offset["ep_dispatch_word"],
        "DISPATCH_ROWS": offset["ep_dispatch_rows"],
        "NT": 32 * NUM_WARPS,
        "PART": 1024,
        "OVERLAP": True,
        "MODE": VIEWS.value,
        "L": 128,
        "SCALE_WORD": ep.scale_word,
        "IS_FP8": False,
        **more,
    }


def compile_one(kernel: Any, name: str, **more: Any) -> None:
    values = constants(**more)
    names = kernel.arg_names
    integers = {n: "i64" if n in LONG_INTEGERS else "i32" for n in INTEGERS}
    signature = {n: POINTERS.get(n) or integers.get(n, "constexpr") for n in names}
    compiled = triton.compile(
        ASTSource(
            fn=kernel,
            signature=signature,
            constexprs={(names.index(n),): values[n] for n in names if signature[n] == "constexpr"},
            attrs={(names.index(n),): [["tt.divisibility", 16]] for n in names if signature[n].startswith("*")},
        ),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": NUM_WARPS, "enable_fp_fusion": False, "launch_pdl": True},
    )
    ptx = compiled.asm["ptx"]
    facts = {
        "wide_stores": ptx.count("st.global.v4"),
        "wide_loads": ptx.count("ld.global.v4"),
        "acquire_loads": ptx.count("ld.acquire.sys"),
        "release_words": ptx.count("atom.global.sys.release.exch.b64"),
        "sass_bytes": len(compiled.asm["cubin"]),
    }
    print(json.dumps({"kernel": name, **facts}), flush=True)


def main() -> None:
    offset = {name: region.offset for name, region in LAYOUT.regions.items()}
    dispatch = {"WORDS": offset["ep_dispatch_word"], "ROWS": offset["ep_dispatch_rows"]}
    combine = {"WORDS": offset["ep_combine_word"], "ROWS": offset["ep_combine_rows"]}
    compile_one(dispatch_kernel, "dispatch", **dispatch)
    compile_one(dispatch_kernel, "dispatch_fp8", **dispatch, IS_FP8=True, PART=4096)
    for name, mode in (("", VIEWS), ("_alone", ALONE), ("_bare", BARE)):
        compile_one(combine_kernel, f"combine_ordered{name}", ORDERED=True, **combine, MODE=mode.value)
    compile_one(combine_kernel, "combine_reduced", ORDERED=False, **combine)
    compile_one(dispatch_kernel, "dispatch_bare", **dispatch, MODE=BARE.value)
    compile_one(dispatch_kernel, "dispatch_alone", **dispatch, MODE=ALONE.value)
    compile_one(combine_kernel, "combine_reduced_alone", ORDERED=False, **combine, MODE=ALONE.value)
    compile_one(allgather_kernel, "allgather")
    compile_one(allgather_kernel, "allgather_alone", MODE=ALONE.value)
    compile_one(announce_kernel, "announce")
    compile_one(barrier_kernel, "barrier")
    compile_one(poison_kernel, "poison")


if __name__ == "__main__":
    main()
