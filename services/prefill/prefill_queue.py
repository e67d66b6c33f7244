"""Which prompt tokens are computed next: chunks of many requests in one batch. Pure.

    on_prefill --> WAITING --blocks, in order of arrival--> RUNNING --last chunk computed--> done
                     either --abort, higher attempt--> gone

A batch holds at most ``chunk_tokens`` tokens. Whoever has least left comes first, so a short prompt waits for the batch
that runs and not for the long ones before it; a request that a batch has left out counts as one whole batch shorter,
so that a long one waits for at most as many batches as it has itself.

What the prefix cache knows of a prompt is not computed: the request reads those blocks and owns only the others. When
it is done the cache takes over what is new. Cache and requests have blocks of their own, ``num_kv_blocks`` always
remaining for requests.

Events may come while a batch is computed: blocks that an abort frees are given out only by the next `next_batch`, so
nobody writes where a running batch still does, and its chunks of requests that are gone are ignored.
"""

from dataclasses import dataclass, field

from common.config import PrefillConfig
from common.ids import RequestId
from common.kv_blocks import BlockAllocator
from common.messages import (
    Abort,
    AskPrefill,
    Message,
    Prefill,
    PrefillDone,
    PrefillQueued,
    Refused,
    TopLogprobs,
    Unknown,
)
from common.router_watch import RouterWatch
from common.sampling_bounds import sampling_fault
from services.prefill.prefix_cache import PrefixCache

MAX_DONE = 1024  # attempts remembered after their end, so that a lost PrefillDone can be said again

Attempt = tuple[RequestId, int]
NUM_ATTEMPTS_IN_PIECES = 3
PREFIXES: Attempt = (RequestId(""), 0)  # owns the blocks of the prefix cache


@dataclass(frozen=True, slots=True)
class PrefillLimits:
    """What the model allows."""

    vocab_size: int
    max_positions: int
    kv_block_bytes: int = 1


@dataclass(frozen=True, slots=True)
class Chunk:
    """Compute ``tokens`` at positions start, start + 1, ...; after the last one sample a token and read the KV.

    ``prompt_logprobs`` is one list for all chunks of an attempt; whoever computes them appends to it.
    """

    prefill: Prefill
    start: int
    tokens: tuple[int, ...]
    is_last: bool
    block_table: tuple[int, ...]
    prompt_logprobs: list[tuple[float, TopLogprobs]] = field(default_factory=list)
    num_cached: int = 0  # tokens before the first chunk of the request

    @property
    def goes_in_pieces(self) -> bool:
        """Its KV leaves while it is computed. One lost piece costs the whole attempt, so a request that is at it for
        the fourth time, perhaps over a bad path, gets its KV in one message at the end."""
        is_all = self.start == 0 and self.is_last
        return not is_all and self.prefill.attempt < NUM_ATTEMPTS_IN_PIECES

    @property
    def is_first(self) -> bool:
        return self.start == self.num_cached

    @property
    def stop(self) -> int:
        return self.start + len(self.tokens)

    @property
    def judges_prompt(self) -> bool:
        """Log-probabilities of the prompt are wanted, and the client has not got them with output 0."""
        return _judges_prompt(self.prefill)

    @property
    def attempt(self) -> Attempt:
        return self.prefill.request, self.prefill.attempt


@dataclass(slots=True)
class _Work:
    prefill: Prefill
    tokens: tuple[int, ...]
    num_computed: int = 0
    runs: bool = False
    num_left_out: int = 0  # of batches since it runs
    cached_blocks: tuple[int, ...] = ()
    prompt_logprobs: list[tuple[float, TopLogprobs]] = field(default_factory=list)

    @property
    def num_left(self) -> int:
        return len(self.tokens) - self.num_computed


class PrefillQueue:
    """``blocks`` has as many blocks as ``prefixes`` may take and more: those are for requests."""

    def __init__(
        self,
        blocks: BlockAllocator[Attempt],
        chunk_tokens: int,
        limits: PrefillLimits,
        prefixes: PrefixCache[Attempt] | None = None,
        router_lost_s: float = 10.0,
    ) -> None:
        self.routers = RouterWatch(router_lost_s)
        self.blocks = blocks
        self.prefixes: PrefixCache[Attempt] = prefixes or PrefixCache(0, 1, blocks.block_size)
        self._chunk_tokens, self._limits = chunk_tokens, limits
        self._work: dict[Attempt, _Work] = {}  # in order of arrival
        self._done: dict[Attempt, None] = {}
        self.num_tokens_computed = 0

    @classmethod
    def of(
        cls, config: PrefillConfig, block_size: int, limits: PrefillLimits, router_lost_s: float = 10.0
    ) -> "PrefillQueue":
        prefixes: PrefixCache[Attempt] = PrefixCache(config.prefix_cache_bytes, limits.kv_block_bytes, block_size)
        blocks: BlockAllocator[Attempt] = BlockAllocator(config.num_kv_blocks + prefixes.max_blocks, block_size)
        return cls(blocks, config.chunk_tokens, limits, prefixes, router_lost_s)

    @property
    def num_running(self) -> int:
        return sum(work.runs for work in self._work.values())

    @property
    def num_waiting(self) -> int:
        return len(self._work) - self.num_running

    def on_prefill(self, prefill: Prefill) -> Message | None:
        """Queues it; the answer when there is something to say: Refused, or PrefillDone again."""
        attempt = (prefill.request, prefill.attempt)
        if attempt in self._done:
            return PrefillDone(*attempt)
        if any(request == prefill.request and number >= prefill.attempt for request, number in self._work):
            return None
        self._drop(prefill.request, prefill.attempt)
        tokens = prefill.prompt + prefill.outputs
        if not prefill.prompt or not 0 <= min(tokens) <= max(tokens) < self._limits.vocab_size:
            return Refused(*attempt, f"prompt is empty or has ids outside 0..{self._limits.vocab_size - 1}")
        if len(tokens) > self._limits.max_positions:
            return Refused(*attempt, f"{len(tokens)} tokens, the model has {self._limits.max_positions} positions")
        if self.blocks.blocks_for(len(tokens)) > self.blocks.num_blocks - self.prefixes.max_blocks:
            return Refused(*attempt, f"{len(tokens)} tokens, the KV cache of this worker is smaller")
        if fault := sampling_fault(prefill.sampling, self._limits.vocab_size):
            return Refused(*attempt, fault)
        self._work[attempt] = _Work(prefill, tokens)
        return None

    def on_abort(self, abort: Abort) -> None:
        self._drop(abort.request, abort.attempt)

    def on_tick(self, now: float) -> None:
        """Drops what routers asked for that are gone."""
        lost = self.routers.lost({work.prefill.router for work in self._work.values()}, now)
        for attempt in [attempt for attempt, work in self._work.items() if work.prefill.router in lost]:
            self._remove(attempt)

    def on_ask(self, ask: AskPrefill) -> Message:
        attempt = (ask.request, ask.attempt)
        if attempt in self._done:
            return PrefillDone(*attempt)
        if attempt not in self._work:
            return Unknown(*attempt)
        num_ahead = 0
        for other, work in self._work.items():
            if other == attempt:
                break
            num_ahead += work.num_left
        return PrefillQueued(*attempt, num_ahead)

    def next_batch(self) -> list[Chunk]:
        """The chunks to compute now; empty when there is no work. Each batch is followed by `on_computed`."""
        self._start_waiting()
        running = [work for work in self._work.values() if work.runs]
        budget, shares = self._chunk_tokens, [0] * len(running)
        for index in sorted(range(len(running)), key=lambda index: self._turn(running[index])):
            shares[index] = min(running[index].num_left, budget)
            budget -= shares[index]
            running[index].num_left_out += not shares[index]
        return [self._chunk(work, share) for work, share in zip(running, shares, strict=True) if share]

    def is_wanted(self, attempt: Attempt) -> bool:
        """Neither done nor aborted."""
        return attempt in self._work

    def on_computed(self, batch: list[Chunk]) -> list[Chunk]:
        """The last chunks of requests that are done now and still wanted."""
        finished = []
        for chunk in batch:
            self.num_tokens_computed += len(chunk.tokens)
            work = self._work.get(chunk.attempt)
            # One that does not run is another: aborted in this batch, and asked for again by a doubled message.
            if work is None or not work.runs:
                continue
            work.num_computed += len(chunk.tokens)
            if chunk.is_last:
                self._keep_prefix(chunk.attempt, work)
                self._remove(chunk.attempt)
                self._done[chunk.attempt] = None
                finished.append(chunk)
        while len(self._done) > MAX_DONE:
            del self._done[next(iter(self._done))]
        return finished

    def check_invariants(self) -> None:
        self.blocks.check_invariants()
        self.prefixes.check_invariants()
        owned = sum(len(self.blocks.table(attempt)) for attempt, work in self._work.items() if work.runs)
        assert owned + self.prefixes.num_blocks == self.blocks.num_used, "blocks belong to a request that does not run"
        assert all(0 <= work.num_computed < len(work.tokens) for work in self._work.values())
        requests = [request for request, _ in self._work]
        assert len(requests) == len(set(requests)), "two attempts of one request"

    def _start_waiting(self) -> None:
        for attempt, work in self._work.items():
            if work.runs:
                continue
            cached = () if _judges_prompt(work.prefill) else self.prefixes.acquire(attempt, work.tokens)
            num_cached = len(cached) * self.blocks.block_size
            if self.blocks.allocate(attempt, len(work.tokens) - num_cached) is None:
                self.prefixes.release(attempt)
                return
            work.runs, work.num_computed, work.cached_blocks = True, num_cached, cached
            self.prefixes.count(num_cached)

    def _turn(self, work: _Work) -> int:
        """Lowest first."""
        return work.num_left - work.num_left_out * self._chunk_tokens

    def _keep_prefix(self, attempt: Attempt, work: _Work) -> None:
        insertion = self.prefixes.insert(work.tokens, work.cached_blocks + self.blocks.table(attempt))
        self.blocks.give(attempt, insertion.taken, PREFIXES)
        self.blocks.free_some(PREFIXES, insertion.evicted)

    def _chunk(self, work: _Work, num_tokens: int) -> Chunk:
        prefill = work.prefill
        stop = work.num_computed + num_tokens
        return Chunk(
            prefill,
            work.num_computed,
            work.tokens[work.num_computed : stop],
            stop == len(work.tokens),
            work.cached_blocks + self.blocks.table((prefill.request, prefill.attempt)),
            work.prompt_logprobs,
            len(work.cached_blocks) * self.blocks.block_size,
        )

    def _drop(self, request: RequestId, attempt: int) -> None:
        for known in [known for known in self._work if known[0] == request and known[1] <= attempt]:
            self._remove(known)

    def _remove(self, attempt: Attempt) -> None:
        del self._work[attempt]
        self.blocks.free(attempt)
        self.prefixes.release(attempt)


def _judges_prompt(prefill: Prefill) -> bool:
    return prefill.sampling.prompt_logprobs and not prefill.outputs
