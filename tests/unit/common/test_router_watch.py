"""A router that is gone for good, and one that is only away for a moment."""

from common.ids import ProcessId
from common.messages import Directory, Worker
from common.router_watch import RouterWatch

ONE, TWO = ProcessId("router-0-a"), ProcessId("router-1-b")


def directory(version: int, *routers: ProcessId) -> Directory:
    workers = tuple(Worker(router, "router", "router", "127.0.0.1", 1, "") for router in routers)
    return Directory(ProcessId("m"), 1024, version, workers)


def test_only_a_long_absence_counts() -> None:
    watch = RouterWatch(10.0)
    assert not watch.lost([ONE, TWO], 0.0), "nobody has said who is there"
    watch.on_directory(directory(1, ONE, TWO))
    watch.on_directory(directory(2, TWO))
    assert not watch.lost([ONE, TWO], 1.0)
    assert not watch.lost([ONE, TWO], 10.9)
    assert watch.lost([ONE, TWO], 11.0) == {ONE}
    assert not watch.lost([TWO], 12.0)


def test_a_router_that_comes_back_in_time_starts_anew() -> None:
    watch = RouterWatch(10.0)
    watch.on_directory(directory(2, TWO))
    assert not watch.lost([ONE], 0.0)
    watch.on_directory(directory(3, ONE, TWO))
    assert not watch.lost([ONE], 9.0)
    watch.on_directory(directory(4, TWO))
    assert not watch.lost([ONE], 11.0)
    watch.on_directory(directory(3, ONE, TWO))  # late
    assert watch.lost([ONE], 21.0) == {ONE}


def test_a_router_that_speaks_lives_whatever_the_directory_says() -> None:
    """It may have lost the monitor alone."""
    watch = RouterWatch(10.0)
    watch.on_directory(directory(1, TWO))
    assert not watch.lost([ONE], 0.0)
    watch.on_word(ONE)
    assert not watch.lost([ONE], 9.0)
    assert not watch.lost([ONE], 18.0)
    assert watch.lost([ONE], 19.0) == {ONE}


def test_what_a_lost_router_asks_for_later_is_given_as_much_time_again() -> None:
    watch = RouterWatch(10.0)
    watch.on_directory(directory(1, TWO))
    watch.lost([ONE], 0.0)
    assert watch.lost([ONE], 10.0) == {ONE}
    assert not watch.lost([ONE], 10.1)
    assert not watch.lost([ONE], 20.0)
    assert watch.lost([ONE], 20.1) == {ONE}
