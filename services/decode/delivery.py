"""The requests of a decode rank, from their announcement to their release. Pure; PROTOCOL section 6.

    announce --> ANNOUNCED --KV--> HELD --blocks--> RUNNING --stop or length--> FINISHED --release--> gone
                     any of them --abort, higher attempt--> gone (a tombstone stays)

Invariants: at most one attempt of a request lives; outputs only grow; what was sent once is what is sent again; KV is
taken only for an announced attempt of this incarnation. Everything that is kept has a bound in number and in time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

from common.ids import NO_RANK, Epoch, Incarnation, ProcessId, Rank, RequestId
from common.messages import (
    Abort,
    Announce,
    Have,
    KvHandoff,
    Message,
    Refused,
    Release,
    Sampling,
    TokenBatch,
    Tokens,
    TopLogprobs,
    Unknown,
)
from common.sampling_bounds import sampling_fault
from services.decode.actions import Send
from services.decode.batch_scheduler import BatchScheduler
from services.decode.early_kv import EarlyKv, Frames
from services.decode.tombstones import Tombstones

MAX_REQUESTS = 4096
REPEAT_S = 0.5
FINISHED_KEPT_S = 120.0
ANNOUNCED_KEPT_S = 600.0


class Stage(Enum):
    ANNOUNCED = "announced"
    HELD = "held"  # KV is here, no blocks for it yet
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What the model and this rank's memory allow."""

    vocab_size: int
    max_positions: int
    kv_bytes_per_token: int


@dataclass(slots=True)
class _Request:
    announce: Announce
    max_outputs: int
    since: float
    ids: list[int]
    logprobs: list[float] = field(default_factory=list)  # of the outputs that are no announced ones
    tops: list[TopLogprobs] = field(default_factory=list)  # of the same, if asked for
    prompt_logprobs: tuple[tuple[float, TopLogprobs], ...] = ()
    stage: Stage = Stage.ANNOUNCED
    finish: str = ""
    frames: Frames = ()
    repeat_at: float = 0.0

    def tokens(self, start: int) -> Tokens:
        first = start - len(self.announce.outputs)
        announce = self.announce
        return Tokens(
            announce.request,
            announce.attempt,
            start,
            tuple(self.ids[start:]),
            tuple(self.logprobs[first:]),
            self.finish,
            tuple(self.tops[first:]),
            self.prompt_logprobs if start == 0 else (),
        )


@dataclass(frozen=True, slots=True)
class Step:
    """One running request's part in a round: compute ``token_id`` at ``position``, sample output ``output_index``.

    ``outputs`` is the request's own list, to be read before the next `commit`.
    """

    request: RequestId
    token_id: int
    position: int
    output_index: int
    sampling: Sampling
    block_table: tuple[int, ...]
    prompt: tuple[int, ...] = ()
    outputs: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Admission:
    """Write these KV rows, [layers, num_tokens, row], into these blocks before the next round."""

    request: RequestId
    num_tokens: int
    frames: Frames
    block_table: tuple[int, ...]


class Delivery:
    def __init__(self, scheduler: BatchScheduler[RequestId], limits: RequestLimits) -> None:
        self._scheduler, self._limits = scheduler, limits
        self._rank, self._incarnation = NO_RANK, Incarnation(0)
        self._requests: dict[RequestId, _Request] = {}
        self._early_kv = EarlyKv()
        self._tombstones = Tombstones()
        self._news: dict[ProcessId, list[Tokens]] = {}
        self._repeat_at = 0.0
        self.num_committed = 0
        self.num_stale = 0
        self.num_prompt_tokens = 0  # computed here; prefill workers do that, so it stays 0

    def open(self, rank: Rank, incarnation: Incarnation) -> None:
        """A new slot: nothing of the last one counts any more."""
        self._scheduler.clear()
        self._requests.clear()
        self._early_kv.clear()
        self._tombstones.clear()
        self._news.clear()
        self._rank, self._incarnation = rank, incarnation

    def on_message(self, peer: ProcessId, message: Message, frames: Frames, now: float) -> list[Send]:
        """Any message of a router or a prefill worker; others are none of this class's business."""
        match message:
            case Announce():
                return self.on_announce(message, now)
            case KvHandoff():
                return self.on_kv(message, frames, now)
            case Have():
                return self.on_have(message, peer)
            case Abort(request=request, attempt=attempt) | Release(request=request, attempt=attempt):
                self.on_end(request, attempt)
            case _:
                pass
        return []

    def on_announce(self, announce: Announce, now: float) -> list[Send]:
        request, attempt = announce.request, announce.attempt
        if announce.incarnation != self._incarnation or self._rank == NO_RANK:
            self.num_stale += 1
            return [_refused(announce, f"incarnation {announce.incarnation} is not here")]
        known = self._requests.get(request)
        if self._tombstones.covers(request, attempt) or (known and known.announce.attempt >= attempt):
            self.num_stale += 1
            return []
        if known:
            self._drop(request)
        if reason := self._reason_to_refuse(announce):
            self._tombstones.bury(request, attempt)
            return [_refused(announce, reason)]
        max_outputs = min(announce.sampling.max_tokens, self._limits.max_positions - len(announce.prompt))
        self._requests[request] = _Request(announce, max_outputs, now, list(announce.outputs))
        early = self._early_kv.take(request, attempt)
        return self.on_kv(*early, now) if early else []

    def on_kv(self, handoff: KvHandoff, frames: Frames, now: float) -> list[Send]:
        known = self._requests.get(handoff.request)
        if (handoff.rank, handoff.incarnation) != (self._rank, self._incarnation):
            self.num_stale += 1
            return []
        if known is None or known.announce.attempt < handoff.attempt:
            if self._tombstones.covers(handoff.request, handoff.attempt):
                self.num_stale += 1
            else:
                self._early_kv.keep(handoff, frames, now)
            return []
        if known.announce.attempt > handoff.attempt or known.stage is not Stage.ANNOUNCED:
            self.num_stale += 1
            return []
        num_tokens = len(known.announce.prompt) + len(known.announce.outputs)
        num_bytes = num_tokens * self._limits.kv_bytes_per_token
        if handoff.num_tokens != num_tokens or [frame.nbytes for frame in frames] != [num_bytes]:
            return self._refuse(known, f"KV of {handoff.num_tokens} tokens came, {num_tokens} were announced")
        if not 0 <= handoff.first_token < self._limits.vocab_size:
            return self._refuse(known, f"first token {handoff.first_token} is not in the vocabulary")
        known.stage, known.frames = Stage.HELD, frames
        known.prompt_logprobs = handoff.prompt_logprobs
        self._append(known, handoff.first_token, handoff.first_logprob, handoff.first_top, now)
        if not known.finish:
            reason = self._scheduler.submit(handoff.request, len(known.announce.prompt) + known.max_outputs - 1)
            if reason:
                return self._refuse(known, reason)
        self._tell(known, len(known.ids) - 1)
        return []

    def on_have(self, have: Have, peer: ProcessId) -> list[Send]:
        known = self._requests.get(have.request)
        if known is None or known.announce.attempt != have.attempt:
            return [Send(peer, Unknown(have.request, have.attempt))]
        if not len(known.announce.outputs) <= have.num_outputs <= len(known.ids):
            return [Send(peer, Unknown(have.request, have.attempt))]
        self._tell(known, have.num_outputs)
        return []

    def on_end(self, request: RequestId, attempt: int) -> None:
        """Abort or Release: this and all earlier attempts are over."""
        self._tombstones.bury(request, attempt)
        self._early_kv.take(request, attempt)
        known = self._requests.get(request)
        if known and known.announce.attempt <= attempt:
            self._drop(request)

    def on_tick(self, now: float) -> None:
        self._early_kv.on_tick(now)
        if now < self._repeat_at:
            return
        self._repeat_at = now + REPEAT_S / 5
        for request, known in list(self._requests.items()):
            if known.stage is Stage.FINISHED and now >= known.repeat_at:
                known.repeat_at = now + REPEAT_S
                self._tell(known, len(known.ids) - 1)
            kept_s = {Stage.FINISHED: FINISHED_KEPT_S, Stage.ANNOUNCED: ANNOUNCED_KEPT_S}.get(known.stage)
            if kept_s is not None and now - known.since > kept_s:
                self._drop(request)

    def admit(self) -> list[Admission]:
        """Requests that run from the next round on. Their KV must be written before it."""
        admissions = []
        for request, table in self._scheduler.admit():
            known = self._requests[request]
            num_tokens = len(known.announce.prompt) + len(known.announce.outputs)
            admissions.append(Admission(request, num_tokens, known.frames, table))
            known.stage, known.frames = Stage.RUNNING, ()
        return admissions

    def steps(self) -> Iterator[Step]:
        """What the next round computes, a token for each running request."""
        for request, table in self._scheduler.batch():
            known = self._requests[request]
            announce, ids = known.announce, known.ids
            position = len(announce.prompt) + len(ids) - 1
            yield Step(request, ids[-1], position, len(ids), announce.sampling, table, announce.prompt, ids)

    def commit(self, step: Step, token: int, logprob: float, now: float, top: TopLogprobs = ()) -> None:
        """A clean round's token of one request. KV of the round is written already."""
        known = self._requests[step.request]
        assert known.stage is Stage.RUNNING and step.output_index == len(known.ids), "a token out of order"
        self.num_prompt_tokens += step.position < len(known.announce.prompt)
        self._append(known, token, logprob, top, now)
        self._tell(known, step.output_index)
        if known.finish:
            self._scheduler.remove(step.request)

    def flush(self, epoch: Epoch) -> list[Send]:
        """All news since the last call, one message for each router."""
        blocks = self._scheduler.blocks
        sends = [
            Send(
                router,
                TokenBatch(
                    self._rank,
                    self._incarnation,
                    epoch,
                    tuple(items),
                    self._scheduler.num_running + self._scheduler.num_waiting,
                    blocks.num_free,
                ),
            )
            for router, items in self._news.items()
        ]
        self._news.clear()
        return sends

    def check_invariants(self) -> None:
        self._scheduler.check_invariants()
        stages = [known.stage for known in self._requests.values()]
        assert stages.count(Stage.RUNNING) == self._scheduler.num_running
        assert stages.count(Stage.HELD) == self._scheduler.num_waiting
        assert len(self._requests) <= MAX_REQUESTS
        for known in self._requests.values():
            assert len(known.ids) == len(known.announce.outputs) + len(known.logprobs) <= max(known.max_outputs, 1)
            assert bool(known.finish) == (known.stage is Stage.FINISHED)

    def _append(self, known: _Request, token: int, logprob: float, top: TopLogprobs, now: float) -> None:
        sampling = known.announce.sampling
        known.ids.append(token)
        known.logprobs.append(logprob)
        if sampling.num_top_logprobs:
            known.tops.append(top)
        self.num_committed += 1
        if token in sampling.stop_ids and len(known.ids) > sampling.min_tokens:
            known.finish = "stop"
        elif len(known.ids) >= known.max_outputs:
            known.finish = "length"
        if known.finish:
            known.stage, known.frames = Stage.FINISHED, ()
            known.since, known.repeat_at = now, now + REPEAT_S

    def _tell(self, known: _Request, start: int) -> None:
        self._news.setdefault(known.announce.router, []).append(known.tokens(start))

    def _reason_to_refuse(self, announce: Announce) -> str:
        tokens = announce.prompt + announce.outputs
        if len(self._requests) >= MAX_REQUESTS:
            return f"{MAX_REQUESTS} requests are here already"
        if not announce.prompt or not 0 <= min(tokens) <= max(tokens) < self._limits.vocab_size:
            return f"prompt is empty or has ids outside 0..{self._limits.vocab_size - 1}"
        if len(announce.prompt) >= self._limits.max_positions:
            return f"prompt of {len(announce.prompt)} tokens, the model has {self._limits.max_positions} positions"
        if len(announce.outputs) >= min(
            announce.sampling.max_tokens, self._limits.max_positions - len(announce.prompt)
        ):
            return "no token is left to compute"
        return sampling_fault(announce.sampling, self._limits.vocab_size)

    def _refuse(self, known: _Request, reason: str) -> list[Send]:
        self._tombstones.bury(known.announce.request, known.announce.attempt)
        self._drop(known.announce.request)
        return [_refused(known.announce, reason)]

    def _drop(self, request: RequestId) -> None:
        self._scheduler.remove(request)
        del self._requests[request]


def _refused(announce: Announce, reason: str) -> Send:
    message: Message = Refused(announce.request, announce.attempt, reason)
    return Send(announce.router, message)
