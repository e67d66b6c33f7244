"""The monitor's shell: control socket, lifelines, the bus, time. It decides nothing: see `services.monitor.monitor`."""

import asyncio
import contextlib
import errno
import itertools
import logging
import os
import secrets
import time
from pathlib import Path
from random import SystemRandom
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from common.cluster_key import CHALLENGE_BYTES
from common.config import ClusterConfig, load_config
from common.handshakes import FailedHandshakes, Refusal
from common.ids import ProcessId, make_process_id
from common.messages import ExpertLoad, MalformedMessage, Message, PlacementPlan, Worker, decode, encode
from common.model.config import load_model_config
from common.monitor_address import MonitorAddress, interface_for
from common.monitor_client import keep_alive
from common.process_args import ProcessArgs
from common.service_runner import OperatorError, for_the_operator
from common.transport import Endpoint, listen, open_context
from services.monitor.actions import Action, Emit, Exit, Publish, Send
from services.monitor.monitor import Monitor

# What a connection ends with whose packets nobody answers.
_NETWORK_ERRORS = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH)
_LIFELINE_NAME_S = 5.0
_MAX_NAME_BYTES = 512
_HIGH_WATER_MARK = 100_000

log = logging.getLogger("regrow.monitor")


class Bus:
    """The broker: what arrives on the publish port goes out on the subscribe port, and is read here on the way.

    On the wire the two sockets are what XSUB and XPUB are; SUB and PUB keep the subscriptions themselves.
    """

    def __init__(self, context: zmq.asyncio.Context, address: MonitorAddress, interface: str) -> None:
        self._incoming, self._outgoing = context.socket(zmq.SUB), context.socket(zmq.PUB)
        self.failed_handshakes = {
            "bus publish": FailedHandshakes(self._incoming),
            "bus subscribe": FailedHandshakes(self._outgoing),
        }
        try:
            for socket, port in ((self._incoming, address.port + 2), (self._outgoing, address.port + 3)):
                socket.linger = 0
                socket.sndhwm = socket.rcvhwm = _HIGH_WATER_MARK
                listen(socket, port, interface)
        except ValueError:
            self.close()
            raise
        self._incoming.subscribe(b"")

    async def receive(self) -> tuple[str, bytes]:
        while True:
            frames = await self._incoming.recv_multipart()
            if len(frames) == 2:
                self._outgoing.send_multipart(frames, flags=zmq.DONTWAIT)
                return frames[0].decode(errors="replace"), frames[1]

    def publish(self, topic: str, payload: bytes) -> None:
        self._outgoing.send_multipart([topic.encode(), payload], flags=zmq.DONTWAIT)

    def close(self) -> None:
        for failed in self.failed_handshakes.values():
            failed.close()
        self._incoming.close(0)
        self._outgoing.close(0)


class MonitorService:
    def __init__(
        self, context: zmq.asyncio.Context, address: MonitorAddress, monitor: Monitor, config: ClusterConfig
    ) -> None:
        self._address, self._monitor, self._config = address, monitor, config
        self._interface = interface_for(address.host)
        with for_the_operator():
            self._bus = Bus(context, address, self._interface)
            self._endpoint = Endpoint(context, address.port, self._interface)
        self._is_closed = False
        self._connections = itertools.count(1)
        self._writers: set[asyncio.StreamWriter] = set()
        self._lifeline_tasks: set[asyncio.Task[None]] = set()
        self._exit = asyncio.Event()
        self._exit_reason = ""

    async def run(self, stop: asyncio.Event) -> None:
        """Until ``stop`` is set. Raises OperatorError when another monitor has taken over, or a port is in use."""
        lifeline_host = "0.0.0.0" if self._interface == "*" else self._interface
        try:
            server = await asyncio.start_server(self._on_lifeline, lifeline_host, self._address.lifeline_port)
        except OSError as error:
            self.close()
            raise OperatorError(
                f"cannot listen on port {self._address.lifeline_port}: {error.strerror or error}"
            ) from None
        loops = [_until_set(stop), _until_set(self._exit), self._receive(), self._receive_from_bus(), self._tick()]
        doors = {"control": self._endpoint.failed_handshakes, **self._bus.failed_handshakes}
        loops += [self._watch(door, failed) for door, failed in doors.items()]
        tasks = [asyncio.create_task(loop) for loop in loops]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            server.close()
            for task in (*tasks, *self._lifeline_tasks):
                task.cancel()
            await asyncio.gather(*tasks, *self._lifeline_tasks, return_exceptions=True)
            for writer in list(self._writers):
                writer.close()
            await server.wait_closed()
            self.close()
        if self._exit.is_set():
            raise OperatorError(self._exit_reason)

    def close(self) -> None:
        self._is_closed = True
        self._endpoint.close()
        self._bus.close()

    async def _receive(self) -> None:
        while True:
            incoming = await self._endpoint.receive()
            self._perform(self._monitor.on_message(incoming.peer, incoming.message, time.monotonic()))

    async def _receive_from_bus(self) -> None:
        while True:
            topic, payload = await self._bus.receive()
            if topic == "fault":
                self._perform(self._monitor.on_fault(payload, time.monotonic()))
            elif topic in ("load", "plan"):
                with contextlib.suppress(MalformedMessage):
                    self._on_bus_message(decode(payload))

    def _on_bus_message(self, message: Message) -> None:
        if isinstance(message, ExpertLoad):
            self._monitor.on_load(message, time.monotonic())
        elif isinstance(message, PlacementPlan):
            self._perform(self._monitor.on_message(message.process, message, time.monotonic()))

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._config.monitor.tick_s)
            self._tick_now()

    def _tick_now(self) -> None:
        self._perform(self._monitor.on_tick(time.monotonic()))

    async def _watch(self, door: str, failed: FailedHandshakes) -> None:
        async for refusal in failed.strangers():
            self._on_stranger(door, refusal.value)

    def _on_stranger(self, door: str, reason: str) -> None:
        self._perform(self._monitor.on_stranger(door, reason, time.monotonic()))

    async def _on_lifeline(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._lifeline_tasks.add(task)
        self._writers.add(writer)
        try:
            keep_alive(writer)
            await self._hold_lifeline(reader, writer)
        except (OSError, ValueError, EOFError, asyncio.LimitOverrunError, TimeoutError, asyncio.CancelledError):
            pass  # no name came, or the monitor stops: in neither case is there anybody to tell
        finally:
            self._lifeline_tasks.discard(task)
            self._writers.discard(writer)
            writer.close()

    async def _identify(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> ProcessId | None:
        """The name that the other side gives, and in a cluster with a key proves to be entitled to."""
        key = self._address.key
        challenge = secrets.token_bytes(CHALLENGE_BYTES) if key is not None else b""
        writer.write(challenge)
        async with asyncio.timeout(_LIFELINE_NAME_S):
            line = await reader.readuntil(b"\n")
        if not 1 < len(line) <= _MAX_NAME_BYTES:
            return None
        name, _, proof = line[:-1].decode(errors="replace").partition(" ")
        process = ProcessId(name)
        if key is not None and not key.is_proof(proof, challenge, process):
            self._on_stranger("lifeline", Refusal.OTHER_KEY.value)
            return None
        return process

    async def _hold_lifeline(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = next(self._connections)
        process = await self._identify(reader, writer)
        if process is None:
            return
        self._perform(self._monitor.on_lifeline_opened(process, connection, time.monotonic()))
        try:
            while await reader.read(4096):
                pass
        except OSError as error:
            if error.errno in _NETWORK_ERRORS:
                self._perform(self._monitor.on_lifeline_timed_out(process, connection, time.monotonic()))
                return
        self._perform(self._monitor.on_lifeline_closed(process, connection, time.monotonic()))
        # The suspicion ends between two ticks: look at it then, not at the next one.
        loop = asyncio.get_running_loop()
        loop.call_later(self._config.monitor.lifeline_suspicion_s + 0.001, self._tick_if_running)

    def _tick_if_running(self) -> None:
        if not self._is_closed:
            self._tick_now()

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Send(process=process, message=message):
                    self._endpoint.send(process, message)
                case Publish(message=message):
                    self._bus.publish("view", encode(message))
                case Emit(event=event):
                    log.info("%s", _line(event))
                    self._bus.publish("event", msgspec.msgpack.encode(event))
                case Exit(reason=reason):
                    self._exit_reason = self._exit_reason or reason
                    self._exit.set()


async def _until_set(stop: asyncio.Event) -> None:
    await stop.wait()


def _line(event: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in event.items() if key not in ("type", "time"))


async def serve(args: ProcessArgs, stop: asyncio.Event) -> None:
    """Reads the configuration and the shape of the model, then runs until ``stop`` is set."""
    with for_the_operator():
        config = load_config(args.config)
        model = load_model_config(Path(config.model.path))
    address = args.monitor_address
    process = args.process_id or make_process_id(args.name, SystemRandom().getrandbits(64))
    host = args.host
    myself = Worker(process, "monitor", args.name, host, os.getpid(), f"tcp://{host}:{address.port}")
    bus = {"publish": f"tcp://{host}:{address.port + 2}", "subscribe": f"tcp://{host}:{address.port + 3}"}
    now = time.monotonic()
    monitor = Monitor(
        myself, config, model.num_moe_layers, model.n_routed_experts, now, wall_offset_s=time.time() - now, bus=bus
    )
    if address.key is None and interface_for(address.host) != "127.0.0.1":
        log.warning(
            "ANYBODY who reaches ports %d to %d of %s can kill ranks and read prompts: no --key-file was given",
            address.port, address.port + 3, address.host,
        )  # fmt: skip
    with for_the_operator():
        context = open_context(address.key)
    try:
        await MonitorService(context, address, monitor, config).run(stop)
    finally:
        context.destroy(linger=0)
