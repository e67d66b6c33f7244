"""The shell of a decode rank: sockets <-> `stream`. Carries messages and decides nothing."""

import asyncio
import logging
import os
import secrets
from collections.abc import Callable, Iterable
from typing import Any

import torch
import zmq.asyncio

from common.bus import BusPublisher, BusSubscriber
from common.ids import ProcessId, make_process_id
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
    View,
    Wake,
    Welcome,
)
from common.monitor_address import interface_for
from common.monitor_client import MonitorClient
from common.network_cut import NetworkCut
from common.process_args import ProcessArgs
from common.service_runner import for_the_operator
from common.transport import Endpoint, Link, open_context
from services.decode import actions
from services.decode.actions import Action
from services.decode.rank_heap import heap_name
from services.decode.stream import Stream

STREAM_END_S = 5.0  # then the process ends all the same; its heap is the agent's to remove
_LAST_WORDS_S = 0.05  # for SlotLeft to leave the socket; if it does not, the lifeline tells the same

log = logging.getLogger("regrow.decode")


class DecodeService:
    def __init__(self, args: ProcessArgs) -> None:
        self._args = args
        self._process = args.process_id or make_process_id(args.name, secrets.randbits(64))

    async def serve(self, stop: asyncio.Event) -> None:
        """Runs until ``stop``. Raises OperatorError when the checkpoint or the heap directory cannot be used."""
        # The kernels have one, and ranks share the cores.
        torch.set_num_threads(1)
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[BaseException | None] = loop.create_future()
        network = NetworkCut()
        with for_the_operator():
            context = self._context = open_context(self._args.monitor_address.key)
            self._endpoint = Endpoint(context, self._args.port, interface_for(self._args.host), network)
        self._publisher = BusPublisher(context, self._args.monitor_address, network)
        self._subscriber = BusSubscriber(context, self._args.monitor_address, ("view",), network)
        self._links = _Links(context, self._process, network)
        self._stream = Stream(
            self._process,
            self._args.heap_dir,
            emit=lambda out: _call(loop, self._send_all, out),
            on_end=lambda error: _call(loop, ended.set_result, error),
            num_monitor_words=lambda: self._client.num_words,
            network=network,
        )
        self._client = MonitorClient(
            context,
            self._process,
            self._args.monitor_address,
            self._hello,
            self._beat,
            self._on_monitor_message,
            network=network,
        )
        self._stream.start()
        try:
            await self._run_until(stop, ended)
        finally:
            self._stream.stop()
            await asyncio.to_thread(self._stream.join, STREAM_END_S)
            context.destroy(linger=0)  # closes all sockets

    async def _run_until(self, stop: asyncio.Event, ended: "asyncio.Future[BaseException | None]") -> None:
        """Returns after ``stop`` when the stream has ended; raises what ended the stream, or any of the tasks."""
        stopping = asyncio.ensure_future(stop.wait())
        tasks: list[asyncio.Future[Any]] = [
            asyncio.ensure_future(work)
            for work in (
                self._client.run(),
                self._receive_from_peers(),
                self._receive_from_bus(),
                self._endpoint.watch_strangers(),
            )
        ]
        try:
            awaited: list[asyncio.Future[Any]] = [stopping, ended, *tasks]
            await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
            if stop.is_set():
                self._stream.stop()
                await asyncio.wait([ended], timeout=STREAM_END_S)
                await asyncio.sleep(_LAST_WORDS_S)
        finally:
            for task in (stopping, *tasks):
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        error = ended.result() if ended.done() else None
        failures = [error, *results]
        for failure in failures:
            if isinstance(failure, Exception):
                raise failure

    async def _receive_from_peers(self) -> None:
        while True:
            incoming = await self._endpoint.receive()
            match incoming.message:
                case View() as view:
                    self._on_view(view)
                case Announce() | KvPart() | KvHandoff() | Have() | Abort() | Release() | Wake():
                    self._stream.deliver(incoming.peer, incoming.message, incoming.frames)
                case other:
                    log.warning("%s sent %s, which is not for a decode rank", incoming.peer, type(other).__name__)

    async def _receive_from_bus(self) -> None:
        while True:
            _, message = await self._subscriber.receive()
            if isinstance(message, View):
                self._on_view(message)

    def _on_view(self, view: View) -> None:
        if self._client.accepts(view):
            self._stream.deliver(self._process, view)

    def _on_monitor_message(self, message: Message) -> None:
        """Already checked: of the monitor that this process obeys."""
        if isinstance(message, Welcome | Prepare | View | RollCall | StagePlacement | Inject | Directory):
            self._stream.deliver(self._process, message)

    def _hello(self) -> Hello:
        args, status = self._args, self._stream.status
        heap = str(args.heap_dir / heap_name(self._process, status.life))
        return status.hello(
            self._process, args.name, args.host, os.getpid(), self._endpoint.address(args.host), args.agent, heap
        )

    def _beat(self) -> Heartbeat:
        stream = self._stream
        status = stream.status  # first: the counters then tell of all that was done before its view
        counters = stream.counters() | {
            "malformed_messages": self._endpoint.num_malformed,
            "strangers_refused": self._endpoint.num_refused,
        }
        return status.heartbeat(self._process, self._client.term, stream.progress, stream.waits_for, counters)

    def _send_all(self, out: Iterable[Action | ExpertLoad]) -> None:
        if self._context.closed:
            return  # the stream has outlived all patience with it
        for action in out:
            match action:
                case actions.Send(peer=peer, message=message):
                    self._endpoint.send(peer, message)
                case actions.Tell(message=message):
                    self._client.send(message)
                case actions.SayHello():
                    self._client.say_hello()
                case actions.ForwardView(view=view, endpoints=endpoints):
                    self._links.keep_only(endpoints)
                    self._links.send_all(endpoints, view)
                case actions.WakeMembers(epoch=epoch, endpoints=endpoints):
                    self._links.send_all(endpoints, Wake(epoch))
                case ExpertLoad():
                    self._publisher.publish("load", action)
                case _:
                    raise AssertionError(f"{action} is the stream's own")


class _Links:
    """Links to the endpoints of other members, made when first needed."""

    def __init__(self, context: zmq.asyncio.Context, process: ProcessId, network: NetworkCut) -> None:
        self._context, self._process, self._network = context, process, network
        self._links: dict[str, Link] = {}

    def send_all(self, endpoints: Iterable[str], message: Message) -> None:
        for endpoint in endpoints:
            if endpoint not in self._links:
                self._links[endpoint] = Link(self._context, self._process, endpoint, self._network)
            self._links[endpoint].send(message)

    def keep_only(self, endpoints: Iterable[str]) -> None:
        for endpoint in self._links.keys() - set(endpoints):
            self._links.pop(endpoint).close()


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., Any], argument: object) -> None:
    """From the stream's thread; the loop may be closed already when the process is on its way out."""
    try:
        loop.call_soon_threadsafe(function, argument)
    except RuntimeError:
        log.debug("the event loop is closed")
