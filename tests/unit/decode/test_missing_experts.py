"""A request that was computed without an expert says so from then on; the others do not."""

from common.ids import Epoch, Incarnation, ProcessId, Rank, RequestId
from common.kv_blocks import BlockAllocator
from common.messages import Announce, KvHandoff, Sampling, TokenBatch, Tokens
from services.decode.batch_scheduler import BatchScheduler
from services.decode.delivery import Delivery
from services.decode.request import RequestLimits

ROUTER = ProcessId("router")


def _news(delivery: Delivery) -> dict[str, Tokens]:
    found: dict[str, Tokens] = {}
    for send in delivery.flush(Epoch(1), 0.0):
        assert isinstance(send.message, TokenBatch)
        found |= {tokens.request: tokens for tokens in send.message.items}
    return found


def test_only_the_affected_request_is_marked_and_stays_so() -> None:
    scheduler: BatchScheduler[RequestId] = BatchScheduler(BlockAllocator(8, 4), 4, 4)
    delivery = Delivery(scheduler, RequestLimits(vocab_size=100, max_positions=20, kv_bytes_per_token=1))
    delivery.open(Rank(0), Incarnation(7))
    for name in ("a", "b"):
        request, sampling = RequestId(name), Sampling(0.0, 1.0, 0, 1, 5)
        delivery.on_announce(Announce(request, 1, ROUTER, Incarnation(7), (1, 2), (), sampling), 0.0)
        handoff = KvHandoff(request, 1, Rank(0), Incarnation(7), 2, 10, -0.5)
        delivery.on_kv(handoff, [memoryview(bytes(2))], 0.0)
    assert not any(tokens.missed_experts for tokens in _news(delivery).values()), "prefill workers have all experts"
    delivery.admit()
    for missed in ({"a"}, set()):
        for step in delivery.steps():
            delivery.commit(step, 11, -0.5, 1.0, missed_experts=step.request in missed)
        assert {name: tokens.missed_experts for name, tokens in _news(delivery).items()} == {"a": True, "b": False}
