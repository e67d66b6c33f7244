"""The shell of a prefill worker: sockets <-> `prefill_queue`, and the thread that runs the model."""

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from common.bus import BusSubscriber
from common.config import ClusterConfig
from common.ids import Epoch, make_process_id
from common.messages import (
    Abort,
    AskPrefill,
    Directory,
    Heartbeat,
    Hello,
    Inject,
    Injected,
    KvHandoff,
    KvPart,
    Message,
    Prefill,
    PrefillDone,
    View,
    Welcome,
)
from common.model.checkpoint import LoadProgress
from common.monitor_address import interface_for
from common.monitor_client import MonitorClient
from common.network_cut import NetworkCut
from common.pace import Pace
from common.process_args import ProcessArgs
from common.self_faults import SelfFaults
from common.service_runner import for_the_operator
from common.transport import Endpoint, Link, open_context
from services.prefill.decode_links import DecodeLinks
from services.prefill.prefill_engine import Piece, Prefilled, PrefillEngine
from services.prefill.prefill_queue import Chunk, PrefillQueue

_TICK_S = 0.5

log = logging.getLogger("regrow.prefill")


class PrefillService:
    def __init__(self, args: ProcessArgs) -> None:
        self._args = args
        self._process = args.process_id or make_process_id(args.name, secrets.randbits(64))
        self._view: View | None = None
        self._directory: Directory | None = None
        self._queue: PrefillQueue | None = None
        self._decode_links = DecodeLinks()
        self._links: dict[str, Link] = {}
        self._network = NetworkCut()
        self._pace, self._faults = Pace(time.monotonic, time.sleep), SelfFaults(self._process)
        self._loaded: LoadProgress | None = None
        self._num_batches = self._num_done = 0

    async def serve(self, stop: asyncio.Event) -> None:
        """Runs until ``stop``. Raises OperatorError when the checkpoint cannot be used."""
        torch.set_num_threads(1)  # the kernels have one, and others share the cores
        with for_the_operator():
            context = self._context = open_context(self._args.monitor_address.key)
            self._endpoint = Endpoint(context, self._args.port, interface_for(self._args.host), self._network)
        self._subscriber = BusSubscriber(context, self._args.monitor_address, ("view",), self._network)
        self._config: asyncio.Future[ClusterConfig] = asyncio.get_running_loop().create_future()
        self._work = asyncio.Event()
        self._client = MonitorClient(
            context,
            self._process,
            self._args.monitor_address,
            self._hello,
            self._beat,
            self._on_monitor_message,
            network=self._network,
        )
        try:
            # One thread: batches follow each other, and the end of the process waits for the one that runs.
            with ThreadPoolExecutor(max_workers=1, thread_name_prefix="model") as executor:
                await self._run_until(stop, executor)
        finally:
            await asyncio.sleep(0)  # what the thread has handed to the loop meanwhile still finds its sockets
            context.destroy(linger=0)  # closes all sockets

    async def _run_until(self, stop: asyncio.Event, executor: ThreadPoolExecutor) -> None:
        """Returns after ``stop``; raises what ended any of the tasks."""
        tasks: list[asyncio.Future[Any]] = [
            asyncio.ensure_future(work)
            for work in (
                stop.wait(),
                self._client.run(),
                self._receive_from_bus(),
                self._prefill(executor),
                self._endpoint.watch_strangers(),
            )
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def _prefill(self, executor: ThreadPoolExecutor) -> None:
        """Loads the model when the monitor has said which, then serves. Requests wait in the socket until then."""
        loop = asyncio.get_running_loop()
        config = await self._config
        with for_the_operator():
            engine = await loop.run_in_executor(
                executor, PrefillEngine, config.model.path, config.prefill, config.decode.block_size, self._on_loaded
            )
        self._queue = PrefillQueue.of(config.prefill, config.decode.block_size, engine.limits, config.router.lost_s)
        if self._directory is not None:
            self._queue.routers.on_directory(self._directory)

        def push(piece: Piece) -> None:
            loop.call_soon_threadsafe(self._push, piece)

        async with asyncio.TaskGroup() as group:
            group.create_task(self._receive_from_peers(self._queue))
            group.create_task(self._tick(self._queue))
            while True:
                batch = self._queue.next_batch()
                if not batch:
                    self._work.clear()
                    await self._work.wait()
                    continue
                self._pace.resume()
                results = await loop.run_in_executor(executor, engine.compute, batch, push)
                await loop.run_in_executor(executor, self._pace.pause)
                self._say_all(self._faults.on_round(*self._pace.take()))
                self._num_batches += 1
                for chunk in self._queue.on_computed(batch):
                    self._hand_over(chunk, results[chunk.attempt])

    async def _receive_from_peers(self, queue: PrefillQueue) -> None:
        while True:
            incoming = await self._endpoint.receive()
            answer: Message | None = None
            queue.routers.on_word(incoming.peer)
            match incoming.message:
                case Prefill() as prefill:
                    answer = queue.on_prefill(prefill)
                    self._work.set()
                case Abort() as abort:
                    queue.on_abort(abort)
                    self._work.set()
                case AskPrefill() as ask:
                    answer = queue.on_ask(ask)
                case other:
                    log.warning("%s sent %s, which is not for prefill", incoming.peer, type(other).__name__)
            if answer is not None:
                self._endpoint.send(incoming.peer, answer)

    async def _tick(self, queue: PrefillQueue) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            queue.on_tick(time.monotonic())

    async def _receive_from_bus(self) -> None:
        while True:
            _, message = await self._subscriber.receive()
            if isinstance(message, View) and self._client.accepts(message):
                self._on_view(message)

    def _on_monitor_message(self, message: Message) -> None:
        match message:
            case Directory():
                self._on_directory(message)
            case Welcome(config=config, view=view):
                self._on_directory(message.directory)
                if not self._config.done():
                    self._config.set_result(config)
                if view is not None:
                    self._on_view(view)
            case View():
                self._on_view(message)
            case Inject(action="slow") if self._faults.is_new(message):
                self._pace.factor = message.factor
                self._faults.on_slow(message)
            case Inject():
                self._say_all(self._faults.said(message))
            case _:
                pass

    def _say_all(self, words: Sequence[Injected]) -> None:
        for word in words:
            self._client.send(word)

    def _on_directory(self, directory: Directory) -> None:
        self._directory = directory
        if self._queue is not None:
            self._queue.routers.on_directory(directory)

    def _on_view(self, view: View) -> None:
        if self._view is not None and view.epoch <= self._view.epoch:
            return
        self._view = view
        endpoints = [member.endpoint for member in view.members]
        for endpoint in self._decode_links.on_endpoints(endpoints, time.monotonic()):
            self._links.pop(endpoint).close()

    def _on_loaded(self, loaded: LoadProgress) -> None:
        """On the thread that loads."""
        self._loaded = loaded

    def _push(self, piece: Piece) -> None:
        """On the loop, while the thread computes on."""
        prefill = piece.chunk.prefill
        if self._queue is None or not self._queue.is_wanted(piece.chunk.attempt):
            return
        part = KvPart(
            prefill.request,
            prefill.attempt,
            prefill.rank,
            prefill.incarnation,
            piece.first_layer,
            piece.num_layers,
            piece.start,
            piece.num_tokens,
        )
        self._link(prefill.endpoint).send(part, [piece.kv])

    def _hand_over(self, chunk: Chunk, result: Prefilled) -> None:
        prefill = chunk.prefill
        handoff = KvHandoff(
            prefill.request,
            prefill.attempt,
            prefill.rank,
            prefill.incarnation,
            chunk.stop,
            result.choice.token,
            result.choice.logprob,
            result.choice.top,
            result.prompt_logprobs,
        )
        self._link(prefill.endpoint).send(handoff, [result.kv] if result.kv else [])
        self._endpoint.send(prefill.router, PrefillDone(prefill.request, prefill.attempt))
        self._num_done += 1

    def _link(self, endpoint: str) -> Link:
        if self._decode_links.use(endpoint, time.monotonic()):
            self._links[endpoint] = Link(self._context, self._process, endpoint, self._network)
        return self._links[endpoint]

    def _hello(self) -> Hello:
        args = self._args
        endpoint = self._endpoint.address(args.host)
        return Hello(self._process, "prefill", args.name, args.host, os.getpid(), endpoint, args.agent)

    def _beat(self) -> Heartbeat:
        """On the heartbeat thread: plain reads only."""
        view, queue = self._view, self._queue
        counters = {
            "slow_percent": self._faults.num_slow_percent,
            "malformed_messages": self._endpoint.num_malformed,
            "strangers_refused": self._endpoint.num_refused,
            "prefills_done": self._num_done,
        }
        if self._loaded is not None:
            counters |= self._loaded.counters()
        if queue is not None:
            counters |= {
                "kv_blocks_used": queue.blocks.num_used,
                "kv_blocks": queue.blocks.num_blocks,
                "prompt_tokens_computed": queue.num_tokens_computed,
                "prefix_hits": queue.prefixes.num_hits,
                "prefix_tokens_saved": queue.prefixes.num_tokens_saved,
                "prefix_bytes": queue.prefixes.num_bytes,
            }
        return Heartbeat(
            process=self._process,
            term=self._client.term,
            epoch=view.epoch if view else Epoch(0),
            state="up" if queue is not None else "loading",
            progress=self._num_batches,
            counters=counters,
        )
