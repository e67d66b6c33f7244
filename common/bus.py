"""The bus as a client sees it: topics ``fault``, ``view``, ``plan``, ``load``, ``event``; frames [topic, payload].

The monitor hosts the broker. A fresh publisher loses its first messages and any subscriber may miss some: whatever must
arrive is repeated until acknowledged, or can be asked for.
"""

import time

import zmq
import zmq.asyncio

from common.messages import MalformedMessage, Message, decode, encode
from common.monitor_address import MonitorAddress
from common.network_cut import NetworkCut

TOPICS = ("fault", "view", "plan", "load", "event")


class BusPublisher:
    def __init__(
        self, context: zmq.asyncio.Context, address: MonitorAddress, network: NetworkCut | None = None
    ) -> None:
        self._network = network or NetworkCut()
        self._socket = context.socket(zmq.PUB)
        self._socket.linger = 0
        self._socket.connect(address.publish)

    def publish(self, topic: str, message: Message) -> None:
        self.publish_raw(topic, encode(message))

    def publish_raw(self, topic: str, payload: bytes) -> None:
        if self._network.drops("monitor", "out", time.monotonic()):
            return
        # A PUB socket drops instead of blocking, so the future is done at once.
        self._socket.send_multipart([topic.encode(), payload], flags=zmq.DONTWAIT)

    def close(self) -> None:
        self._socket.close(0)


class BusSubscriber:
    def __init__(
        self,
        context: zmq.asyncio.Context,
        address: MonitorAddress,
        topics: tuple[str, ...],
        network: NetworkCut | None = None,
    ) -> None:
        self._network = network or NetworkCut()
        self._socket = context.socket(zmq.SUB)
        self._socket.linger = 0
        for topic in topics:
            self._socket.subscribe(topic.encode())
        self._socket.connect(address.subscribe)
        self.num_malformed = 0

    async def receive_raw(self) -> tuple[str, bytes]:
        while True:
            frames = await self._socket.recv_multipart()
            if self._network.drops("monitor", "in", time.monotonic()):
                continue
            if len(frames) == 2:
                return frames[0].decode(errors="replace"), frames[1]
            self.num_malformed += 1

    async def receive(self) -> tuple[str, Message]:
        """The next message of a typed topic; malformed ones are counted and skipped."""
        while True:
            topic, payload = await self.receive_raw()
            try:
                return topic, decode(payload)
            except MalformedMessage:
                self.num_malformed += 1

    def close(self) -> None:
        self._socket.close(0)
