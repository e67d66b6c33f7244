"""The shell of the router: sockets, the clock and tasks around the core (`request_table`).

HTTP handlers --open, close--> table --actions--> links to decode ranks and prefill workers
links, monitor, bus --messages--> table --actions--> generations --> HTTP handlers
"""

import asyncio
import logging
import os
import secrets
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any

import zmq.asyncio

from common.admin_token import VARIABLE, read_admin_token
from common.bus import BusSubscriber
from common.config import ClusterConfig
from common.ids import ProcessId, RequestId, make_process_id
from common.messages import AskStatus, Directory, Heartbeat, Hello, Message, Status, View, Welcome
from common.metrics import router_metrics
from common.monitor_client import MonitorClient
from common.network_cut import NetworkCut
from common.process_args import ProcessArgs
from common.service_runner import event_of_signal, first_of, for_the_operator
from common.transport import open_context
from services.router.admission import RETRY_AFTER_OUTAGE_S, RETRY_AFTER_S, Admission
from services.router.api_error import ApiError
from services.router.choices import Choice
from services.router.cluster_links import ClusterLinks
from services.router.http_admin import AdminApi
from services.router.http_api import make_runner
from services.router.http_cluster import ClusterStatus
from services.router.http_generation import Generation, Generations, OpenGenerations, Outbox
from services.router.http_port import SharedPort
from services.router.known_cluster import KnownCluster
from services.router.request_actions import Action, Deliver, Fail, Replaced, Send
from services.router.request_table import RequestTable
from services.router.served_model import ServedModel, load_served_model
from services.router.shown_metrics import ShownMetrics
from services.router.text_stream import TextStream

_TICK_S = 0.05
_LATE_S = 0.5
_ANY = "0.0.0.0"
SUCCESSOR_S = 15.0  # a router that is replaced serves on until the next one listens
_ACCEPT_S = 0.2  # for connections whose first packet came before the port was left: a few round trips
# After the drain: time to write what is left to the clients.
_LAST_WORDS_S = 1.0

log = logging.getLogger("regrow.router")


async def serve(args: ProcessArgs, stop: asyncio.Event) -> None:
    """Runs a router until ``stop`` is set and its streams have ended or been given ``drain_s``."""
    with for_the_operator():
        context = open_context(args.monitor_address.key)
    try:
        await Router(args, context).run(stop)
    finally:
        context.destroy(linger=0)  # closes all sockets


class Router:
    """The `Gateway` of the HTTP side."""

    def __init__(self, args: ProcessArgs, context: zmq.asyncio.Context) -> None:
        self._args, self._context = args, context
        self._process = args.process_id or make_process_id(args.name, secrets.randbits(64))
        self._metrics = router_metrics()
        self._shown_metrics = ShownMetrics(self._metrics)
        self._config = ClusterConfig()
        self._admission = Admission(self._config.router)
        self._table = RequestTable(self._process, self._config)
        self._model: ServedModel | None = None
        self._known = KnownCluster()
        self._generations = OpenGenerations(nonce=secrets.randbits(64))
        self._welcomed = asyncio.Event()
        self._is_leaving = False
        self._status = ClusterStatus(lambda number: self._client.send(AskStatus(self._process, number)))
        self._counters: dict[str, int] = {}
        self._endpoint = ""
        self._tasks = asyncio.TaskGroup()
        self._network = NetworkCut()
        self._links = ClusterLinks(context, self._process, self._network, self._tasks, self._on_peer_message)
        self._client = MonitorClient(
            context,
            self._process,
            args.monitor_address,
            self._hello,
            self._beat,
            self._on_monitor_message,
            network=self._network,
        )
        self._bus = BusSubscriber(context, args.monitor_address, ("view",), self._network)

    async def run(self, stop: asyncio.Event) -> None:
        with for_the_operator():
            token = read_admin_token(self._args.admin_token_file, os.environ.get(VARIABLE, ""))
        admin = AdminApi(self._context, self._args.monitor_address, token)
        runner = make_runner(self, admin, shutdown_timeout_s=_LAST_WORDS_S)
        await runner.setup()
        try:
            # One of its own for what concerns this router alone (metrics, requests), one that all routers share.
            own_port, port = (SharedPort(_ANY, number) for number in (0, self._args.port))
            await own_port.open(runner)
            self._endpoint = f"http://{self._args.host}:{own_port.number}"
            log.info("listening on %s, and on port %d when the monitor has answered", self._endpoint, port.number)
            retired = event_of_signal(signal.SIGUSR1)
            async with self._tasks as group:
                tasks = [
                    group.create_task(self._client.run()),
                    group.create_task(self._follow_bus()),
                    group.create_task(self._tick()),
                ]
                await first_of(stop, self._welcomed)
                if not stop.is_set():
                    await port.open(runner)
                    log.info("listening on port %d", port.number)
                    await first_of(stop, retired)
                    if not stop.is_set() and not await port.wait_for_others(SUCCESSOR_S, stop):
                        log.warning("no other router listens on port %d", port.number)
                await self._leave(port)
                for task in tasks:
                    task.cancel()
                self._links.cancel()
        finally:
            await runner.cleanup()

    # What the HTTP side asks.

    def max_body_bytes(self) -> int:
        return self._config.router.max_body_bytes

    def send_timeout_s(self) -> float:
        return self._config.router.request_deadline_s

    def draw_seed(self) -> int:
        return secrets.randbits(64)

    def model(self) -> ServedModel:
        if self._model is None:
            raise ApiError(503, "the router has not heard from its monitor yet", retry_after_s=RETRY_AFTER_OUTAGE_S)
        return self._model

    def max_choices(self) -> int:
        return self._config.router.max_queued

    def open(self, choices: Sequence[Choice], stops: tuple[str, ...]) -> Generations:
        turnaway = self._admission.consider(len(self._table), len(choices))
        if turnaway is not None:
            self._metrics.requests.labels(outcome="refused").inc()
            raise ApiError(turnaway.status, turnaway.message, retry_after_s=turnaway.retry_after_s)
        now, outbox = time.monotonic(), Outbox()
        generations = [self._open(index, choice, stops, outbox, now) for index, choice in enumerate(choices)]
        return Generations(generations, outbox, self._on_generation_closed)

    def _open(self, index: int, choice: Choice, stops: tuple[str, ...], outbox: Outbox, now: float) -> Generation:
        id = self._generations.new_id()
        sampling = choice.sampling
        text = TextStream(self.model().detokenizer(), stops, sampling.min_tokens)
        generation = Generation(id, index, text, outbox, self._metrics, now)
        self._generations.add(generation)
        self._metrics.prompt_tokens.inc(len(choice.prompt.ids))
        self._perform(self._table.on_submit(id, choice.prompt.ids, sampling, now), now)
        return generation

    def unhealthy(self) -> str | None:
        if self._is_leaving:
            return "shutting down"
        if self._model is None:
            return "waiting for the monitor"
        if self._table.num_ranks == 0:
            return "no decode rank"
        if self._table.waits_for_prefill(time.monotonic()):
            return "no prefill worker"
        return None

    async def cluster_status(self) -> dict[str, Any]:
        return await self._status.get()

    def process(self) -> ProcessId:
        return self._process

    def is_leaving(self) -> bool:
        return self._is_leaving

    def requests_in_flight(self) -> list[dict[str, object]]:
        return self._table.snapshot()

    def render_metrics(self, placement: Mapping[str, Any]) -> bytes:
        return self._shown_metrics.render(self._table, self._links.num_malformed, placement)

    # What the cluster says.

    def _hello(self) -> Hello:
        args = self._args
        return Hello(self._process, "router", args.name, args.host, os.getpid(), self._endpoint, agent=args.agent)

    def _beat(self) -> Heartbeat:
        # Called on the heartbeat thread: reads what the loop has put there.
        return Heartbeat(
            self._process,
            term=self._client.term,
            epoch=self._known.epoch,
            state="draining" if self._is_leaving else "starting" if self._model is None else "up",
            counters=self._counters,
        )

    def _on_monitor_message(self, message: Message) -> None:
        match message:
            case Welcome():
                self._on_welcome(message)
            case View() | Directory():
                self._on_membership(message)
            case Status():
                self._status.on_status(message)
            case _:
                pass

    def _on_welcome(self, welcome: Welcome) -> None:
        if self._model is None:
            self._config = welcome.config
            self._admission.config = welcome.config.router
            self._table = RequestTable(self._process, welcome.config)
            with for_the_operator():
                self._model = load_served_model(welcome.config)
            log.info("serving %s", self._model.limits.name)
            self._welcomed.set()
        self._on_membership(welcome.directory)
        if welcome.view is not None:
            self._on_membership(welcome.view)

    def _on_membership(self, message: View | Directory) -> None:
        """Links to newcomers open before the table hears of them; links to the gone close after its last words."""
        if self._model is None:
            return  # a welcome comes first, and repeats all of this
        if not self._known.take(message):
            return
        now = time.monotonic()
        self._links.open(self._known.addresses())
        if isinstance(message, View):
            log.info("view %d: ranks %s (%s)", message.epoch, [m.rank for m in message.members], message.reason)
            self._perform(self._table.on_view(message, now), now)
        else:
            self._perform(self._table.on_directory(message, now), now)
        self._links.keep_only(self._known.addresses())

    async def _follow_bus(self) -> None:
        while True:
            _, message = await self._bus.receive()
            if isinstance(message, View | Directory) and self._client.accepts(message):
                self._on_membership(message)

    def _on_peer_message(self, process: ProcessId, message: Message) -> None:
        now = time.monotonic()
        self._perform(self._table.on_message(process, message, now), now)

    # What the core decides.

    def _perform(self, actions: list[Action], now: float) -> None:
        for action in actions:
            match action:
                case Deliver(request):
                    self._deliver(request, action, now)
                case Send(peer, message):
                    self._links.send(peer, message)
                case Replaced(request, attempt, reason):
                    self._metrics.replacements.labels(reason=reason).inc()
                    log.info("request %s epoch %d: attempt %d (%s)", request, self._table.epoch, attempt, reason)
                case Fail(request, status, message):
                    log.warning("request %s failed: %s", request, message)
                    if generation := self._generations.get(request):
                        generation.fail(ApiError(status, message, retry_after_s=RETRY_AFTER_OUTAGE_S))

    def _deliver(self, request: RequestId, tokens: Deliver, now: float) -> None:
        generation = self._generations.get(request)
        if generation is None:
            return
        generation.deliver(tokens, now)
        if generation.ended and not tokens.finish:
            # A stop string: the text is complete, the model need not go on.
            self._perform(self._table.on_client_gone(request, now), now)

    def _on_generation_closed(self, request: RequestId) -> None:
        self._generations.remove(request)
        now = time.monotonic()
        self._perform(self._table.on_client_gone(request, now), now)

    async def _tick(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(_TICK_S)
            now = time.monotonic()
            if now - before > _LATE_S:
                continue  # this process was stopped: what has come meanwhile is heard before anybody is judged
            self._perform(self._table.on_tick(now), now)
            running = self._table.num_running
            self._counters = {"running": running, "waiting": len(self._table) - running}

    # Coming and going.

    async def _leave(self, port: SharedPort) -> None:
        """Streams may end for ``drain_s``, and so long a client may still ask over a connection that it has; what is
        left then is told so and aborted."""
        self._is_leaving = True
        await port.leave(_ACCEPT_S)
        await self._generations.wait_until_quiet(self._config.router.drain_s)
        self._admission.draining = True
        self._generations.fail_all(ApiError(503, "this router was shut down", retry_after_s=RETRY_AFTER_S))
        await self._generations.wait_until_none(_LAST_WORDS_S)
