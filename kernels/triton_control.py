# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Kernels of one program each: the header allgather, the barrier, and poison. PROTOCOL 1.3, 1.4, 2.5, 2.6.

Legend: W max_ranks, N header words.
"""

import triton
import triton.language as tl

from kernels.triton_wait import (
    BARRIER_DEADLINE_NS,
    CLEAN,
    DIGEST,
    FLOOR,
    MEMBER,
    MEMBER_OF_VIEW,
    NUM_HEADERS,
    PATIENT_NS,
    STATUS,
    STEP_BEFORE_DISPATCH,
    TABLE,
    VOID_DIGEST,
    VOID_FUTURE_WORD,
    await_words,
    mark_void,
    member_flags,
    poison_peers,
    publish,
)


@triton.jit(do_not_specialize=["rank"])
def allgather_kernel(
    ctl,
    flags,
    words_N,
    out_WN,
    rank,
    W: tl.constexpr,
    WP: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    POISON: tl.constexpr,
    HEADER: tl.constexpr,
    NT: tl.constexpr,
):
    """Grid (1,). int64 words_N below 2**32 to every member; theirs to out_WN, 0 for who is none. A row of the heap is
    the step word, then digest and data, each tagged. The wait is patient. Void: out_WN stays as it is."""
    j = tl.arange(0, NT)
    member = member_flags(flags, j, W)
    peers = (member == MEMBER_OF_VIEW) & (j != rank)
    void = tl.load(flags + STATUS)
    step = tl.load(ctl + STEP_BEFORE_DISPATCH) + 1
    num_headers = tl.load(ctl + NUM_HEADERS)
    own_digest = tl.load(ctl + DIGEST)
    me = tl.load(ctl + TABLE + rank)
    tl.debug_barrier()
    if void == CLEAN:
        bank = tl.where(num_headers == 0, 2 + ((step >> 40) & 1), num_headers & 1)
        tag = (((step >> 40) & 0xFFF) << 20) | (step & 0xFFFFF)
        n = tl.arange(0, NP)
        data = tl.load(words_N + n - 1, mask=(n > 0) & (n <= N), other=0)
        row = (tag << 32) | tl.where(n == 0, own_digest, data)
        for destination in tl.static_range(W):
            to = tl.load(flags + MEMBER + destination) == MEMBER_OF_VIEW
            heap = tl.load(ctl + TABLE + destination)
            place = (heap + HEADER).to(tl.pointer_type(tl.int64)) + (bank * W + rank) * (2 + N) + 1
            tl.store(place + n, row, mask=(n <= N) & to)
        tl.debug_barrier()
        publish(ctl, peers, step, HEADER + (bank * W + rank) * (2 + N) * 8, j)
        words = me + HEADER + bank * W * (2 + N) * 8
        if await_words(words, 2 + N, PATIENT_NS, peers, step, ctl, flags, rank, j, W, POISON) != 0:
            slot = tl.arange(0, WP)
            inside = tl.load(flags + MEMBER + slot, mask=slot < W, other=0) == MEMBER_OF_VIEW
            theirs = words.to(tl.pointer_type(tl.int64)) + slot[:, None] * (2 + N) + 1 + n[None, :]
            mask = inside[:, None] & (n <= N)[None, :]
            got = tl.load(theirs, mask=mask, other=0, volatile=True)
            low = got & 0xFFFFFFFF
            half_read = tl.sum(tl.where(mask & (((got >> 32) & 0xFFFFFFFF) != tag), 1, 0))
            other_digest = tl.sum(tl.where(mask & (n == 0)[None, :] & (low != own_digest), 1, 0))
            if half_read + other_digest > 0:
                mark_void(flags, tl.where(half_read > 0, VOID_FUTURE_WORD, VOID_DIGEST))
                poison_peers(ctl, peers, rank, j, POISON)
            else:
                out = out_WN + slot[:, None] * N + n[None, :] - 1
                tl.store(out, low, mask=(slot < W)[:, None] & ((n > 0) & (n <= N))[None, :])
    tl.debug_barrier()
    tl.store(ctl + STEP_BEFORE_DISPATCH, step)
    tl.store(ctl + NUM_HEADERS, num_headers + 1)


@triton.jit(do_not_specialize=["rank"])
def barrier_kernel(ctl, flags, rank, W: tl.constexpr, POISON: tl.constexpr, BARRIER: tl.constexpr, NT: tl.constexpr):
    """Grid (1,). Two banks: a neighbour may still be reading the words of the barrier before."""
    j = tl.arange(0, NT)
    peers = (member_flags(flags, j, W) == MEMBER_OF_VIEW) & (j != rank)
    void = tl.load(flags + STATUS)
    step = tl.load(ctl + STEP_BEFORE_DISPATCH) + 1
    tl.debug_barrier()
    if void == CLEAN:
        bank = BARRIER + (step & 1) * W * 8
        publish(ctl, peers, step, bank + rank * 8, j)
        deadline_ns = tl.load(ctl + BARRIER_DEADLINE_NS)
        words = tl.load(ctl + TABLE + rank) + bank
        await_words(words, 1, deadline_ns, peers, step, ctl, flags, rank, j, W, POISON)
    tl.debug_barrier()
    tl.store(ctl + STEP_BEFORE_DISPATCH, step)


@triton.jit(do_not_specialize=["rank", "reason"])
def poison_kernel(ctl, flags, rank, reason, W: tl.constexpr, POISON: tl.constexpr, NT: tl.constexpr):
    """Grid (1,). Make this rank void (if it is clean) and tell every member of its epoch."""
    j = tl.arange(0, NT)
    peers = (member_flags(flags, j, W) == MEMBER_OF_VIEW) & (j != rank)
    mark_void(flags, reason)
    if tl.load(ctl + FLOOR) > 0:
        poison_peers(ctl, peers, rank, j, POISON)
