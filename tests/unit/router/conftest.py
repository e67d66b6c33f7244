"""What the tests of the router core share: a request, its places, its configuration."""

import pytest

from common.config import RouterConfig
from common.ids import Incarnation, ProcessId, Rank, RequestId
from common.messages import Sampling
from services.router.request_lifecycle import Place, RequestLifecycle

ROUTER = ProcessId("router-0")
DECODE = ProcessId("decode-0")
PREFILL = ProcessId("prefill-0")
REQUEST = RequestId("r.1")
SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, seed=7, max_tokens=5, stop_token_ids=(1,))
PLACE = Place(Rank(0), Incarnation(100), DECODE, "tcp://decode-0", PREFILL)
OTHER_PLACE = Place(Rank(1), Incarnation(101), ProcessId("decode-1"), "tcp://decode-1", ProcessId("prefill-1"))
CONFIG = RouterConfig(no_news_s=1.0, max_asks=3, request_deadline_s=60.0)


@pytest.fixture
def queued() -> RequestLifecycle:
    return RequestLifecycle(REQUEST, (10, 11), SAMPLING, ROUTER, CONFIG, arrived=0.0)


@pytest.fixture
def prefilling(queued: RequestLifecycle) -> RequestLifecycle:
    queued.on_place(PLACE, 0.0)
    return queued
