# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Kernels of one program each: the header allgather, the barrier, and poison. PROTOCOL 1.3, 1.4, 2.5, 2.6.

Legend: W max_ranks, N header words.
"""

import triton
import triton.language as tl

from kernels.triton_wait import (
    ALONE,
    BARRIER_DEADLINE_NS,
    CLEAN,
    DEADLINE_NS,
    DIGEST,
    FLOOR,
    NUM_HEADERS,
    PATIENT_NS,
    STEP_BEFORE_DISPATCH,
    TABLE,
    VIEWS,
    VOID_DIGEST,
    VOID_FUTURE_WORD,
    await_words,
    bits_of,
    mark_void,
    peers_of,
    poison_peers,
    publish,
    status,
    wait_limits,
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
    MODE: tl.constexpr,
):
    """Grid (1,). int64 words_N below 2**32 to every member; theirs to out_WN, 0 for who is none. A row of the heap is
    the step word, then digest and data, each tagged. The wait is patient, but in mode ALONE. Void: out_WN stays as it
    is."""
    j = tl.arange(0, NT)
    peers = peers_of(flags, rank, j, W, MODE)
    void = status(flags, MODE)
    step = tl.load(ctl + STEP_BEFORE_DISPATCH) + 1
    num_headers = tl.load(ctl + NUM_HEADERS)
    own_digest = tl.load(ctl + DIGEST)
    me = tl.load(ctl + TABLE + rank)
    tl.debug_barrier()
    if void == CLEAN:
        bank = tl.where(num_headers == 0, 2 + ((step >> 40) & 1), num_headers & 1)
        tag = tag_of(step)
        n = tl.arange(0, NP)
        member_bits = bits_of(peers | (j == rank), j)
        write_header(ctl, words_N, own_digest, step, bank, member_bits, rank, n, W, N, HEADER)
        tl.debug_barrier()
        publish(ctl, peers, step, HEADER + (bank * W + rank) * (2 + N) * 8, j)
        words = me + HEADER + bank * W * (2 + N) * 8
        deadline_ns, floor = wait_limits(ctl, DEADLINE_NS, MODE)
        if MODE != ALONE:
            deadline_ns = tl.full([], PATIENT_NS, tl.int64)
        complete, late_bits = await_words(
            me, words - me, 2 + N, deadline_ns, floor, peers, step, ctl, flags, rank, j, True, W, POISON, MODE, False
        )
        if complete != 0:
            slot = tl.arange(0, WP)
            inside = (slot < W) & (((member_bits >> tl.where(slot < W, slot, 0)) & 1) != 0)
            inside = inside & (((late_bits >> tl.where(slot < W, slot, 0)) & 1) == 0)
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


@triton.jit
def tag_of(step):
    """``step_words.header_tag``."""
    return (((step >> 40) & 0xFFF) << 20) | (step & 0xFFFFF)


@triton.jit
def write_header(
    ctl, words_N, digest, step, bank, member_bits, rank, n, W: tl.constexpr, N: tl.constexpr, HEADER: tl.constexpr
):
    """Digest and data, tagged, without the step word."""
    data = tl.load(words_N + n - 1, mask=(n > 0) & (n <= N), other=0)
    row = (tag_of(step) << 32) | tl.where(n == 0, digest, data)
    for destination in tl.static_range(W):
        to = ((member_bits >> destination) & 1) != 0
        heap = tl.load(ctl + TABLE + destination)
        place = (heap + HEADER).to(tl.pointer_type(tl.int64)) + (bank * W + rank) * (2 + N) + 1
        tl.store(place + n, row, mask=(n <= N) & to)


@triton.jit(do_not_specialize=["step", "digest", "member_bits", "rank"])
def announce_kernel(
    ctl,
    words_N,
    step,
    digest,
    member_bits,
    rank,
    W: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    HEADER: tl.constexpr,
    NT: tl.constexpr,
):
    """Grid (1,). A newcomer's first header of an epoch that it has not adopted, into the heaps of ``member_bits``."""
    j = tl.arange(0, NT)
    step = step.to(tl.int64)
    bank = 2 + ((step >> 40) & 1)
    member_bits = member_bits.to(tl.int64)
    write_header(ctl, words_N, digest.to(tl.int64), step, bank, member_bits, rank, tl.arange(0, NP), W, N, HEADER)
    tl.debug_barrier()
    members = (j < W) & (((member_bits >> tl.where(j < W, j, 0)) & 1) != 0)
    publish(ctl, members, step, HEADER + (bank * W + rank) * (2 + N) * 8, j)


@triton.jit(do_not_specialize=["rank"])
def barrier_kernel(
    ctl,
    flags,
    rank,
    W: tl.constexpr,
    POISON: tl.constexpr,
    BARRIER: tl.constexpr,
    NT: tl.constexpr,
    MODE: tl.constexpr,
):
    """Grid (1,). Two banks: a neighbour may still be reading the words of the barrier before."""
    j = tl.arange(0, NT)
    peers = peers_of(flags, rank, j, W, MODE)
    void = status(flags, MODE)
    step = tl.load(ctl + STEP_BEFORE_DISPATCH) + 1
    tl.debug_barrier()
    if void == CLEAN:
        bank = BARRIER + (step & 1) * W * 8
        publish(ctl, peers, step, bank + rank * 8, j)
        deadline_ns, floor = wait_limits(ctl, BARRIER_DEADLINE_NS, MODE)
        await_words(
            tl.load(ctl + TABLE + rank),
            bank,
            1,
            deadline_ns,
            floor,
            peers,
            step,
            ctl,
            flags,
            rank,
            j,
            True,
            W,
            POISON,
            MODE,
            False,
        )
    tl.debug_barrier()
    tl.store(ctl + STEP_BEFORE_DISPATCH, step)


@triton.jit(do_not_specialize=["rank", "reason"])
def poison_kernel(ctl, flags, rank, reason, W: tl.constexpr, POISON: tl.constexpr, NT: tl.constexpr):
    """Grid (1,). Make this rank void (if it is clean) and tell every member of its epoch."""
    j = tl.arange(0, NT)
    peers = peers_of(flags, rank, j, W, VIEWS)
    mark_void(flags, reason)
    if tl.load(ctl + FLOOR) > 0:
        poison_peers(ctl, peers, rank, j, POISON)
