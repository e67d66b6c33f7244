"""A decode rank that computes nothing: its tokens are a function of prompt and index, as a model's are at a seed."""

import asyncio
import zlib
from dataclasses import dataclass
from pathlib import Path

import zmq
import zmq.asyncio

from common.ids import Epoch, Incarnation, ProcessId, Rank, RequestId
from common.messages import (
    Abort,
    Announce,
    Have,
    Member,
    Refused,
    Release,
    TokenBatch,
    Tokens,
    TopLogprobs,
    Unknown,
)
from common.model.tokenizer import Tokenizer
from common.transport import Endpoint

TINY_RANDOM = Path(__file__).resolve().parents[1] / "fixtures" / "tiny-random"
TOKENIZER = Tokenizer.load(TINY_RANDOM)
EOS = 1


def token(prompt: tuple[int, ...], index: int) -> int:
    return 4 + zlib.crc32(repr((prompt, index)).encode()) % 94


def logprob(prompt: tuple[int, ...], index: int) -> float:
    return -(zlib.crc32(repr((prompt, index, "p")).encode()) + 1) / 2**31


def alternatives(prompt: tuple[int, ...], index: int, count: int) -> TopLogprobs:
    """What the fake model calls the likeliest tokens at ``index``; the chosen one is the second."""
    others = [4 + (token(prompt, index) - 4 + step) % 94 for step in (1, *range(count, 1, -1))]
    ids = [others[0], token(prompt, index), *others[1:]][:count]
    return tuple((id, logprob(prompt, index) + 0.25 - 0.25 * place) for place, id in enumerate(ids))


def prompt_logprobs(prompt: tuple[int, ...], count: int) -> tuple[tuple[float, TopLogprobs], ...]:
    """Of all prompt tokens but the first."""
    positions = range(1 - len(prompt), 0)
    return tuple((logprob(prompt, position), alternatives(prompt, position, count)) for position in positions)


def expected_text(prompt: tuple[int, ...], num_tokens: int) -> str:
    return TOKENIZER.decode([token(prompt, index) for index in range(num_tokens)])


@dataclass
class _Row:
    """A request as a fake decode rank holds it."""

    announce: Announce
    router: ProcessId
    outputs: list[int]
    has_kv: bool = False
    num_sent: int = 0


class FakeDecode:
    """One token a round for every request that has its KV."""

    def __init__(self, context: zmq.asyncio.Context, rank: int, incarnation: int) -> None:
        self.rank, self.incarnation = Rank(rank), Incarnation(incarnation)
        self.process = ProcessId(f"decode-{rank}-{incarnation}")
        self.endpoint = Endpoint(context)
        self.rows: dict[RequestId, _Row] = {}
        self.aborted: asyncio.Queue[Abort] = asyncio.Queue()
        self.released: asyncio.Queue[Release] = asyncio.Queue()
        self.stop_after = -1  # outputs after which the model says end of sequence
        self.round_s = 0.002
        self.paused = False
        self.num_together = 1  # tokens in a message, but for the first and the last
        self.pause_at = -1  # outputs at which a request makes no progress

    def member(self) -> Member:
        return Member(self.rank, self.incarnation, self.process, "127.0.0.1", self.endpoint.address("127.0.0.1"), "")

    def take_kv(self, request: RequestId, attempt: int) -> None:
        row = self.rows.get(request)
        if row is not None and row.announce.attempt == attempt:
            row.has_kv = True

    async def listen(self) -> None:
        while True:
            incoming = await self.endpoint.receive()
            match incoming.message:
                case Announce() as announce:
                    outputs = list(announce.outputs)
                    self.rows[announce.request] = _Row(announce, incoming.peer, outputs, num_sent=len(outputs))
                case Abort() as abort:
                    self.rows.pop(abort.request, None)
                    self.aborted.put_nowait(abort)
                case Release() as release:
                    self.rows.pop(release.request, None)
                    self.released.put_nowait(release)
                case Have(request=request, attempt=attempt, num_outputs=have):
                    row = self.rows.get(request)
                    if row is None:
                        self.endpoint.send(incoming.peer, Unknown(request, attempt))
                    else:
                        self._send(row, have)
                case _:
                    pass

    async def run_rounds(self) -> None:
        while True:
            await asyncio.sleep(self.round_s)
            for row in list(self.rows.values()):
                paused = self.paused or len(row.outputs) == self.pause_at
                if row.has_kv and not paused and not self._finish(row):
                    row.outputs.append(self._next(row))
                    is_first = len(row.outputs) == len(row.announce.outputs) + 1
                    if is_first or self._finish(row) or len(row.outputs) - row.num_sent >= self.num_together:
                        self._send(row, row.num_sent)
                        row.num_sent = len(row.outputs)

    def preempt(self, request: RequestId) -> None:
        """Gives it up for lack of KV blocks: the router has its tokens, and places it again."""
        row = self.rows.pop(request)
        refusal = Refused(request, row.announce.attempt, "no KV blocks left", preempted=True)
        self.endpoint.send(row.router, refusal)

    def _next(self, row: _Row) -> int:
        at_end = len(row.outputs) == self.stop_after and not row.announce.sampling.ignore_eos
        return EOS if at_end else token(row.announce.prompt, len(row.outputs))

    def _finish(self, row: _Row) -> str:
        sampling, num_outputs = row.announce.sampling, len(row.outputs)
        if num_outputs > sampling.min_tokens and row.outputs[-1] in sampling.stop_ids:
            return "stop"
        return "length" if num_outputs >= sampling.max_tokens else ""

    def _send(self, row: _Row, start: int) -> None:
        announce, ids = row.announce, tuple(row.outputs[start:])
        prompt, sampling = announce.prompt, announce.sampling
        indices = range(start, start + len(ids))
        tokens = Tokens(
            announce.request,
            announce.attempt,
            start,
            ids,
            tuple(logprob(prompt, index) for index in indices) if sampling.logprobs else (),
            self._finish(row),
            tuple(alternatives(prompt, index, sampling.num_top_logprobs) for index in indices)
            if sampling.num_top_logprobs
            else (),
            prompt_logprobs(prompt, sampling.num_top_logprobs) if sampling.prompt_logprobs and start == 0 else (),
        )
        batch = TokenBatch(self.rank, self.incarnation, Epoch(0), (tokens,), len(self.rows), 1000)
        self.endpoint.send(row.router, batch)
