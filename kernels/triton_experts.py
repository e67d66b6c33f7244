# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The expert MLP as Triton kernels: list the rows of each expert, gate and up with SwiGLU, down, sum.
``kernels.reference_experts`` says what they compute.

An entry is one (source, row, k) of the received rows, numbered (source * M + row) * K + k; the expert of entry n reads
row n // K where dispatch left it and writes row n of [W, M, K, H], where the ordered combine reads it. The entries of
an expert are cut into blocks of ROWS; a tile is a block of entries and a block of weight rows.

Small batches are bound by reading weights, so the kernels are made to keep many bytes in flight: a fixed number of
programs per processor, each walking over tiles. How many tiles there are is known on the device alone; programs beyond
leave at once. What a tile needs to know is loaded while the tile before it is computed.

A row's bits depend on the row and its expert only: every product runs over the same blocks in the same order, whatever
else lies in its block of entries, and no sum is cut by what is in the batch.

Legend: W max_ranks, M max_tokens, K top_k, H hidden_size, I intermediate_size, E local experts, C most entries of an
expert, R (ROWS) entries of a block, N entries; BN, BK weight rows and inputs of a tile's step; WP, EP the next powers
of two.
"""

import triton
import triton.language as tl
from triton.language.extra import cuda

from kernels.triton_wait import CLEAN, MEMBER, MEMBER_OF_VIEW, STATUS

if triton.knobs.runtime.interpret:

    @triton.jit
    def prefetch(address):
        pass

else:

    @triton.jit
    def prefetch(address):
        """Bring the 128 bytes at each address into the L2 cache, without waiting."""
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], tl.int32, is_pure=False, pack=1
        )


@triton.jit(do_not_specialize=["rank"])
def list_entries_kernel(
    heap,
    flags,
    counts_E,
    entry_EC,
    rank,
    W: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    DISPATCH_WORDS: tl.constexpr,
    DISPATCH_ROWS: tl.constexpr,
    WP: tl.constexpr,
    CHUNK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid (E,): the entries of one local expert, in a fixed order. A void round has none."""
    if OVERLAP:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    expert = tl.program_id(0)
    w = tl.arange(0, WP)
    void = tl.load(flags + STATUS)
    is_member_W = tl.load(flags + MEMBER + w, mask=w < W, other=0) == MEMBER_OF_VIEW
    rows_W = tl.load((heap + DISPATCH_WORDS).to(tl.pointer_type(tl.int64)) + 1 + w * 2, mask=w < W, other=0)
    num_W = tl.where(is_member_W & (void == CLEAN), tl.minimum(rows_W, M).to(tl.int32) * K, 0)
    most = tl.max(num_W)
    header = (heap + DISPATCH_ROWS).to(tl.pointer_type(tl.int32)) + 1
    count = expert * 0
    first = expert * 0
    while first < most:
        i = first + tl.arange(0, CHUNK)
        row = w[:, None] * M + (i // K)[None, :]
        k = (i % K)[None, :]
        arrived = i[None, :] < num_W[:, None]
        code = tl.load(header + row.to(tl.int64) * ROW_WORDS + k, mask=arrived, other=-1)
        hit = (code == ((rank << 16) | expert)).to(tl.int32)
        hits_W = tl.sum(hit, 1)
        place = count + (tl.cumsum(hits_W, 0) - hits_W)[:, None] + tl.cumsum(hit, 1) - 1
        tl.store(entry_EC + expert.to(tl.int64) * C + place, row * K + k, mask=hit > 0)
        count += tl.sum(hits_W)
        first += CHUNK
    tl.store(counts_E + expert, count)


@triton.jit
def tiles_of_experts(counts_E, num_experts, BLOCKS: tl.constexpr, ROWS: tl.constexpr, EP: tl.constexpr):
    """Entries of each expert; tiles up to and including each expert's; all tiles."""
    e = tl.arange(0, EP)
    count_E = tl.load(counts_E + e, mask=e < num_experts, other=0)
    tiles_E = (count_E + (ROWS - 1)) // ROWS * BLOCKS
    return count_E, tl.cumsum(tiles_E, 0), tl.sum(tiles_E)


@triton.jit
def load_tile(
    entry_EC, count_E, end_E, tile, C: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, EP: tl.constexpr
):
    """Expert, its block of weight rows, entries (-1: none); no entries for a tile past the last.

    Tiles that read the same weights follow each other, so that only the first reads them from memory.
    """
    e = tl.arange(0, EP)
    expert = tl.minimum(tl.sum((end_E <= tile).to(tl.int32)), EP - 1)
    count = tl.sum(tl.where(e == expert, count_E, 0))
    num_row_blocks = tl.maximum((count + (ROWS - 1)) // ROWS, 1)
    index = tile - tl.sum(tl.where(e == expert, end_E, 0)) + num_row_blocks * BLOCKS
    r = index % num_row_blocks * ROWS + tl.arange(0, ROWS)
    entry_R = tl.load(entry_EC + expert.to(tl.int64) * C + r, mask=(index >= 0) & (r < count), other=-1)
    return expert, index // num_row_blocks, entry_R


@triton.jit
def load_x(
    row_R,
    there_R,
    first,
    X_WORD: tl.constexpr,
    SCALE_WORD: tl.constexpr,
    BK: tl.constexpr,
    FP8: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """[R, BK] of x in received rows (int32 pointers); 0 where there is none. FP8: each 128 elements have a scale."""
    h = first + tl.arange(0, BK)
    if FP8:
        x = tl.load((row_R + X_WORD).to(tl.pointer_type(tl.float8e4nv))[:, None] + h[None, :], mask=there_R[:, None])
        scale_R = tl.load((row_R + SCALE_WORD).to(tl.pointer_type(tl.float32)) + first // 128, mask=there_R, other=0.0)
        return tl.where(there_R[:, None], x.to(tl.float32) * scale_R[:, None], 0.0).to(DTYPE)
    else:
        place = (row_R + X_WORD).to(tl.pointer_type(DTYPE))[:, None] + h[None, :]
        return tl.load(tl.multiple_of(place, (16, 16)), mask=there_R[:, None], other=0.0)


@triton.jit
def load_weight(
    pointer,
    descriptor,
    first_row,
    first,
    COLUMNS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TMA: tl.constexpr,
):
    """[BN, BK] of a weight [rows, COLUMNS]."""
    if TMA:
        return descriptor.load([first_row, first])
    else:
        row = (first_row + tl.arange(0, BN)).to(tl.int64)
        place = pointer + row[:, None] * COLUMNS + (first + tl.arange(0, BK))[None, :]
        return tl.load(place, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["num_experts"])
def gate_up_kernel(
    heap,
    gate_up,
    gate_up_descriptor,
    counts_E,
    entry_EC,
    inner_NI,
    num_experts,
    K: tl.constexpr,
    C: tl.constexpr,
    EP: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    ROW_WORDS: tl.constexpr,
    X_WORD: tl.constexpr,
    SCALE_WORD: tl.constexpr,
    FP8: tl.constexpr,
    DISPATCH_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TMA: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Any grid (P,). inner_NI[n] = silu(gate x) * (up x) of entry n, in the weights' dtype. gate_up is [E, 2, I, H]."""
    if OVERLAP:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    BLOCKS: tl.constexpr = I // BN
    dtype: tl.constexpr = gate_up.dtype.element_ty
    tile = tl.program_id(0)
    count_E, end_E, num_tiles = tiles_of_experts(counts_E, num_experts, BLOCKS, ROWS, EP)
    expert, block, entry_R = load_tile(entry_EC, count_E, end_E, tile, C, BLOCKS, ROWS, EP)
    while tile < num_tiles:
        next_tile = tile + tl.num_programs(0)
        next_expert, next_block, next_entry_R = load_tile(entry_EC, count_E, end_E, next_tile, C, BLOCKS, ROWS, EP)
        there_R = entry_R >= 0
        row_R = (heap + DISPATCH_ROWS).to(tl.pointer_type(tl.int32)) + (entry_R // K).to(tl.int64) * ROW_WORDS
        n = block * BN
        gate_row = expert * (2 * I) + n
        gate_RB = tl.zeros([ROWS, BN], tl.float32)
        up_RB = tl.zeros([ROWS, BN], tl.float32)
        for h in range(0, H, BK):
            x = load_x(row_R, there_R, h, X_WORD, SCALE_WORD, BK, FP8, dtype)
            gate = load_weight(gate_up, gate_up_descriptor, gate_row, h, H, BN, BK, TMA)
            up = load_weight(gate_up, gate_up_descriptor, gate_row + I, h, H, BN, BK, TMA)
            gate_RB = tl.dot(x, gate.T, gate_RB, input_precision="ieee")
            up_RB = tl.dot(x, up.T, up_RB, input_precision="ieee")
        inner = gate_RB / (1.0 + tl.exp(-gate_RB)) * up_RB
        place = inner_NI + entry_R.to(tl.int64)[:, None] * I + (n + tl.arange(0, BN))[None, :]
        tl.store(place, inner.to(dtype), mask=there_R[:, None])
        tile = next_tile
        expert = next_expert
        block = next_block
        entry_R = next_entry_R


@triton.jit(do_not_specialize=["num_experts"])
def down_kernel(
    down,
    down_descriptor,
    counts_E,
    entry_EC,
    inner_NI,
    rows_NH,
    num_experts,
    C: tl.constexpr,
    EP: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TMA: tl.constexpr,
    OVERLAP: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Any grid (P,). rows_NH[n] = down inner of entry n. down is [E, H, I].

    OVERLAP: the lists were complete before the kernel before this one let it start, so programs can find
    their first tile, and fetch the first AHEAD elements of each of its weight rows into the cache, while that runs.
    """
    BLOCKS: tl.constexpr = H // BN
    dtype: tl.constexpr = down.dtype.element_ty
    tile = tl.program_id(0)
    count_E, end_E, num_tiles = tiles_of_experts(counts_E, num_experts, BLOCKS, ROWS, EP)
    expert, block, entry_R = load_tile(entry_EC, count_E, end_E, tile, C, BLOCKS, ROWS, EP)
    if OVERLAP:
        if AHEAD > 0:  # noqa: SIM102 - one is known when compiling, the other is not
            if tile < num_tiles:
                row = (expert * H + block * BN + tl.arange(0, BN)).to(tl.int64)
                prefetch((down + row[:, None] * I + (tl.arange(0, AHEAD // 64) * 64)[None, :]).to(tl.int64))
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    while tile < num_tiles:
        next_tile = tile + tl.num_programs(0)
        next_expert, next_block, next_entry_R = load_tile(entry_EC, count_E, end_E, next_tile, C, BLOCKS, ROWS, EP)
        there_R = entry_R >= 0
        n = block * BN
        out_RB = tl.zeros([ROWS, BN], tl.float32)
        for i in range(0, I, BK):
            inner_place = inner_NI + entry_R.to(tl.int64)[:, None] * I + (i + tl.arange(0, BK))[None, :]
            inner = tl.load(inner_place, mask=there_R[:, None], other=0.0)
            weight = load_weight(down, down_descriptor, expert * H + n, i, I, BN, BK, TMA)
            out_RB = tl.dot(inner, weight.T, out_RB, input_precision="ieee")
        place = rows_NH + entry_R.to(tl.int64)[:, None] * H + (n + tl.arange(0, BN))[None, :]
        tl.store(place, out_RB.to(dtype), mask=there_R[:, None])
        tile = next_tile
        expert = next_expert
        block = next_block
        entry_R = next_entry_R


@triton.jit(do_not_specialize=["rank"])
def sum_rows_kernel(
    heap,
    flags,
    rows_NH,
    sum_SH,
    rank,
    W: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    DISPATCH_WORDS: tl.constexpr,
    DISPATCH_ROWS: tl.constexpr,
    PART: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid (P, parts of a row): each received row's entries of this rank, weighted, added up in top-k order."""
    if OVERLAP:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    h = tl.program_id(1) * PART + tl.arange(0, PART)
    void = tl.load(flags + STATUS)
    for source in range(W):
        member = tl.load(flags + MEMBER + source) == MEMBER_OF_VIEW
        count = tl.load((heap + DISPATCH_WORDS).to(tl.pointer_type(tl.int64)) + source * 2 + 1).to(tl.int32)
        num_rows = tl.where(member & (void == CLEAN), tl.minimum(count, M), 0)
        r = tl.program_id(0)
        while r < num_rows:
            row = source * M + r
            header = (heap + DISPATCH_ROWS).to(tl.pointer_type(tl.int32)) + row.to(tl.int64) * ROW_WORDS
            total = tl.zeros([PART], tl.float32)
            for k in tl.static_range(K):
                mine = (tl.load(header + 1 + k) >> 16) == rank
                weight = tl.load((header + 1 + K + k).to(tl.pointer_type(tl.float32)))
                line = tl.load(rows_NH + (row * K + k).to(tl.int64) * H + h, mask=(h < H) & mine, other=0.0)
                total = tl.where(mine, total + weight * line.to(tl.float32), total)
            tl.store(sum_SH + row.to(tl.int64) * H + h, total.to(sum_SH.dtype.element_ty), mask=h < H)
            r += tl.num_programs(0)
