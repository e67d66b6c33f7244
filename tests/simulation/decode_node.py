"""The shell of a decode rank: `services.decode.service` without sockets, around the real `Stream`."""

from collections.abc import Iterable
from pathlib import Path

from common.ids import ProcessId
from common.messages import (
    Abort,
    Announce,
    Directory,
    ExpertLoad,
    Have,
    Heartbeat,
    Hello,
    Inject,
    KvHandoff,
    KvPart,
    Message,
    Prepare,
    Release,
    RollCall,
    StagePlacement,
    TokenBatch,
    View,
    Wake,
    Welcome,
)
from services.decode import actions
from services.decode.actions import Action
from services.decode.rank_heap import heap_name
from services.decode.stream import Stream
from tests.simulation.client import ClientNode
from tests.simulation.pace import Pace
from tests.simulation.stream_task import StreamTask, TaskInbox
from tests.simulation.world import Bad, Frames, World

HEAP_DIR = Path("/heaps")
_LOOP_S = 0.0005  # from the stream's thread to the event loop
_LAST_WORDS_S = 0.05


class DecodeNode(ClientNode):
    kind = "decode"

    def __init__(self, world: World, name: str, process: ProcessId, pace: Pace) -> None:
        super().__init__(world, name, process)
        self.stream = Stream(
            self.process,
            HEAP_DIR,
            emit=self._emit,
            on_end=self._on_end,
            num_monitor_words=lambda: self.obedience.num_words,
            clock=lambda: world.now,
            network=self.network,
        )
        self.task = StreamTask(self, self.stream._run, pace)
        self.stream._inbox = TaskInbox(lambda: self.task)  # type: ignore[assignment]
        world.memory.tasks[self.process] = self.task

    def start(self) -> None:
        super().start()
        self.task.start()

    def hello(self) -> Hello:
        status = self.stream.status
        heap = str(HEAP_DIR / heap_name(self.process, status.life))
        return status.hello(self.process, self.name, "h", 1, self.endpoint, "agent-0", heap)

    def heartbeat(self) -> Heartbeat:
        stream = self.stream
        self.world.checker.on_beat(self)
        return stream.status.heartbeat(
            self.process, self.obedience.term, stream.progress, stream.waits_for, stream.counters()
        )

    def on_message(self, peer: ProcessId, message: Message, frames: Frames) -> None:
        match message:
            case Announce() | KvPart() | KvHandoff() | Have() | Abort() | Release() | Wake():
                self.stream.deliver(peer, message, frames)
            case Welcome() | Prepare() | View() | RollCall() | StagePlacement() | Inject() | Directory():
                self.stream.deliver(self.process, message)
            case _:
                pass

    def on_death(self) -> None:
        super().on_death()
        self.task.kill()

    def _emit(self, out: Iterable[Action | ExpertLoad]) -> None:
        items = list(out)
        if not self.is_alive:
            return
        for item in items:
            if isinstance(item, actions.Send) and isinstance(item.message, TokenBatch):
                self.world.checker.on_commit(self, item.message)
        self.later(_LOOP_S, lambda: self._send_all(items))

    def _send_all(self, out: list[Action | ExpertLoad]) -> None:
        for action in out:
            match action:
                case actions.Send(peer=peer, message=message):
                    self.send(peer, message)
                case actions.Tell(message=message):
                    self.world.checker.on_tell(message)
                    self.tell_monitor(message)
                case actions.SayHello():
                    self.say_hello()
                case actions.ForwardView(view=view, endpoints=endpoints):
                    self._send_to_members(endpoints, view)
                case actions.WakeMembers(epoch=epoch, endpoints=endpoints):
                    self._send_to_members(endpoints, Wake(epoch))
                case ExpertLoad():
                    pass
                case _:
                    raise Bad(f"{action} is the stream's own")

    def _send_to_members(self, endpoints: Iterable[str], message: Message) -> None:
        for endpoint in endpoints:
            if node := self.world.by_endpoint(endpoint):
                self.send(node.process, message)

    def terminate(self) -> None:
        self.stream.stop()

    def _on_end(self, error: BaseException | None) -> None:
        if self.is_alive and error is None:
            self.later(_LAST_WORDS_S, lambda: self.die("exit 0"))
        elif self.is_alive:
            raise Bad(f"the stream of {self.process} ended: {error!r}") from error
