"""Decode ranks and prefill workers of a `World`, without a model: what they keep, repeat and forget."""

import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from common.ids import Epoch, ProcessId, RequestId
from common.messages import (
    Abort,
    Announce,
    AskPrefill,
    Have,
    KvHandoff,
    Member,
    Message,
    Prefill,
    PrefillDone,
    PrefillQueued,
    Refused,
    Release,
    TokenBatch,
    Tokens,
    TopLogprobs,
    Unknown,
)

if TYPE_CHECKING:
    from tests.unit.router.lossy_world import World

ROUTER = ProcessId("router-0")
STOP_ID = 1
ANNOUNCED_KEPT_S = 20.0


def output(prompt: tuple[int, ...], index: int) -> int:
    """The token that a model gives for this prompt at this index: 1 in 64 is the end of the sequence."""
    draw = zlib.crc32(repr((prompt, index)).encode())
    return STOP_ID if draw % 64 == 0 else 2 + draw % 1000


def logprob(prompt: tuple[int, ...], index: int) -> float:
    """Of output ``index``; prompt tokens have indices below 0."""
    return -(zlib.crc32(repr((prompt, index, "p")).encode()) % 1000) / 7


def top_logprobs(prompt: tuple[int, ...], index: int) -> TopLogprobs:
    return ((index % 7, logprob(prompt, index)),)


def prompt_logprobs(prompt: tuple[int, ...]) -> tuple[tuple[float, TopLogprobs], ...]:
    return tuple((logprob(prompt, index), top_logprobs(prompt, index)) for index in range(1 - len(prompt), 0))


def whole_output(prompt: tuple[int, ...], max_tokens: int) -> tuple[list[int], str]:
    """What a client must get, and why it ends."""
    ids: list[int] = []
    while len(ids) < max_tokens:
        ids.append(output(prompt, len(ids)))
        if ids[-1] == STOP_ID:
            return ids, "stop"
    return ids, "length"


@dataclass
class Row:
    announce: Announce
    since: float
    outputs: list[int]
    has_kv: bool = False
    repeat_at: float = 0.0
    prompt_logprobs: tuple[tuple[float, TopLogprobs], ...] = ()

    @property
    def finish(self) -> str:
        if not self.has_kv or not self.outputs:
            return ""
        if self.outputs[-1] == STOP_ID:
            return "stop"
        return "length" if len(self.outputs) >= self.announce.sampling.max_tokens else ""


@dataclass
class DecodeRank:
    member: Member
    world: "World"
    rows: dict[RequestId, Row] = field(default_factory=dict)
    aborted: dict[RequestId, int] = field(default_factory=dict)  # highest attempt given up

    def on_message(self, message: Message) -> None:
        match message:
            case Announce(request=request, attempt=attempt) if message.incarnation == self.member.incarnation:
                row = self.rows.get(request)
                if attempt > self.aborted.get(request, -1) and (row is None or row.announce.attempt < attempt):
                    row = self.rows[request] = Row(message, self.world.now, list(message.outputs))
                    if message.computes_prompt:
                        self._compute_prompt(row)
            case KvHandoff(request=request, attempt=attempt):
                self._on_kv(message)
            case Have(request=request, attempt=attempt, num_outputs=have):
                row = self.rows.get(request)
                if row is None or row.announce.attempt != attempt:
                    self.say(Unknown(request, attempt))
                elif row.has_kv:
                    self.say_tokens(row, have)
                else:
                    self.say(self._batch(Tokens(request, attempt, have, (), ())))
            case Abort(request=request, attempt=attempt) | Release(request=request, attempt=attempt):
                self.aborted[request] = max(attempt, self.aborted.get(request, -1))
                row = self.rows.get(request)
                if row is not None and row.announce.attempt <= attempt:
                    del self.rows[request]
            case _:
                raise AssertionError(f"nobody sends a decode rank {message}")

    def _on_kv(self, kv: KvHandoff) -> None:
        row = self.rows.get(kv.request)
        if row is None or row.announce.attempt != kv.attempt or kv.incarnation != self.member.incarnation or row.has_kv:
            return
        if sum(row.has_kv for row in self.rows.values()) >= self.world.rows_per_rank:
            del self.rows[kv.request]
            self.say(Refused(kv.request, kv.attempt, "no free KV blocks"))
            return
        row.has_kv = True
        row.prompt_logprobs = kv.prompt_logprobs
        row.outputs.append(kv.first_token)
        self.say_tokens(row, len(row.outputs) - 1)

    def _compute_prompt(self, row: Row) -> None:
        announce = row.announce
        self.world.num_prompts_on_ranks += 1
        row.has_kv = True
        if announce.sampling.prompt_logprobs and not announce.outputs:
            row.prompt_logprobs = prompt_logprobs(announce.prompt)
        row.outputs.append(output(announce.prompt, len(row.outputs)))
        self.say_tokens(row, len(row.outputs) - 1)

    def on_round(self) -> None:
        for request, row in list(self.rows.items()):
            if not row.has_kv:
                # Its abort may have been lost, and without KV the rank has nothing to say that could be answered.
                if self.world.now - row.since > ANNOUNCED_KEPT_S:
                    del self.rows[request]
                continue
            if not row.finish:
                row.outputs.append(output(row.announce.prompt, len(row.outputs)))
                self.say_tokens(row, len(row.outputs) - 1)
            elif self.world.now >= row.repeat_at:
                row.repeat_at = self.world.now + 0.5
                self.say_tokens(row, len(row.outputs) - 1)

    def say_tokens(self, row: Row, start: int) -> None:
        announce, ids = row.announce, tuple(row.outputs[start:])
        tokens = Tokens(announce.request, announce.attempt, start, ids, (), row.finish)
        if announce.sampling.logprobs:
            indices = range(start, start + len(ids))
            tokens = msgspec.structs.replace(
                tokens,
                logprobs=tuple(logprob(announce.prompt, index) for index in indices),
                top_logprobs=tuple(top_logprobs(announce.prompt, index) for index in indices),
                prompt_logprobs=row.prompt_logprobs if start == 0 else (),
            )
        self.say(self._batch(tokens))

    def _batch(self, tokens: Tokens) -> TokenBatch:
        member = self.member
        return TokenBatch(member.rank, member.incarnation, Epoch(0), (tokens,), len(self.rows), 100)

    def say(self, message: Message) -> None:
        self.world.send(self.member.process, ROUTER, message)


@dataclass
class PrefillWorker:
    process: ProcessId
    world: "World"
    queue: list[Prefill] = field(default_factory=list)

    def on_message(self, message: Message) -> None:
        match message:
            case Prefill():
                self.queue.append(message)
            case AskPrefill(request=request, attempt=attempt):
                queued = any((item.request, item.attempt) == (request, attempt) for item in self.queue)
                answer = PrefillQueued(request, attempt) if queued else Unknown(request, attempt)
                self.world.send(self.process, ROUTER, answer)
            case Abort(request=request, attempt=attempt):
                self.queue = [i for i in self.queue if i.request != request or i.attempt > attempt]
            case _:
                raise AssertionError(f"nobody sends a prefill worker {message}")

    def on_round(self) -> None:
        for _ in range(min(len(self.queue), 4)):
            item = self.queue.pop(0)
            have = len(item.outputs)
            first = output(item.prompt, have)
            num_tokens = len(item.prompt) + have
            kv = KvHandoff(item.request, item.attempt, item.rank, item.incarnation, num_tokens, first, 0.0)
            if item.sampling.prompt_logprobs and have == 0:
                kv = msgspec.structs.replace(kv, prompt_logprobs=prompt_logprobs(item.prompt))
            for rank in self.world.ranks:
                if rank.member.endpoint == item.endpoint:
                    self.world.send(self.process, rank.member.process, kv)
            self.world.send(self.process, ROUTER, PrefillDone(item.request, item.attempt))
