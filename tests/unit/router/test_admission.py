from common.config import RouterConfig
from services.router.admission import Admission


def test_the_bound_is_the_last_that_comes_in() -> None:
    admission = Admission(RouterConfig(max_queued=3))
    assert admission.consider(2) is None
    turnaway = admission.consider(3)
    assert turnaway is not None and turnaway.status == 429 and turnaway.retry_after_s >= 1
    assert admission.consider(1, num_more=2) is None
    assert admission.consider(2, num_more=2) is not None, "together or not at all"


def test_a_draining_router_turns_everybody_away() -> None:
    turnaway = Admission(RouterConfig(), draining=True).consider(0)
    assert turnaway is not None and turnaway.status == 503
