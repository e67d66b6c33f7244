# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, possibly-undefined"
"""The dispatch kernel. PROTOCOL 1.1, 1.2, 2.1 to 2.3; ``kernels.reference`` says what it computes.

A row is int32: token, K codes (rank << 16 | local expert, or DROPPED, LOST), K weights, padding, then at X_WORD x, or
its float8 bytes and at SCALE_WORD their scales. Row t of a rank's region is its token t, in the heap of every member:
who holds none of the token's experts gets the codes alone. That costs some bytes and saves a count of rows, an atomic
each, before the first store.

Everything a kernel needs to know is loaded before its first store, so that the loads overlap.

Legend: W max_ranks, M max_tokens, T tokens, K top_k, KP the next power of two, H hidden_size, L physical experts of a
rank, G groups of 128 elements, PART elements of a row that one program moves at a time, NT threads of a program.
"""

import triton
import triton.language as tl
from triton.language.extra import cuda

from kernels.triton_fp8 import quantise
from kernels.triton_wait import (
    BARE,
    CLEAN,
    DEADLINE_NS,
    LATE_IN_COMBINE,
    MASKED,
    MEMBER,
    MEMBER_OF_VIEW,
    TABLE,
    UNDECIDED,
    VOID_ROUTING,
    arrive,
    await_words,
    is_member,
    mark_void,
    peers_of,
    poison_peers,
    publish,
    status,
    wait_limits,
)

DROPPED = tl.constexpr(-1)
LOST = tl.constexpr(-2)  # with a masked rank: ``own_tokens.MASKED``


@triton.jit(do_not_specialize=["num_tokens", "rank", "step_in", "step_out"])
def dispatch_kernel(
    ctl,
    flags,
    load_WL,
    x_TH,
    rank_TK,
    local_TK,
    weight_TK,
    num_tokens,
    rank,
    step_in,
    step_out,
    W: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    H: tl.constexpr,
    L: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    X_WORD: tl.constexpr,
    SCALE_WORD: tl.constexpr,
    IS_FP8: tl.constexpr,
    POISON: tl.constexpr,
    WORDS: tl.constexpr,
    ROWS: tl.constexpr,
    PART: tl.constexpr,
    NT: tl.constexpr,
    OVERLAP: tl.constexpr,
    MODE: tl.constexpr,
):
    """Any grid (P,): programs share out (token, part of a row); the last to arrive publishes and waits. load_WL int64
    counts rows by physical expert; L = 0: nothing is counted."""
    if OVERLAP:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    PARTS: tl.constexpr = (H + PART - 1) // PART
    pid = tl.program_id(0)
    num_programs = tl.num_programs(0)
    j = tl.arange(0, NT)
    k = tl.arange(0, KP)
    void = status(flags, MODE)
    step = tl.load(ctl + step_in) + 1
    peers = peers_of(flags, rank, j, W, MODE)
    bad = void * 0
    item = pid
    while item < num_tokens * PARTS:
        t = item // PARTS
        part = item % PARTS
        if IS_FP8:
            group = part * (PART // 128) + tl.arange(0, PART // 128)
            h = group[:, None] * 128 + tl.arange(0, 128)[None, :]
            inside = (group < H // 128)[:, None]
        else:
            h = part * PART + tl.arange(0, PART)
            inside = h < H
        x = tl.load(x_TH + t.to(tl.int64) * H + h, mask=inside, other=0.0)
        rank_K = tl.load(rank_TK + t * K + k, mask=k < K, other=-1)
        local_K = tl.load(local_TK + t * K + k, mask=k < K, other=0)
        weight_K = tl.load(weight_TK + t * K + k, mask=k < K, other=0.0)
        if MODE == BARE:
            sent_K = rank_K >= 0
            code_K = tl.where(sent_K, (rank_K << 16) | local_K, DROPPED)
        else:
            sent_K = k < 0
            lost_K = k < 0
            for slot in tl.static_range(W):
                flag = tl.load(flags + MEMBER + slot)
                sent_K = sent_K | ((rank_K == slot) & (flag == MEMBER_OF_VIEW))
                lost_K = lost_K | ((rank_K == slot) & (flag == MASKED))
            code_K = tl.where(sent_K, (rank_K << 16) | local_K, tl.where(lost_K, LOST, DROPPED))
            known_K = sent_K | lost_K | (rank_K == -1)
            bad += tl.sum(tl.where((k < K) & (known_K == 0), 1, 0))
            if L > 0:
                bad += tl.sum(tl.where(sent_K & ((local_K < 0) | (local_K >= L)), 1, 0))
        if L > 0:
            counted_K = sent_K & (local_K >= 0) & (local_K < L) & (part == 0) & (void == CLEAN)
            tl.atomic_add(load_WL + rank_K.to(tl.int64) * L + local_K, 1, mask=counted_K, sem="relaxed", scope="gpu")
        if IS_FP8:
            payload, scale_G = quantise(x)
        else:
            payload = x
        for distance in tl.static_range(1, W + 1):
            destination = (rank + distance) % W
            to = is_member(flags, destination, MODE) & (void == CLEAN)
            heap = tl.load(ctl + TABLE + destination) + ROWS
            row = heap.to(tl.pointer_type(tl.int32)) + (rank * M + t).to(tl.int64) * ROW_WORDS
            wanted = to & (tl.sum(tl.where(sent_K & (rank_K == destination), 1, 0)) > 0)
            place = (row + X_WORD).to(tl.pointer_type(payload.dtype)) + h
            if IS_FP8:
                tl.store(tl.multiple_of(place, (16, 16)), payload, mask=inside & wanted)
                scales = (row + SCALE_WORD).to(tl.pointer_type(tl.float32)) + group
                tl.store(scales, scale_G, mask=(group < H // 128) & wanted)
            else:
                tl.store(tl.multiple_of(place, (16,)), payload, mask=inside & wanted)
            tl.store(row, t, mask=to & (part == 0))
            tl.store(row + 1 + k, code_K, mask=(k < K) & to & (part == 0))
            tl.store((row + 1 + K).to(tl.pointer_type(tl.float32)) + k, weight_K, mask=(k < K) & to & (part == 0))
        item += num_programs
    if pid == 0:
        # The number of rows lies beside the word.
        everyone = peers | (j == rank)
        heap = tl.load(ctl + TABLE + j, mask=everyone, other=0) + WORDS + (rank * 2 + 1) * 8
        count = tl.zeros_like(heap) + num_tokens
        tl.store(heap.to(tl.pointer_type(tl.int64)), count, mask=everyone & (void == CLEAN))
        tl.store(ctl + step_out, step)
        tl.store(ctl + LATE_IN_COMBINE, tl.full([], UNDECIDED, tl.int64))
    arrived = arrive(flags, void + bad, num_programs)
    if arrived == 1:
        publish(ctl, peers, step, WORDS + rank * 16, j)
        me = tl.load(ctl + TABLE + rank)
        deadline_ns, floor = wait_limits(ctl, DEADLINE_NS, MODE)
        await_words(me, WORDS, 2, deadline_ns, floor, peers, step, ctl, flags, rank, j, True, W, POISON, MODE, False)
    if (arrived == 2) & (void == CLEAN):
        mark_void(flags, VOID_ROUTING)
        poison_peers(ctl, peers, rank, j, POISON)
