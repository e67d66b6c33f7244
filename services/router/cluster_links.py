"""The router's links to decode ranks and prefill workers, each with a task that receives."""

import asyncio
from collections.abc import Callable, Mapping

import zmq.asyncio

from common.ids import ProcessId
from common.messages import Message
from common.network_cut import NetworkCut
from common.transport import Link


class ClusterLinks:
    """``tasks`` is entered before the first link is opened; ``on_message`` gets what comes, and who sent it."""

    def __init__(
        self,
        context: zmq.asyncio.Context,
        process: ProcessId,
        network: NetworkCut,
        tasks: asyncio.TaskGroup,
        on_message: Callable[[ProcessId, Message], None],
    ) -> None:
        self._context, self._process, self._network = context, process, network
        self._tasks, self._on_message = tasks, on_message
        self._links: dict[ProcessId, tuple[Link, asyncio.Task[None]]] = {}
        self._num_malformed = 0  # over links that are closed
        self._is_cancelled = False

    @property
    def num_malformed(self) -> int:
        """Messages since the process began."""
        return self._num_malformed + sum(link.num_malformed for link, _ in self._links.values())

    def open(self, addresses: Mapping[ProcessId, str]) -> None:
        """Those of ``addresses`` that are not open. None after `cancel`: the monitor's last words may come later, and
        nobody would end these tasks."""
        if self._is_cancelled:
            return
        for process, address in addresses.items():
            if process not in self._links:
                link = Link(self._context, self._process, address, self._network)
                self._links[process] = (link, self._tasks.create_task(self._receive(process, link)))

    def keep_only(self, addresses: Mapping[ProcessId, str]) -> None:
        for process in self._links.keys() - addresses.keys():
            link, task = self._links.pop(process)
            task.cancel()
            self._num_malformed += link.num_malformed
            link.close()

    def send(self, peer: ProcessId, message: Message) -> None:
        """Drops it if there is no such link."""
        if peer in self._links:
            self._links[peer][0].send(message)

    def cancel(self) -> None:
        """Ends the tasks; the sockets are closed with their context."""
        self._is_cancelled = True
        for _, task in self._links.values():
            task.cancel()

    async def _receive(self, process: ProcessId, link: Link) -> None:
        while True:
            message, _ = await link.receive()
            self._on_message(process, message)
