"""The planner over real sockets, with monitor and bus played by the test."""

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import zmq.asyncio

from common.config import ClusterConfig, DecodeConfig, ModelConfig
from common.ids import Epoch, Incarnation, ProcessId, Rank
from common.messages import (
    Directory,
    ExpertLoad,
    Heartbeat,
    Hello,
    Member,
    Message,
    Placement,
    PlacementPlan,
    View,
    Welcome,
    encode,
)
from common.model.config import load_model_config
from common.monitor_address import MonitorAddress
from common.process_args import ProcessArgs
from common.transport import Endpoint
from services.planner.service import PlannerService

PLANNER, MONITOR = ProcessId("planner-ab"), ProcessId("monitor-cd")
TINY_RANDOM = Path(__file__).resolve().parents[1] / "fixtures" / "tiny-random"
CONFIG = ClusterConfig(model=ModelConfig(path=str(TINY_RANDOM)), decode=DecodeConfig(num_ranks=2, max_ranks=3))


class _Stage:
    """The monitor's control endpoint, and the XPUB side of its bus: the planner hears what the test publishes."""

    def __init__(self, context: zmq.asyncio.Context) -> None:
        port = _four_free_ports()
        self.endpoint = Endpoint(context, port)
        self.bus = context.socket(zmq.XPUB)
        self.bus.bind(f"tcp://127.0.0.1:{port + 3}")
        self.stop = asyncio.Event()
        args = ProcessArgs(
            "planner", MonitorAddress("127.0.0.1", port), "127.0.0.1", "planner", PLANNER, "", None, Path("/"), 0, None
        )
        self.service = PlannerService(args, context)
        self.task = asyncio.create_task(self.service.serve(self.stop))

    async def expect(self, kind: type[Message]) -> Message:
        while True:
            incoming = await self.endpoint.receive()
            if isinstance(incoming.message, kind):
                return incoming.message

    def welcome(self, view: View | None = None) -> None:
        self.endpoint.send(PLANNER, Welcome(MONITOR, 1, CONFIG, Directory(MONITOR, 1, 1, ()), view))


def _four_free_ports() -> int:
    for port in range(21_000, 31_000, 7):
        probes = [socket.socket() for _ in range(4)]
        try:
            for offset, probe in enumerate(probes):
                probe.bind(("", port + offset))
        except OSError:
            continue
        else:
            return port
        finally:
            for probe in probes:
                probe.close()
    raise AssertionError("no free ports")


def _view(epoch: int, placement: Placement) -> View:
    members = tuple(
        Member(Rank(rank), Incarnation(1), ProcessId(f"d{rank}"), "h", "e", "x")
        for rank in range(CONFIG.decode.num_ranks)
    )
    return View(MONITOR, 1, Epoch(epoch), members, placement)


@pytest.fixture
async def stage() -> AsyncIterator[_Stage]:
    context = zmq.asyncio.Context()
    stage = _Stage(context)
    async with asyncio.timeout(30):
        yield stage
        stage.stop.set()
        await asyncio.gather(stage.task, return_exceptions=True)
    stage.endpoint.close()
    stage.bus.close(0)
    context.destroy(0)


async def test_wishes_for_the_first_placement_until_there_is_a_view(stage: _Stage) -> None:
    hello = await stage.expect(Hello)
    assert isinstance(hello, Hello) and (hello.kind, hello.name) == ("planner", "planner")
    stage.welcome()
    plan = await stage.expect(PlacementPlan)
    assert isinstance(plan, PlacementPlan) and plan.base_version == 0
    assert await stage.expect(PlacementPlan) == plan, "one message may be lost: it is repeated"
    view = _view(1025, Placement(1025, plan.physical_to_logical))
    stage.endpoint.send(PLANNER, view)
    while True:
        beat = await stage.expect(Heartbeat)
        assert isinstance(beat, Heartbeat)
        if beat.epoch == view.epoch:
            break
    assert stage.service.balancer is not None and stage.service.balancer.view == view


async def test_a_restarted_planner_learns_the_view_from_the_welcome_and_loads_from_the_bus(stage: _Stage) -> None:
    await stage.expect(Hello)
    await stage.bus.recv()  # its subscription has arrived
    await stage.bus.recv()
    plan_rows = (((0,), (1,), (2,)),)
    stage.welcome(_view(1025, Placement(1025, plan_rows)))
    while True:
        beat = await stage.expect(Heartbeat)
        assert isinstance(beat, Heartbeat)
        if beat.placement_version == 1025:
            break
    model = load_model_config(TINY_RANDOM)
    report = ExpertLoad(Rank(0), Incarnation(1), 1025, ((1,) * model.n_routed_experts,) * model.num_moe_layers)
    await stage.bus.send_multipart([b"load", encode(report)])
    await stage.bus.send_multipart([b"load", b"nonsense"])
    await stage.bus.send_multipart([b"load", encode(report)])
    while True:
        beat = await stage.expect(Heartbeat)
        assert isinstance(beat, Heartbeat)
        if beat.counters["load_reports"] == 2:
            break
