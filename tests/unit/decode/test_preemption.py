"""When KV blocks run out: the youngest make room, nobody twice, everybody ends, and no block is lost on the way."""

from collections import Counter
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from common.ids import Epoch, Incarnation, ProcessId, Rank, RequestId
from common.kv_blocks import BlockAllocator
from common.messages import Announce, KvHandoff, Refused, Sampling, TokenBatch
from services.decode.actions import Send
from services.decode.batch_scheduler import BatchScheduler
from services.decode.delivery import Delivery
from services.decode.request import RequestLimits

ROUTER = ProcessId("router")
BLOCK = 4


def _delivery(num_blocks: int, reserve: int) -> Delivery:
    scheduler: BatchScheduler[RequestId] = BatchScheduler(BlockAllocator(num_blocks, BLOCK), 8, 64)
    limits = RequestLimits(vocab_size=1000, max_positions=200, kv_bytes_per_token=1)
    delivery = Delivery(scheduler, limits, prompt_tokens=6, kv_reserve_tokens=reserve)
    delivery.open(Rank(0), Incarnation(7))
    return delivery


@dataclass
class Router:
    """Places again what is refused, on the same rank, with KV or without in turn."""

    delivery: Delivery
    requests: dict[str, tuple[int, int]]  # name -> prompt tokens, max_tokens
    outputs: dict[str, list[int]] = field(default_factory=dict)
    attempts: Counter[str] = field(default_factory=Counter)
    preempted: Counter[str] = field(default_factory=Counter)
    finished: list[str] = field(default_factory=list)

    def place(self, name: str) -> None:
        num_prompt, max_tokens = self.requests[name]
        prompt, outputs = tuple(range(1, num_prompt + 1)), tuple(self.outputs.setdefault(name, []))
        self.attempts[name] += 1
        attempt, request, computes = self.attempts[name], RequestId(name), self.attempts[name] % 2 == 0
        sampling, is_back = Sampling(0.0, 1.0, 0, 1, max_tokens), self.preempted[name] > 0
        self.take(
            self.delivery.on_announce(
                Announce(request, attempt, ROUTER, Incarnation(7), prompt, outputs, sampling, computes, is_back), 0.0
            )
        )
        if not computes:
            num_tokens = num_prompt + len(outputs)
            kv = KvHandoff(request, attempt, Rank(0), Incarnation(7), num_tokens, 100 + len(outputs), -1.0)
            self.take(self.delivery.on_kv(kv, [memoryview(bytes(num_tokens))], 0.0))

    def take(self, sends: list[Send]) -> None:
        for send in sends:
            match send.message:
                case TokenBatch(items=items):
                    for item in items:
                        outputs = self.outputs[item.request]
                        assert item.start <= len(outputs)
                        outputs += item.ids[len(outputs) - item.start :]
                        if item.finish and item.request not in self.finished:
                            self.finished.append(item.request)
                case Refused(request=request, preempted=True):
                    self.preempted[request] += 1
                    self.place(request)
                case other:
                    raise AssertionError(other)

    def round(self) -> None:
        delivery = self.delivery
        preempted = delivery.make_room()
        delivery.admit()
        self.take(delivery.flush(Epoch(5), 0.0))
        self.take(preempted)
        for step in delivery.steps():
            assert step.stop <= BLOCK * len(step.block_table), "no block for its KV"
            if step.samples:
                delivery.commit(step, 100 + step.output_index, -1.0, 0.0)
            else:
                delivery.advance(step)
        self.take(delivery.flush(Epoch(5), 0.0))
        delivery.check_invariants()

    def run(self) -> None:
        for name in self.requests:
            self.place(name)
        for _ in range(3000):
            if len(self.finished) == len(self.requests):
                break
            self.round()
        for name, (_, max_tokens) in self.requests.items():
            assert self.outputs[name] == list(range(100, 100 + max_tokens)), "no progress, or a token twice"
        assert self.delivery._scheduler.blocks.num_used == 0
        assert max(self.preempted.values(), default=0) <= 1, "nobody makes room twice"


def test_the_youngest_makes_room_and_comes_back() -> None:
    router = Router(_delivery(num_blocks=6, reserve=2), {"old": (4, 16), "young": (4, 16)})
    router.run()
    assert router.preempted == {"young": 1} and router.finished == ["old", "young"]
    assert router.delivery.num_preempted == 1


def test_with_room_for_all_nobody_is_preempted() -> None:
    router = Router(_delivery(num_blocks=10, reserve=2), {"a": (4, 16), "b": (4, 16)})
    router.run()
    assert not router.preempted


def test_a_request_alone_has_all_blocks() -> None:
    router = Router(_delivery(num_blocks=5, reserve=1), {"a": (4, 17)})
    router.run()
    assert not router.preempted


@settings(deadline=None)
@given(
    st.integers(4, 14),
    st.integers(1, 20),
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 16)), min_size=1, max_size=9),
)
def test_everybody_ends(num_blocks: int, reserve: int, sizes: list[tuple[int, int]]) -> None:
    most = num_blocks * BLOCK
    requests = {str(n): (prompt, min(outputs, most - prompt + 1)) for n, (prompt, outputs) in enumerate(sizes)}
    Router(_delivery(num_blocks, reserve), requests).run()
