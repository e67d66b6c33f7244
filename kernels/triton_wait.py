# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, possibly-undefined"
"""Clock, waits, poison and publication inside a kernel: PROTOCOL section 2 for one program of a grid.

Device state of a rank, so that captured graphs read what changes:

    ctl    int64: cells below, then at TABLE the address of each rank's heap as mapped here, [W], and [W] nanoseconds
           waited for each rank
    flags  int32: status, arrivals, then at MEMBER [W] (OUTSIDE, MEMBER_OF_VIEW, MASKED) and [W] observations

Loop conditions come from a reduction over one element per thread, so all threads leave a wait together (threads that
saw different values would hang at the next barrier).

Memory order. Payload is stored by all threads; the barrier and the acquire-release count of programs that arrive order
it before the last program's release exchange at system scope, which makes it visible before the word. A waiter loads
words with acquire at system scope, so a word that is seen stands for payload that is seen.

Legend: W max_ranks; j one element per thread, W of them mean slots.
"""

import time

import triton
import triton.language as tl

CLEAN = tl.constexpr(0)
VOID_DEADLINE = tl.constexpr(1)
VOID_PEER_POISON = tl.constexpr(2)
VOID_HOST_POISON = tl.constexpr(3)
VOID_FUTURE_WORD = tl.constexpr(4)
VOID_DIGEST = tl.constexpr(5)
VOID_ROUTING = tl.constexpr(6)

# Two step cells: a kernel reads one and writes the other, so its programs need not agree on when to count.
STEP_BEFORE_DISPATCH = tl.constexpr(0)
STEP_BEFORE_COMBINE = tl.constexpr(1)
FLOOR = tl.constexpr(2)
DEADLINE_NS = tl.constexpr(3)
DIGEST = tl.constexpr(4)
NUM_HEADERS = tl.constexpr(5)
BARRIER_DEADLINE_NS = tl.constexpr(6)
LATE_IN_COMBINE = tl.constexpr(7)  # bits of the ranks that this combine goes on without; UNDECIDED before
RENORMALISE = tl.constexpr(8)
TABLE = tl.constexpr(16)

STATUS = tl.constexpr(0)
ARRIVED = tl.constexpr(32)
MEMBER = tl.constexpr(64)

OUTSIDE = tl.constexpr(0)
MEMBER_OF_VIEW = tl.constexpr(1)
MASKED = tl.constexpr(2)

# What a kernel is built for: ``elastic_mode``; OFF needs nothing of its own here.
BARE = tl.constexpr(0)
VIEWS = tl.constexpr(1)
ALONE = tl.constexpr(2)
BARE_POLLS = tl.constexpr(1 << 24)  # tens of seconds: not even a bare wait may hang a device
UNDECIDED = tl.constexpr(-1)

# A program that found the round void counts itself with this too: then nobody publishes.
VOID_ARRIVAL = tl.constexpr(1 << 16)
PATIENT_NS = tl.constexpr(1 << 61)

if triton.knobs.runtime.interpret:
    POLLS_PER_CLOCK = tl.constexpr(1)

    def host_now_ns():
        time.sleep(1e-3)  # peers share the cores
        return time.monotonic_ns()

    def now_ns(j):
        return tl.full([], host_now_ns(), tl.int64)

    def since_ns(j, start_ns, last_ns):
        return last_ns

    @triton.jit
    def load_acquire(address):
        return tl.load(address.to(tl.pointer_type(tl.int64)), volatile=True)

else:
    POLLS_PER_CLOCK = tl.constexpr(16)

    @triton.jit
    def now_ns(j):
        """Nanoseconds; one sample per thread, reduced, so that all threads get the same."""
        sample = tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l,r", [j], tl.int64, is_pure=False, pack=1)
        return tl.max(sample)

    @triton.jit
    def since_ns(j, start_ns, last_ns):
        """One sample per thread, for statistics."""
        sample = tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l,r", [j], tl.int64, is_pure=False, pack=1)
        return sample - start_ns

    @triton.jit
    def load_acquire(address):
        return tl.inline_asm_elementwise(
            "ld.acquire.sys.global.b64 $0, [$1];", "=l,l", [address], tl.int64, is_pure=False, pack=1
        )


@triton.jit
def status(flags, MODE: tl.constexpr):
    if MODE == BARE:
        return tl.full([], CLEAN, tl.int32)
    else:
        return tl.load(flags + STATUS)


@triton.jit
def is_member(flags, slot, MODE: tl.constexpr):
    """Whether to send to ``slot``, one number in 0..W-1."""
    if MODE == BARE:
        return slot >= 0
    else:
        return tl.load(flags + MEMBER + slot) == MEMBER_OF_VIEW


@triton.jit
def wait_limits(ctl, CELL: tl.constexpr, MODE: tl.constexpr):
    """Deadline in nanoseconds, and the lowest word of the epoch."""
    if MODE == BARE:
        return tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    else:
        return tl.load(ctl + CELL), tl.load(ctl + FLOOR)


@triton.jit
def peers_of(flags, rank, j, W: tl.constexpr, MODE: tl.constexpr):
    """For each slot j, whether it is another rank to send to and to wait for."""
    if MODE == BARE:
        return (j < W) & (j != rank)
    else:
        return (tl.load(flags + MEMBER + j, mask=j < W, other=0) == MEMBER_OF_VIEW) & (j != rank)


@triton.jit
def mark_void(flags, reason):
    """The first reason stays."""
    clean = tl.full([], CLEAN, tl.int32)
    tl.atomic_cas(flags + STATUS, clean, clean + reason, sem="release", scope="sys")


@triton.jit
def poison_peers(ctl, peers, rank, j, POISON: tl.constexpr):
    """The only thing that a void rank still writes."""
    floor = tl.load(ctl + FLOOR)
    heap = tl.load(ctl + TABLE + j, mask=peers, other=0)
    word = (heap + POISON).to(tl.pointer_type(tl.int64)) + rank
    tl.atomic_xchg(word, tl.zeros_like(heap) + floor + 1, mask=peers, sem="release", scope="sys")


@triton.jit
def publish(ctl, peers, step, offset, j):
    """Store ``step`` at ``offset`` (bytes) of every peer's heap. Whatever was to be seen with it is stored already."""
    heap = tl.load(ctl + TABLE + j, mask=peers, other=0)
    word = (heap + offset).to(tl.pointer_type(tl.int64))
    tl.atomic_xchg(word, tl.zeros_like(heap) + step, mask=peers, sem="release", scope="sys")


@triton.jit
def arrive(flags, void, num_programs):
    """Count this program. 1: it is the last and every program found the round clean; 2: the last of a void round."""
    tl.debug_barrier()
    before = tl.atomic_add(flags + ARRIVED, tl.where(void == 0, 1, VOID_ARRIVAL + 1), sem="acq_rel", scope="gpu")
    last = (before & (VOID_ARRIVAL - 1)) == num_programs - 1
    if last:
        tl.atomic_xchg(flags + ARRIVED, tl.full([], 0, tl.int32), sem="relaxed", scope="gpu")
    clean = (void == 0) & (before < VOID_ARRIVAL)
    return tl.where(last, tl.where(clean, 1, 2), 0)


@triton.jit
def look(words, STRIDE: tl.constexpr, poison, peers, step, floor, rank, j):
    """Packed counts: words not there | from the future << 8 | poison of peers << 16 | of the host << 24; and the
    words."""
    # The poison first: nothing may overtake an acquiring load, but the two may be under way together.
    mark = tl.load(poison + j, mask=peers | (j == rank), other=0, volatile=True)
    word = load_acquire(words + at(peers, j, rank, STRIDE))
    late = tl.where(peers & (word != step), 1, 0) + tl.where(peers & (word > step), 1 << 8, 0)
    poisoned = tl.where(mark >= floor, tl.where(j == rank, 1 << 24, 1 << 16), 0)
    return tl.sum(late + poisoned), word


@triton.jit
def await_words(
    me,
    offset,
    STRIDE: tl.constexpr,
    deadline_ns,
    floor,
    peers,
    step,
    ctl,
    flags,
    rank,
    j,
    is_first,
    W: tl.constexpr,
    POISON: tl.constexpr,
    MODE: tl.constexpr,
    IS_SHARED: tl.constexpr,
):
    """Whether every peer's word (int64, STRIDE apart, ``offset`` bytes into the own heap, which is at ``me``) is
    ``step`` (1; 0: the round is void), and the bits of the ranks without which a rank in mode ALONE goes on.

    Complete first, whatever else happened. When several are late, some may be waiting for the others: their words get
    a tenth longer for each before anybody is accused. The clock is read before the words: a program that was itself
    stopped past the deadline looks once more. IS_SHARED: several programs make this wait, and must agree on who is
    left out; ``is_first`` is true in one of them, which counts the time.
    """
    complete = tl.full([], 1, tl.int32)
    late_bits = step - step
    words = me + offset
    if MODE == BARE:
        missing = tl.sum(tl.where(peers & (load_acquire(words + at(peers, j, rank, STRIDE)) != step), 1, 0))
        num_polls = 0
        while (missing > 0) & (num_polls < BARE_POLLS):
            num_polls += 1
            missing = tl.sum(tl.where(peers & (load_acquire(words + at(peers, j, rank, STRIDE)) != step), 1, 0))
    else:
        poison = (me + POISON).to(tl.pointer_type(tl.int64))
        seen, word = look(words, STRIDE, poison, peers, step, floor, rank, j)
        if (seen > 0) & (seen < 256):
            start_ns = now_ns(j)
            last_ns = start_ns - start_ns
            waited_ns = tl.zeros_like(word)
            word_before = word + 0
            num_polls = 0
            while (seen > 0) & (seen < 256) & (last_ns < deadline_ns + deadline_ns // 10 * (seen - 1)):
                num_polls += 1
                if num_polls % POLLS_PER_CLOCK == 0:
                    last_ns = now_ns(j) - start_ns
                word_before = word + 0  # a mere alias would not be carried from turn to turn
                seen, word = look(words, STRIDE, poison, peers, step, floor, rank, j)
                waited_ns = tl.where(word != step, last_ns, waited_ns)
            waited_ns = tl.where(word_before != step, since_ns(j, start_ns, last_ns), waited_ns)
            tl.atomic_add(ctl + TABLE + W + j, waited_ns, mask=peers & is_first, sem="relaxed", scope="gpu")
        if (seen & 255) != 0:
            reason = tl.where(((seen >> 16) & 255) != 0, VOID_PEER_POISON, VOID_DEADLINE)
            reason = tl.where((seen >> 24) != 0, VOID_HOST_POISON, reason)
            reason = tl.where(((seen >> 8) & 255) != 0, VOID_FUTURE_WORD, reason)
            if (reason == VOID_DEADLINE) if MODE == ALONE else (reason != reason):
                late_bits = bits_of(peers & (word != step), j)
            else:
                complete = complete * 0
                mark_void(flags, reason)
                if reason == VOID_DEADLINE:
                    tl.store(flags + MEMBER + W + j, 1, mask=peers & (word != step))
                if reason != VOID_PEER_POISON:
                    poison_peers(ctl, peers, rank, j, POISON)
        if MODE == ALONE:
            late_bits = leave_out(ctl, flags, complete, late_bits, j, W, IS_SHARED)
    return complete, late_bits


@triton.jit
def at(peers, j, rank, STRIDE: tl.constexpr):
    """Byte offset of each source's word; what is not a peer reads this rank's own word, which nobody writes."""
    return tl.where(peers, j, rank).to(tl.int64) * (8 * STRIDE)


@triton.jit
def bits_of(chosen, j):
    """Of the slots j < 64 that are ``chosen``."""
    one = tl.full([], 1, tl.int64)
    return tl.sum(tl.where(chosen, one << tl.where(chosen, j, 0).to(tl.int64), 0))


@triton.jit
def leave_out(ctl, flags, complete, late_bits, j, W: tl.constexpr, IS_SHARED: tl.constexpr):
    """Mask the late ranks. When several programs wait, the first to end its wait decides for all: else one half of a
    token could be added up with a rank's rows and the other without."""
    decides = complete != 0
    if IS_SHARED:  # noqa: SIM102 (a constant, and a value of the device)
        if decides:
            undecided = tl.full([], UNDECIDED, tl.int64)
            before = tl.atomic_cas(ctl + LATE_IN_COMBINE, undecided, late_bits, sem="acq_rel", scope="gpu")
            decides = before == undecided
            late_bits = tl.where(decides, late_bits, before)
    if decides:
        late = (j < W) & (((late_bits >> tl.where(j < W, j, 0).to(tl.int64)) & 1) != 0)
        tl.store(flags + MEMBER + j, MASKED, mask=late)
        tl.store(flags + MEMBER + W + j, 1, mask=late)
    tl.debug_barrier()
    return late_bits
