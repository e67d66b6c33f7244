"""Which prompt tokens are computed next: chunks of many requests in one batch, in order of arrival. Pure.

    on_prefill --> WAITING --blocks--> RUNNING --last chunk computed--> done
                     either --abort, higher attempt--> gone

A batch holds at most ``chunk_tokens`` tokens. While others run, one request gets at most half of them, so a short
prompt behind a long one waits for a few batches and not for all of them; what nobody else wants it gets all the same.

Events may come while a batch is computed: blocks that an abort frees are given out only by the next `next_batch`, so
nobody writes where a running batch still does, and its chunks of requests that are gone are ignored.
"""

from dataclasses import dataclass, field

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
from common.sampling_bounds import sampling_fault

MAX_DONE = 1024  # attempts remembered after their end, so that a lost PrefillDone can be said again

Attempt = tuple[RequestId, int]


@dataclass(frozen=True, slots=True)
class PrefillLimits:
    """What the model allows."""

    vocab_size: int
    max_positions: int


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

    @property
    def judges_prompt(self) -> bool:
        """Log-probabilities of the prompt are wanted, and the client has not got them with output 0."""
        return self.prefill.sampling.prompt_logprobs and not self.prefill.outputs

    @property
    def attempt(self) -> Attempt:
        return self.prefill.request, self.prefill.attempt


@dataclass(slots=True)
class _Work:
    prefill: Prefill
    tokens: tuple[int, ...]
    num_computed: int = 0
    runs: bool = False
    prompt_logprobs: list[tuple[float, TopLogprobs]] = field(default_factory=list)

    @property
    def num_left(self) -> int:
        return len(self.tokens) - self.num_computed


class PrefillQueue:
    def __init__(self, blocks: BlockAllocator[Attempt], chunk_tokens: int, limits: PrefillLimits) -> None:
        self.blocks = blocks
        self._chunk_tokens, self._limits = chunk_tokens, limits
        self._work: dict[Attempt, _Work] = {}  # in order of arrival
        self._done: dict[Attempt, None] = {}
        self.num_tokens_computed = 0

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
        if self.blocks.blocks_for(len(tokens)) > self.blocks.num_blocks:
            return Refused(*attempt, f"{len(tokens)} tokens, the KV cache of this worker is smaller")
        if fault := sampling_fault(prefill.sampling, self._limits.vocab_size):
            return Refused(*attempt, fault)
        self._work[attempt] = _Work(prefill, tokens)
        return None

    def on_abort(self, abort: Abort) -> None:
        self._drop(abort.request, abort.attempt)

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
        for attempt, work in self._work.items():
            if not work.runs and self.blocks.allocate(attempt, len(work.tokens)) is None:
                break
            work.runs = True
        running = [work for work in self._work.values() if work.runs]
        budget = self._chunk_tokens
        shares = [0] * len(running)
        for most in (max(1, budget // 2), budget):
            for index, work in enumerate(running):
                more = min(work.num_left, most, shares[index] + budget) - shares[index]
                shares[index] += max(more, 0)
                budget -= max(more, 0)
        return [self._chunk(work, share) for work, share in zip(running, shares, strict=True) if share]

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
                self._remove(chunk.attempt)
                self._done[chunk.attempt] = None
                finished.append(chunk)
        while len(self._done) > MAX_DONE:
            del self._done[next(iter(self._done))]
        return finished

    def check_invariants(self) -> None:
        self.blocks.check_invariants()
        owned = sum(len(self.blocks.table(attempt)) for attempt, work in self._work.items() if work.runs)
        assert owned == self.blocks.num_used, "blocks belong to a request that does not run"
        assert all(0 <= work.num_computed < len(work.tokens) for work in self._work.values())
        requests = [request for request, _ in self._work]
        assert len(requests) == len(set(requests)), "two attempts of one request"

    def _chunk(self, work: _Work, num_tokens: int) -> Chunk:
        prefill = work.prefill
        stop = work.num_computed + num_tokens
        return Chunk(
            prefill,
            work.num_computed,
            work.tokens[work.num_computed : stop],
            stop == len(work.tokens),
            self.blocks.table((prefill.request, prefill.attempt)),
            work.prompt_logprobs,
        )

    def _drop(self, request: RequestId, attempt: int) -> None:
        for known in [known for known in self._work if known[0] == request and known[1] <= attempt]:
            self._remove(known)

    def _remove(self, attempt: Attempt) -> None:
        del self._work[attempt]
        self.blocks.free(attempt)
