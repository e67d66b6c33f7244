# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, possibly-undefined"
"""The combine kernel. PROTOCOL 1.1, 2.1 to 2.3; ``kernels.reference`` says what it computes, ``triton_dispatch`` how
the rows lie.

Legend: W max_ranks, M max_tokens, T tokens, K top_k, KP the next power of two, H hidden_size, PART elements of a row
that one program moves at a time, NT threads of a program.
"""

import triton
import triton.language as tl
from triton.language.extra import cuda

from kernels.triton_dispatch import DROPPED
from kernels.triton_wait import (
    ALONE,
    CLEAN,
    DEADLINE_NS,
    RENORMALISE,
    TABLE,
    arrive,
    await_words,
    bits_of,
    is_member,
    peers_of,
    publish,
    status,
    wait_limits,
)


@triton.jit(do_not_specialize=["num_tokens", "rank", "step_in", "step_out"])
def combine_kernel(
    ctl,
    flags,
    rows,
    out_TH,
    num_tokens,
    rank,
    step_in,
    step_out,
    ORDERED: tl.constexpr,
    W: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    H: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    POISON: tl.constexpr,
    DISPATCH_WORDS: tl.constexpr,
    DISPATCH_ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    ROWS: tl.constexpr,
    PART: tl.constexpr,
    NT: tl.constexpr,
    OVERLAP: tl.constexpr,
    MODE: tl.constexpr,
):
    """Grid (P,), all programs resident at once: send rows back, then wait and add up.

    rows [W, M, K, H] (ORDERED: one row per entry) or [W, M, H] (weighted and summed over the experts of this rank),
    where dispatch left the tokens; those of its own tokens a rank reads in place. Void: out_TH stays as it is.
    """
    if OVERLAP:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    PARTS: tl.constexpr = (H + PART - 1) // PART
    dtype = rows.dtype.element_ty
    pid = tl.program_id(0)
    num_programs = tl.num_programs(0)
    j = tl.arange(0, NT)
    k = tl.arange(0, KP)
    void = status(flags, MODE)
    step = tl.load(ctl + step_in) + 1
    me = tl.load(ctl + TABLE + rank)
    deadline_ns, floor = wait_limits(ctl, DEADLINE_NS, MODE)
    peers = peers_of(flags, rank, j, W, MODE)
    received = (me + DISPATCH_ROWS).to(tl.pointer_type(tl.int32))
    for distance in tl.static_range(1, W):
        source = (rank + distance) % W
        to = is_member(flags, source, MODE) & (void == CLEAN)
        theirs = tl.load(ctl + TABLE + source) + ROWS
        count = tl.load((me + DISPATCH_WORDS).to(tl.pointer_type(tl.int64)) + source * 2 + 1).to(tl.int32)
        num_rows = tl.where(to, tl.minimum(count, M), 0)
        item = pid
        while item < num_rows * PARTS:
            r = item // PARTS
            h = (item % PARTS) * PART + tl.arange(0, PART)
            row = received + (source * M + r).to(tl.int64) * ROW_WORDS
            token = tl.load(row)
            code_K = tl.load(row + 1 + k, mask=k < K, other=-1)
            mine_K = (code_K >> 16) == rank
            first = ((rank * M + token) * K).to(tl.int64) * H
            place = theirs.to(tl.pointer_type(dtype)) + first
            if ORDERED:
                inside = mine_K[:, None] & (h < H)[None, :]
                from_KH = rows + ((source * M + r) * K + k[:, None]).to(tl.int64) * H + h[None, :]
                tile = tl.load(from_KH, mask=inside, other=0.0)
                place_KH = place + k[:, None].to(tl.int64) * H + h[None, :]
                tl.store(tl.multiple_of(place_KH, (16, 16)), tile, mask=inside)
            else:
                inside_H = (h < H) & (tl.sum(tl.where(mine_K, 1, 0)) > 0)
                line = tl.load(rows + (source * M + r).to(tl.int64) * H + h, mask=h < H, other=0.0)
                tl.store(tl.multiple_of(place + h, (16,)), line, mask=inside_H)
            item += num_programs
    arrived = arrive(flags, void, num_programs)
    if arrived == 1:
        publish(ctl, peers, step, WORDS + rank * 8, j)
    if pid == 0:
        tl.store(ctl + step_out, step)
    complete = void * 0
    late_bits = step - step
    if (void == CLEAN) & ((pid < num_tokens * PARTS) | (pid == 0)):
        complete, late_bits = await_words(
            me, WORDS, 1, deadline_ns, floor, peers, step, ctl, flags, rank, j, pid == 0, W, POISON, MODE, True
        )
    if MODE == ALONE:
        usable_bits = bits_of((peers | (j == rank)) & (((late_bits >> tl.where(j < W, j, 0)) & 1) == 0), j)
        renormalises = tl.load(ctl + RENORMALISE) != 0
    item = pid
    while item < num_tokens * PARTS * complete:
        t = item // PARTS
        h = (item % PARTS) * PART + tl.arange(0, PART)
        row = received + (rank * M + t).to(tl.int64) * ROW_WORDS
        returned = me + ROWS
        total = tl.zeros([PART], tl.float32)
        if ORDERED:
            for i in tl.static_range(K):
                code = tl.load(row + 1 + i)
                weight = tl.load((row + 1 + K + i).to(tl.pointer_type(tl.float32)))
                owner = code >> 16
                here = code >= 0
                if MODE == ALONE:
                    here = here & (((usable_bits >> tl.where(here, owner, 0)) & 1) != 0)
                base = tl.where(owner == rank, rows.to(tl.int64), returned)
                place = base.to(tl.pointer_type(dtype)) + ((owner * M + t) * K + i).to(tl.int64) * H + h
                line = tl.load(tl.multiple_of(place, (16,)), mask=(h < H) & here, other=0.0)
                total = tl.where(here, total + weight * line.to(tl.float32), total)
        else:
            owner_K = tl.load(row + 1 + k, mask=k < K, other=-1) >> 16
            for owner in tl.static_range(W):
                base = tl.where(owner == rank, rows.to(tl.int64), returned)
                line_of_owner = tl.where(owner == rank, rank * M + t, (owner * M + t) * K).to(tl.int64)
                place = base.to(tl.pointer_type(dtype)) + line_of_owner * H + h
                held = tl.sum(tl.where(owner_K == owner, 1, 0)) > 0
                if MODE == ALONE:
                    held = held & (((usable_bits >> owner) & 1) != 0)
                line = tl.load(tl.multiple_of(place, (16,)), mask=(h < H) & held, other=0.0)
                total += line.to(tl.float32)
        if MODE == ALONE:
            total = tl.where(renormalises, total * weights_over_kept(row, usable_bits, K), total)
        tl.store(out_TH + t.to(tl.int64) * H + h, total.to(out_TH.dtype.element_ty), mask=h < H)
        item += num_programs


@triton.jit
def weights_over_kept(row, usable_bits, K: tl.constexpr):
    """(All weights of a token) / (those of entries whose ranks are there), [1]; 1 if none is left."""
    total = tl.zeros([1], tl.float32)
    kept = tl.zeros([1], tl.float32)
    for i in tl.static_range(K):
        code = tl.load(row + 1 + i)
        weight = tl.load((row + 1 + K + i).to(tl.pointer_type(tl.float32)))
        here = (code >= 0) & (((usable_bits >> tl.where(code >= 0, code >> 16, 0)) & 1) != 0)
        total += tl.where(code != DROPPED, weight, 0.0)
        kept += tl.where(here, weight, 0.0)
    return tl.where(kept != 0, tl.div_rn(total, tl.where(kept != 0, kept, 1.0)), 1.0)
