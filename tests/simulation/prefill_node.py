"""The shell of a prefill worker: `services.prefill.service` without sockets; a batch takes virtual time."""

from types import SimpleNamespace
from typing import cast

from common.config import ClusterConfig
from common.ids import Epoch, ProcessId
from common.messages import (
    Abort,
    AskPrefill,
    Heartbeat,
    Hello,
    Message,
    Prefill,
    View,
    Welcome,
)
from services.prefill.prefill_engine import Piece, Prefilled, PrefillEngine
from services.prefill.prefill_queue import Attempt, Chunk, PrefillQueue
from services.prefill.service import PrefillService
from tests.simulation.client import ClientNode
from tests.simulation.world import Frames, World

_BATCH_S, _TOKEN_S, _LOAD_S = 0.004, 0.001, 0.2


class PrefillNode(ClientNode):
    kind = "prefill"

    def __init__(self, world: World, name: str, process: ProcessId) -> None:
        super().__init__(world, name, process)
        self.queue: PrefillQueue | None = None
        self._engine: PrefillEngine | None = None
        self._view: View | None = None
        self._early: list[tuple[ProcessId, Message]] = []  # in the socket until the model is loaded
        self._is_loading = self._is_computing = False

    def hello(self) -> Hello:
        return Hello(self.process, "prefill", self.name, "h", 1, self.endpoint, "agent-0")

    def heartbeat(self) -> Heartbeat:
        epoch = self._view.epoch if self._view else Epoch(0)
        return Heartbeat(self.process, term=self.obedience.term, epoch=epoch)

    def on_message(self, peer: ProcessId, message: Message, frames: Frames) -> None:
        match message:
            case Welcome(config=config, view=view):
                self._on_view(view)
                if not self._is_loading:
                    self._is_loading = True
                    self.later(_LOAD_S, lambda: self._load(config))
            case View():
                self._on_view(message)
            case Prefill() | Abort() | AskPrefill():
                self._on_word(peer, message)
            case _:
                pass

    def _on_view(self, view: View | None) -> None:
        if view is not None and (self._view is None or view.epoch > self._view.epoch):
            self._view = view

    def _load(self, config: ClusterConfig) -> None:
        self._engine = PrefillEngine("", config.prefill, config.decode.block_size)
        self.queue = PrefillQueue.of(config.prefill, config.decode.block_size, self._engine.limits)
        for peer, message in self._early:
            self._on_word(peer, message)

    def _on_word(self, peer: ProcessId, message: Message) -> None:
        if self.queue is None:
            self._early.append((peer, message))
            return
        answer: Message | None = None
        match message:
            case Prefill():
                answer = self.queue.on_prefill(message)
            case Abort():
                self.queue.on_abort(message)
            case AskPrefill():
                answer = self.queue.on_ask(message)
            case _:
                raise AssertionError(message)
        if answer is not None:
            self.send(peer, answer)
        self._compute()

    def _compute(self) -> None:
        assert self.queue is not None and self._engine is not None
        if self._is_computing:
            return
        self.queue.check_invariants()
        if batch := self.queue.next_batch():
            self._is_computing = True
            engine, num_tokens = self._engine, sum(len(chunk.tokens) for chunk in batch)
            results = engine.compute(batch, self._push)
            self.later(_BATCH_S + _TOKEN_S * num_tokens, lambda: self._computed(batch, results))

    def _computed(self, batch: list[Chunk], results: dict[Attempt, Prefilled]) -> None:
        assert self.queue is not None
        self._is_computing = False
        for chunk in self.queue.on_computed(batch):
            self._hand_over(chunk, results[chunk.attempt])
        self._compute()

    def _push(self, piece: Piece) -> None:
        PrefillService._push(cast(PrefillService, _Sockets(self, piece.chunk.prefill.endpoint)), piece)

    def _hand_over(self, chunk: Chunk, result: Prefilled) -> None:
        """The shell's own function, with sockets of the world."""
        PrefillService._hand_over(cast(PrefillService, _Sockets(self, chunk.prefill.endpoint)), chunk, result)


class _Sockets:
    """What these functions of `PrefillService` use of their service."""

    def __init__(self, node: PrefillNode, endpoint: str) -> None:
        self._queue = node.queue
        self._endpoint = SimpleNamespace(send=node.send)
        self._num_done = 0
        self._node, self._target = node, node.world.by_endpoint(endpoint)

    def _link(self, endpoint: str) -> SimpleNamespace:
        return SimpleNamespace(send=self._send_kv)

    def _send_kv(self, message: Message, frames: list[bytes]) -> None:
        if self._target is not None:
            self._node.send(self._target.process, message, [memoryview(frame) for frame in frames])
