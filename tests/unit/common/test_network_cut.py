"""What a process loses on purpose."""

from common.network_cut import NetworkCut


def test_only_the_lanes_that_are_cut_lose_and_only_for_the_time() -> None:
    network = NetworkCut()
    assert not network.drops("monitor", "in", 1.0) and network.counters() == {}
    network.cut("monitor", "out", until=5.0)
    assert network.drops("monitor", "out", 1.0) and network.drops("monitor", "out", 4.9)
    assert not network.drops("monitor", "in", 1.0) and not network.drops("peers", "out", 1.0)
    assert not network.drops("monitor", "out", 5.0)
    assert network.counters() == {"dropped_monitor_out": 2}


def test_all_in_both_directions() -> None:
    network = NetworkCut()
    network.cut("all", "both", until=5.0)
    assert all(network.drops(side, way, 1.0) for side in ("monitor", "peers") for way in ("in", "out"))
