"""Messages for a `Delivery`, and rounds without a model."""

from common.ids import Epoch, Incarnation, ProcessId, Rank, RequestId
from common.kv_blocks import BlockAllocator
from common.messages import (
    Announce,
    KvHandoff,
    KvPart,
    Sampling,
    TokenBatch,
    Tokens,
)
from services.decode.batch_scheduler import BatchScheduler
from services.decode.delivery import Delivery
from services.decode.request import RequestLimits

ROUTER, PREFILL = ProcessId("router"), ProcessId("prefill")
STOP = 99


def make(
    num_blocks: int = 8,
    max_batch: int = 4,
    max_waiting: int = 4,
    handoff_bytes: int = 1 << 20,
    prompt_tokens: int = 4,
    kv_reserve_tokens: int = 2,
    interval_s: float = 0.0,
) -> Delivery:
    scheduler: BatchScheduler[RequestId] = BatchScheduler(BlockAllocator(num_blocks, 4), max_batch, max_waiting)
    limits = RequestLimits(vocab_size=100, max_positions=20, kv_bytes_per_token=1)
    delivery = Delivery(scheduler, limits, handoff_bytes, prompt_tokens, kv_reserve_tokens, interval_s=interval_s)
    delivery.open(Rank(0), Incarnation(7))
    return delivery


def announce(
    name: str = "a",
    attempt: int = 1,
    outputs: tuple[int, ...] = (),
    incarnation: int = 7,
    max_tokens: int = 3,
    num_prompt: int = 2,
    computes: bool = False,
) -> Announce:
    sampling = Sampling(0.0, 1.0, 0, 1, max_tokens, stop_token_ids=(STOP,))
    prompt = tuple(range(1, num_prompt + 1))
    return Announce(RequestId(name), attempt, ROUTER, Incarnation(incarnation), prompt, outputs, sampling, computes)


def kv(name: str = "a", attempt: int = 1, num_tokens: int = 2, incarnation: int = 7, token: int = 10) -> KvHandoff:
    return KvHandoff(RequestId(name), attempt, Rank(0), Incarnation(incarnation), num_tokens, token, -0.5)


def frames(num_tokens: int = 2) -> list[memoryview]:
    return [memoryview(bytes(num_tokens))]


def news(delivery: Delivery, now: float = 0.0) -> list[Tokens]:
    """What the routers are told now."""
    sends = delivery.flush(Epoch(5), now)
    batches = [send.message for send in sends]
    assert all(send.peer == ROUTER for send in sends)
    return [item for batch in batches if isinstance(batch, TokenBatch) for item in batch.items]


def tokens(start: int, *ids: int, finish: str = "", attempt: int = 1, first_logprob: float = -1.0) -> Tokens:
    return Tokens(RequestId("a"), attempt, start, ids, (first_logprob,) * len(ids), finish)


def part(start: int, num_tokens: int = 1, name: str = "a", attempt: int = 1, incarnation: int = 7) -> KvPart:
    return KvPart(RequestId(name), attempt, Rank(0), Incarnation(incarnation), 0, 1, start, num_tokens)


def run(delivery: Delivery, token: int = 11, now: float = 1.0) -> None:
    """One clean round."""
    delivery.make_room()
    delivery.admit()
    for step in delivery.steps():
        if step.samples:
            delivery.commit(step, token, -1.0, now)
        else:
            delivery.advance(step)
