"""Stop ids, min_tokens and log-probabilities at a decode rank: of the whole request, not of one attempt."""

from common.ids import Epoch, Incarnation, ProcessId, Rank, RequestId
from common.kv_blocks import BlockAllocator
from common.messages import Announce, Have, KvHandoff, Sampling, TokenBatch, Tokens, TopLogprobs
from services.decode.batch_scheduler import BatchScheduler
from services.decode.delivery import REPEAT_S, Delivery
from services.decode.request import RequestLimits

ROUTER, REQUEST = ProcessId("router"), RequestId("a")
STOP, OWN_STOP = 99, 98
TOP: TopLogprobs = ((4, -0.25), (5, -1.5))


def _delivery() -> Delivery:
    scheduler: BatchScheduler[RequestId] = BatchScheduler(BlockAllocator(8, 4), 4, 4)
    delivery = Delivery(scheduler, RequestLimits(vocab_size=100, max_positions=20, kv_bytes_per_token=1))
    delivery.open(Rank(0), Incarnation(7))
    return delivery


def _sampling(**fields: object) -> Sampling:
    return Sampling(0.0, 1.0, 0, 1, 9, stop_token_ids=(STOP,), **fields)  # type: ignore[arg-type]


def _begin(
    sampling: Sampling, outputs: tuple[int, ...] = (), first: int = 10, prompt_logprobs: bool = False
) -> tuple[Delivery, Tokens]:
    """A delivery with one request, and what the router is told of its first token."""
    delivery = _delivery()
    num_tokens = 2 + len(outputs)
    delivery.on_announce(Announce(REQUEST, 1, ROUTER, Incarnation(7), (1, 2), outputs, sampling), 0.0)
    judged = ((-2.0, TOP),) if prompt_logprobs else ()
    top = TOP if sampling.num_top_logprobs else ()
    kv = KvHandoff(REQUEST, 1, Rank(0), Incarnation(7), num_tokens, first, -0.5, top, judged)
    delivery.on_kv(kv, [memoryview(bytes(num_tokens))], 0.0)
    return delivery, _news(delivery)


def _news(delivery: Delivery) -> Tokens:
    (send,) = delivery.flush(Epoch(5), 0.0)
    assert isinstance(send.message, TokenBatch)
    (tokens,) = send.message.items
    return tokens


def _round(delivery: Delivery, token: int, top: TopLogprobs = ()) -> Tokens:
    delivery.admit()
    (step,) = delivery.steps()
    delivery.commit(step, token, -1.0, 1.0, top)
    return _news(delivery)


def test_stop_ids_of_the_request_stop_whatever_ignores_the_models() -> None:
    delivery, _ = _begin(_sampling(ignore_eos=True, extra_stop_token_ids=(OWN_STOP,)))
    assert _round(delivery, STOP).finish == ""
    assert _round(delivery, OWN_STOP).finish == "stop"


def test_no_stop_before_min_tokens_of_all_attempts() -> None:
    delivery, first = _begin(_sampling(min_tokens=2), first=STOP)
    assert first.finish == ""
    assert _round(delivery, STOP).finish == ""
    assert _round(delivery, STOP).finish == "stop"
    # Replaced with two outputs, the request may stop at once.
    assert _begin(_sampling(min_tokens=2), outputs=(10, 11), first=STOP)[1].finish == "stop"
    assert _begin(_sampling(min_tokens=4), outputs=(10, 11), first=STOP)[1].finish == ""


def test_a_step_has_all_tokens_of_the_request() -> None:
    delivery, _ = _begin(_sampling(), outputs=(10, 11), first=12)
    delivery.admit()
    (step,) = delivery.steps()
    assert (step.prompt, list(step.outputs), step.output_index) == ((1, 2), [10, 11, 12], 3)


def test_alternatives_travel_with_their_tokens() -> None:
    delivery, first = _begin(_sampling(num_top_logprobs=2), outputs=(10, 11), first=12)
    assert first == Tokens(REQUEST, 1, 2, (12,), (-0.5,), "", (TOP,))
    other: TopLogprobs = ((7, -0.125),)
    assert _round(delivery, 13, other) == Tokens(REQUEST, 1, 3, (13,), (-1.0,), "", (other,))
    assert delivery.on_have(Have(REQUEST, 1, 2), ROUTER) == []
    assert _news(delivery) == Tokens(REQUEST, 1, 2, (12, 13), (-0.5, -1.0), "", (TOP, other))


def test_the_prompts_logprobs_come_with_output_0_each_time() -> None:
    delivery, first = _begin(_sampling(prompt_logprobs=True), prompt_logprobs=True)
    assert first.prompt_logprobs == ((-2.0, TOP),)
    assert _round(delivery, 11).prompt_logprobs == ()
    delivery.on_have(Have(REQUEST, 1, 0), ROUTER)
    assert _news(delivery).prompt_logprobs == ((-2.0, TOP),)
    finished, _ = _begin(_sampling(prompt_logprobs=True), first=STOP, prompt_logprobs=True)
    finished.on_tick(REPEAT_S)
    assert _news(finished).prompt_logprobs == ((-2.0, TOP),), "a last message that is the first is whole, too"
