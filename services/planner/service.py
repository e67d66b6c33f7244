"""The planner's shell: loads and views in, the first placement and balancedness out.

It holds nothing that must survive: after a restart the view comes with the welcome, and loads with the next reports.
"""

import asyncio
import logging
import os
import time
from collections.abc import Awaitable
from pathlib import Path
from secrets import randbits

import msgspec
import zmq.asyncio

from common.bus import BusPublisher, BusSubscriber
from common.config import ClusterConfig
from common.ids import make_process_id
from common.messages import ExpertLoad as LoadReport
from common.messages import Heartbeat, Hello, Message, PlacementPlan, View, Welcome
from common.model.config import load_model_config
from common.monitor_client import MonitorClient
from common.process_args import ProcessArgs
from common.transport import open_context
from services.planner.expert_load import ExpertLoad
from services.planner.plan import Assessor, first_plan

_REPEAT_PLAN_S = 0.5
_ASSESS_S = 5.0

log = logging.getLogger("regrow.planner")


class PlannerService:
    def __init__(self, args: ProcessArgs, context: zmq.asyncio.Context) -> None:
        self._args = args
        self.process = args.process_id or make_process_id(args.name, randbits(64))
        self._view: View | None = None
        self._load: ExpertLoad | None = None
        self._first_plan: PlacementPlan | None = None
        self._config = ClusterConfig()
        self._assessor = Assessor()
        self._num_reports = 0
        self._monitor = MonitorClient(
            context, self.process, args.monitor_address, self._hello, self._beat, self._on_message
        )
        self._subscriber = BusSubscriber(context, args.monitor_address, ("load", "view"))
        self._publisher = BusPublisher(context, args.monitor_address)

    async def serve(self, stop: asyncio.Event) -> None:
        loops: list[Awaitable[object]] = [
            self._monitor.run(),
            self._receive(),
            self._plan(),
            self._assess(),
            stop.wait(),
        ]
        tasks = [asyncio.ensure_future(loop) for loop in loops]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._subscriber.close()
            self._publisher.close()

    async def _receive(self) -> None:
        while True:
            _, message = await self._subscriber.receive()
            if not isinstance(message, View) or self._monitor.accepts(message):
                self._on_message(message)

    async def _plan(self) -> None:
        """The wish for the first placement, until there is a view: then it came too late, or was carried out."""
        while True:
            if self._first_plan is not None and self._view is None:
                self._monitor.send(self._first_plan)
            await asyncio.sleep(_REPEAT_PLAN_S)

    async def _assess(self) -> None:
        while True:
            await asyncio.sleep(_ASSESS_S)
            if self._view is None or self._load is None or not self._config.planner.log_balancedness:
                continue
            if figures := self._assessor.on_tick(self._view, self._load.at(time.monotonic())):
                log.info("balancedness %(balancedness)s, placement %(placement_version)s", figures)
                event = {"type": "event", "kind": "balancedness", "time": time.time(), **figures}
                self._publisher.publish_raw("event", msgspec.msgpack.encode(event))

    def _on_message(self, message: Message) -> None:
        match message:
            case Welcome(config=config, view=view):
                self._configure(config)
                if view is not None:
                    self._adopt(view)
            case View():
                self._adopt(message)
            case LoadReport(tokens=tokens) if self._load is not None:
                self._num_reports += self._load.on_report(tokens, time.monotonic())
            case _:
                pass

    def _configure(self, config: ClusterConfig) -> None:
        """A monitor that was started again may have another configuration, of another model even."""
        if config == self._config and self._load is not None:
            return
        model = load_model_config(Path(config.model.path))
        shape = model.num_moe_layers, model.n_routed_experts
        self._config = config
        self._load = ExpertLoad(*shape, config.planner.window_s, time.monotonic())
        self._first_plan = first_plan(self.process, config.decode, *shape)

    def _adopt(self, view: View) -> None:
        if self._view is None or view.epoch > self._view.epoch:
            self._view = view

    def _hello(self) -> Hello:
        args = self._args
        return Hello(self.process, "planner", args.name, args.host, os.getpid(), "", args.agent)

    def _beat(self) -> Heartbeat:
        view = self._view
        counters = {"load_reports": self._num_reports}
        if view is None:
            return Heartbeat(self.process, term=self._monitor.term, counters=counters)
        return Heartbeat(
            self.process,
            term=self._monitor.term,
            epoch=view.epoch,
            placement_version=view.placement.version,
            counters=counters,
        )


async def serve(args: ProcessArgs, stop: asyncio.Event) -> None:
    context = open_context(args.monitor_address.key)
    try:
        await PlannerService(args, context).serve(stop)
    finally:
        context.destroy(linger=0)
