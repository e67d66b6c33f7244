"""The data path's part of a network cut: the words between this rank and its peers. Pure."""

from collections.abc import Callable

from common.network_cut import NetworkCut


class CutLinks:
    """A `kernels.peer_windows.LinkFault`."""

    def __init__(self, network: NetworkCut, clock: Callable[[], float]) -> None:
        self._network, self._clock = network, clock

    def is_mute(self) -> bool:
        return self._network.is_cut("peers", "out", self._clock())

    def is_deaf(self) -> bool:
        return self._network.is_cut("peers", "in", self._clock())

    def on_lost(self, num_out: int, num_in: int) -> None:
        self._network.count("peers", "out", num_out)
        self._network.count("peers", "in", num_in)
