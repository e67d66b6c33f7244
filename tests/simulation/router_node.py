"""The router's shell without HTTP, and the clients behind it."""

from common.config import ClusterConfig
from common.ids import ProcessId, RequestId, make_request_id
from common.messages import Directory, Heartbeat, Hello, Message, Sampling, View, Welcome
from services.router.known_cluster import KnownCluster
from services.router.request_actions import Action, Deliver, Fail, Replaced, Send
from services.router.request_table import RequestTable
from tests.simulation.client import ClientNode
from tests.simulation.symbolic_model import STOP_ID
from tests.simulation.world import Bad, Frames, World

_TICK_S = 0.05


class RouterNode(ClientNode):
    kind = "router"

    def __init__(self, world: World, name: str, process: ProcessId) -> None:
        super().__init__(world, name, process)
        self._nonce, self._num_requests = world.random.getrandbits(64), 0
        self.table: RequestTable | None = None
        self._known = KnownCluster()
        self._waiting: list[tuple[tuple[int, ...], int]] = []  # clients from before the welcome
        self._links: set[ProcessId] = set()
        self.is_leaving = False
        self.later(_TICK_S, self._tick)

    def hello(self) -> Hello:
        return Hello(self.process, "router", self.name, "h", 1, "", "agent-0")

    def heartbeat(self) -> Heartbeat:
        state = "draining" if self.is_leaving else "starting" if self.table is None else "up"
        return Heartbeat(self.process, term=self.obedience.term, epoch=self._known.epoch, state=state)

    def retire(self) -> None:
        """SIGUSR1: its clients stay until their streams end, new ones go elsewhere once there is somebody."""
        others = [node for node in self.world.of_kind("router") if isinstance(node, RouterNode) and node is not self]
        self.is_leaving = self.is_leaving or any(other.table is not None for other in others)
        if self.is_leaving and (self.table is None or not len(self.table)):
            self.die("exit 0")
        else:
            self.later(_TICK_S, self.retire)

    def submit(self, prompt: tuple[int, ...], max_tokens: int) -> None:
        if self.table is None:
            self._waiting.append((prompt, max_tokens))
            return
        self._num_requests += 1
        id = make_request_id(self._nonce, self._num_requests)
        self.world.checker.on_submit(id, self.process, prompt, max_tokens)
        sampling = Sampling(
            temperature=0.0,
            top_p=1.0,
            top_k=0,
            seed=self._num_requests,
            max_tokens=max_tokens,
            stop_token_ids=(STOP_ID,),
        )
        self._perform(self.table.on_submit(id, prompt, sampling, self.world.now))

    def leave(self, request: RequestId) -> None:
        """Its client is gone."""
        assert self.table is not None
        self.world.checker.on_client_gone(request)
        self._perform(self.table.on_client_gone(request, self.world.now))

    def receive(self, peer: ProcessId, message: Message, frames: Frames) -> None:
        sender = self.world.nodes[peer.partition("#")[0]]
        if sender.kind in ("decode", "prefill") and peer not in self._links:
            return  # its link is closed
        super().receive(peer, message, frames)

    def on_message(self, peer: ProcessId, message: Message, frames: Frames) -> None:
        match message:
            case Welcome():
                self._on_welcome(message)
            case View() | Directory():
                self._on_membership(message)
            case _ if self.table is not None:
                self._perform(self.table.on_message(peer, message, self.world.now))
            case _:
                pass

    def _on_welcome(self, welcome: Welcome) -> None:
        if self.table is None:
            config: ClusterConfig = welcome.config
            self.table = RequestTable(self.process, config)
        self._on_membership(welcome.directory)
        if welcome.view is not None:
            self._on_membership(welcome.view)
        waiting, self._waiting = self._waiting, []
        for prompt, max_tokens in waiting:
            self.submit(prompt, max_tokens)

    def _on_membership(self, message: View | Directory) -> None:
        if self.table is None or not self._known.take(message):
            return
        now = self.world.now
        self._links |= self._known.addresses().keys()
        if isinstance(message, View):
            self._perform(self.table.on_view(message, now))
        else:
            self._perform(self.table.on_directory(message, now))
        self._links = set(self._known.addresses())

    def _tick(self) -> None:
        if self.table is not None:
            self._perform(self.table.on_tick(self.world.now))
        self.later(_TICK_S, self._tick)

    def _perform(self, wanted: list[Action]) -> None:
        assert self.table is not None
        for action in wanted:
            match action:
                case Send(peer, message):
                    if peer in self._links:
                        self.send(peer, message)
                case Deliver():
                    self.world.checker.on_deliver(action)
                case Replaced(request, attempt, reason):
                    self.world.tell(f"{request[-4:]} attempt {attempt}: {reason}")
                case Fail(request, status, text):
                    raise Bad(f"request {request} failed with {status}: {text}")
        self.table.check_invariants()
        self.world.checker.on_epoch(self.process, self.table.epoch)
