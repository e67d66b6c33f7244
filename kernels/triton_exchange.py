# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The dispatch and combine kernels. PROTOCOL 1.1, 1.2, 2.1 to 2.3; ``kernels.reference`` says what they compute.

A row of dispatch is int32: token, K codes (rank << 16 | local expert, or -1), K weights, padding, then x at X_WORD.
Row t of a rank's region is its token t, in the heap of every member: who holds none of the token's experts gets the
codes alone. That costs some bytes and saves a count of rows, an atomic each, before the first store.

Everything a kernel needs to know is loaded before its first store, so that the loads overlap.

Legend: W max_ranks, M max_tokens, T tokens, K top_k, KP and WP the next powers of two, H hidden_size, PART elements of
a row that one program moves at a time, NT threads of a program.
"""

import triton
import triton.language as tl
from triton.language.extra import cuda

from kernels.triton_wait import (
    CLEAN,
    DEADLINE_NS,
    MASKED,
    MEMBER,
    MEMBER_OF_VIEW,
    STATUS,
    TABLE,
    VOID_ROUTING,
    arrive,
    await_words,
    mark_void,
    member_flags,
    poison_peers,
    publish,
)


@triton.jit(do_not_specialize=["num_tokens", "rank", "step_in", "step_out"])
def dispatch_kernel(
    ctl,
    flags,
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
    ROW_WORDS: tl.constexpr,
    X_WORD: tl.constexpr,
    POISON: tl.constexpr,
    WORDS: tl.constexpr,
    ROWS: tl.constexpr,
    PART: tl.constexpr,
    NT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Any grid (P,): programs share out (token, part of a row); the last to arrive publishes and waits."""
    if OVERLAP:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    PARTS: tl.constexpr = (H + PART - 1) // PART
    pid = tl.program_id(0)
    num_programs = tl.num_programs(0)
    j = tl.arange(0, NT)
    k = tl.arange(0, KP)
    void = tl.load(flags + STATUS)
    step = tl.load(ctl + step_in) + 1
    peers = (member_flags(flags, j, W) == MEMBER_OF_VIEW) & (j != rank)
    bad = void * 0
    item = pid
    while item < num_tokens * PARTS:
        t = item // PARTS
        part = item % PARTS
        h = part * PART + tl.arange(0, PART)
        x = tl.load(x_TH + t.to(tl.int64) * H + h, mask=h < H, other=0.0)
        rank_K = tl.load(rank_TK + t * K + k, mask=k < K, other=-1)
        local_K = tl.load(local_TK + t * K + k, mask=k < K, other=0)
        weight_K = tl.load(weight_TK + t * K + k, mask=k < K, other=0.0)
        sent_K = k < 0
        known_K = rank_K == -1
        for slot in tl.static_range(W):
            flag = tl.load(flags + MEMBER + slot)
            sent_K = sent_K | ((rank_K == slot) & (flag == MEMBER_OF_VIEW))
            known_K = known_K | ((rank_K == slot) & (flag == MASKED))
        code_K = tl.where(sent_K, (rank_K << 16) | local_K, -1)
        bad += tl.sum(tl.where((k < K) & ((sent_K | known_K) == 0), 1, 0))
        for distance in tl.static_range(1, W + 1):
            destination = (rank + distance) % W
            to = (tl.load(flags + MEMBER + destination) == MEMBER_OF_VIEW) & (void == CLEAN)
            heap = tl.load(ctl + TABLE + destination) + ROWS
            row = heap.to(tl.pointer_type(tl.int32)) + (rank * M + t).to(tl.int64) * ROW_WORDS
            wanted = tl.sum(tl.where(sent_K & (rank_K == destination), 1, 0)) > 0
            place = (row + X_WORD).to(tl.pointer_type(x_TH.dtype.element_ty)) + h
            tl.store(tl.multiple_of(place, (16,)), x, mask=(h < H) & to & wanted)
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
    arrived = arrive(flags, void + bad, num_programs)
    if arrived == 1:
        publish(ctl, peers, step, WORDS + rank * 16, j)
        words = tl.load(ctl + TABLE + rank) + WORDS
        await_words(words, 2, tl.load(ctl + DEADLINE_NS), peers, step, ctl, flags, rank, j, W, POISON)
    if (arrived == 2) & (void == CLEAN):
        mark_void(flags, VOID_ROUTING)
        poison_peers(ctl, peers, rank, j, POISON)


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
    void = tl.load(flags + STATUS)
    step = tl.load(ctl + step_in) + 1
    me = tl.load(ctl + TABLE + rank)
    peers = (member_flags(flags, j, W) == MEMBER_OF_VIEW) & (j != rank)
    received = (me + DISPATCH_ROWS).to(tl.pointer_type(tl.int32))
    for distance in tl.static_range(1, W):
        source = (rank + distance) % W
        to = (tl.load(flags + MEMBER + source) == MEMBER_OF_VIEW) & (void == CLEAN)
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
    if (void == CLEAN) & ((pid < num_tokens * PARTS) | (pid == 0)):
        deadline_ns = tl.load(ctl + DEADLINE_NS)
        complete = await_words(me + WORDS, 1, deadline_ns, peers, step, ctl, flags, rank, j, W, POISON)
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
                base = tl.where(owner == rank, rows.to(tl.int64), returned)
                place = base.to(tl.pointer_type(dtype)) + ((owner * M + t) * K + i).to(tl.int64) * H + h
                line = tl.load(tl.multiple_of(place, (16,)), mask=(h < H) & (code >= 0), other=0.0)
                total = tl.where(code >= 0, total + weight * line.to(tl.float32), total)
        else:
            owner_K = tl.load(row + 1 + k, mask=k < K, other=-1) >> 16
            for owner in tl.static_range(W):
                base = tl.where(owner == rank, rows.to(tl.int64), returned)
                line_of_owner = tl.where(owner == rank, rank * M + t, (owner * M + t) * K).to(tl.int64)
                place = base.to(tl.pointer_type(dtype)) + line_of_owner * H + h
                held = tl.sum(tl.where(owner_K == owner, 1, 0)) > 0
                line = tl.load(tl.multiple_of(place, (16,)), mask=(h < H) & held, other=0.0)
                total += line.to(tl.float32)
        tl.store(out_TH + t.to(tl.int64) * H + h, total.to(out_TH.dtype.element_ty), mask=h < H)
        item += num_programs
