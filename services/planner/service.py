"""The planner's shell: loads and views in, wishes for placements out; plans are made on another thread.

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
from common.ids import Epoch, make_process_id
from common.messages import ExpertLoad, Heartbeat, Hello, Message, PlacementPlan, View, Welcome
from common.model.config import load_model_config
from common.monitor_client import MonitorClient
from common.network_cut import NetworkCut
from common.placement_file import PlacementFile, parse_placement_file
from common.process_args import ProcessArgs
from common.service_runner import for_the_operator
from common.transport import open_context
from services.planner.balancer import Balancer, ModelShape
from services.planner.plan import Answer, Question, answer, first_plan
from services.planner.rebalance_trigger import Verdict

_REPEAT_PLAN_S = 0.5
_TICK_S = 1.0

log = logging.getLogger("regrow.planner")


class PlannerService:
    def __init__(self, args: ProcessArgs, context: zmq.asyncio.Context) -> None:
        self._args = args
        self.process = args.process_id or make_process_id(args.name, randbits(64))
        self._config: ClusterConfig | None = None
        self.balancer: Balancer | None = None
        self._first_plan: PlacementPlan | None = None
        self._making: asyncio.Task[Answer] | None = None
        self._plan_us = 0
        network = NetworkCut()
        self._monitor = MonitorClient(
            context, self.process, args.monitor_address, self._hello, self._beat, self._on_message, network=network
        )
        self._subscriber = BusSubscriber(context, args.monitor_address, ("load", "view"), network)
        self._publisher = BusPublisher(context, args.monitor_address, network)

    async def serve(self, stop: asyncio.Event) -> None:
        loops: list[Awaitable[object]] = [
            self._monitor.run(),
            self._receive(),
            self._wish(),
            self._balance(),
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
            making = [self._making] if self._making else []
            await asyncio.gather(*tasks, *making, return_exceptions=True)
            self._subscriber.close()
            self._publisher.close()

    async def _receive(self) -> None:
        while True:
            _, message = await self._subscriber.receive()
            if not isinstance(message, View) or self._monitor.accepts(message):
                self._on_message(message)

    async def _wish(self) -> None:
        """Again and again: for the first placement until there is a view (then it came too late, or was carried out),
        later for the step that the balancer has in mind."""
        while True:
            balancer = self.balancer
            if balancer is not None:
                plan = self._first_plan if balancer.view is None else balancer.wish
                if plan is not None:
                    self._monitor.send(plan)
            await asyncio.sleep(_REPEAT_PLAN_S)

    async def _balance(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            balancer = self.balancer
            if balancer is None:
                continue
            question = balancer.on_tick(time.monotonic())
            if question is not None:
                await self._plan(balancer, question)
            self._tell_balancedness(balancer)

    async def _plan(self, balancer: Balancer, question: Question) -> None:
        """On another thread, one at a time. What is not ready by the deadline is thrown away when it is."""
        assert self._config is not None
        deadline_s = self._config.planner.plan_deadline_s
        made = None
        if self._making is None or self._making.done():
            begun = time.monotonic()
            self._making = asyncio.create_task(asyncio.to_thread(answer, question))
            done, _ = await asyncio.wait([self._making], timeout=deadline_s)
            made = self._making.result() if done else None
            self._plan_us = int((time.monotonic() - begun) * 1e6)
        verdict = balancer.on_answer(made, time.monotonic())
        if made is None:
            log.warning("no plan within %g s; the placement stays", deadline_s)
        elif verdict is not None:
            self._tell_plan(made, verdict)

    def _tell_plan(self, made: Answer, verdict: Verdict) -> None:
        fields: dict[str, object] = {
            "base_version": made.base_version,
            "verdict": verdict.value,
            "balancedness": round(made.balancedness_now, 4),
            "planned": round(made.balancedness_planned, 4),
            "num_moves": made.num_moves,
            "plan_ms": round(self._plan_us / 1000, 1),
        }
        log.info("plan: %s", fields)
        self._publish("plan", fields)

    def _tell_balancedness(self, balancer: Balancer) -> None:
        if self._config is None or not self._config.planner.log_balancedness:
            return
        if figures := balancer.assess():
            log.info("balancedness %(balancedness)s, placement %(placement_version)s", figures)
            self._publish("balancedness", figures)

    def _publish(self, kind: str, fields: dict[str, object]) -> None:
        event = {"type": "event", "kind": kind, "time": time.time(), **fields}
        self._publisher.publish_raw("event", msgspec.msgpack.encode(event))

    def _on_message(self, message: Message) -> None:
        match message:
            case Welcome(config=config, view=view):
                self._configure(config)
                if view is not None:
                    self._on_message(view)
            case View() if self.balancer is not None:
                self.balancer.on_view(message, time.monotonic())
            case ExpertLoad() if self.balancer is not None:
                self.balancer.on_load(message)
            case _:
                pass

    def _configure(self, config: ClusterConfig) -> None:
        """A monitor that was started again may have another configuration, of another model even."""
        if config == self._config:
            return
        with for_the_operator():
            model = load_model_config(Path(config.model.path))
        num_layers, num_experts = model.num_moe_layers, model.n_routed_experts
        expert_bytes = 3 * 4 * model.hidden_size * model.moe_intermediate_size
        self._config = config
        shape = ModelShape(num_layers, num_experts, model.routing.n_group, expert_bytes)
        self.balancer = Balancer(self.process, config, shape)
        with for_the_operator():
            recorded = _recorded(config)
            self._first_plan = first_plan(self.process, config.decode, num_layers, num_experts, recorded)

    def _hello(self) -> Hello:
        args = self._args
        return Hello(self.process, "planner", args.name, args.host, os.getpid(), "", args.agent)

    def _beat(self) -> Heartbeat:
        balancer = self.balancer
        if balancer is None:
            return Heartbeat(self.process, term=self._monitor.term)
        view = balancer.view
        return Heartbeat(
            self.process,
            term=self._monitor.term,
            epoch=view.epoch if view else Epoch(0),
            placement_version=view.placement.version if view else 0,
            counters={
                "load_reports": balancer.num_reports,
                "plans": balancer.num_plans,
                "plans_late": balancer.num_late,
                "plan_us": self._plan_us,
            },
        )


def _recorded(config: ClusterConfig) -> PlacementFile | None:
    """Raises ValueError: who asks to start from a file wants no other start."""
    path = config.planner.init_placement
    if not path:
        return None
    try:
        return parse_placement_file(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"planner.init_placement: cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"planner.init_placement: {path}: {error}") from None


async def serve(args: ProcessArgs, stop: asyncio.Event) -> None:
    context = open_context(args.monitor_address.key)
    try:
        await PlannerService(args, context).serve(stop)
    finally:
        context.destroy(linger=0)
