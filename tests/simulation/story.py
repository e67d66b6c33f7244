"""From a seed to a story: sizes, weather, clients and faults are drawn from it, and so is everything else."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from random import Random
from typing import Any

from msgspec.structs import replace

from common.config import (
    AgentConfig,
    ClusterConfig,
    DecodeConfig,
    MonitorConfig,
    PlannerConfig,
    PrefillConfig,
    RouterConfig,
)
from common.ids import ProcessId
from kernels import epoch_state
from kernels.reference import ElasticGroup
from services.decode import elastic_exchange, rank_engine, rounds, stream
from services.prefill import prefill_engine
from tests.simulation import symbolic_model
from tests.simulation.agent_node import AgentNode
from tests.simulation.checker import Checker
from tests.simulation.client import ClientNode
from tests.simulation.decode_node import DecodeNode
from tests.simulation.faults import Faults
from tests.simulation.memory import Memory, MemoryProvider
from tests.simulation.monitor_node import MonitorNode
from tests.simulation.pace import Pace
from tests.simulation.planner_node import PlannerNode
from tests.simulation.plots import PLOTS
from tests.simulation.prefill_node import PrefillNode
from tests.simulation.router_node import RouterNode
from tests.simulation.stream_task import POLL_S
from tests.simulation.symbolic_model import SymbolicCheckpoint, SymbolicModel
from tests.simulation.world import Bad, Node, Weather, World

FAULTS_FROM_S, FAULTS_TO_S, SETTLE_S = 2.5, 8.0, 90.0
_CHECK_S = 0.5


class Story:
    """One run. ``run`` returns when all is settled and raises `Bad` (or what a core raised) when a promise broke."""

    def __init__(self, seed: int, plot: str = "") -> None:
        self.random = random = Random(seed)
        self._plot = PLOTS[plot]
        self.num_layers = random.choice((1, 1, 2))
        # Drawn apart, so that stories are the same with and without it.
        self._placement_random = Random(f"placement {seed}")
        self._moves_experts = self._placement_random.random() < 0.7
        # Drawn apart, so that stories are the same with and without it.
        interval_s = Random(f"delivery {seed}").choice((0.0, 0.02, 0.1))
        self.config = self._plot.configured(_config(random, self._placement_random, interval_s))
        self.world = world = World(seed, *_weather(random))
        world.memory = Memory(world)
        self.checker = world.checker = Checker(world, self.num_layers)
        self._pace = Pace(
            world.random, wake_to_s=random.choice((0.02, 0.04)), pause_chance=random.choice((0.0, 0.005, 0.02))
        )
        decodes = [f"decode-{n}" for n in range(self.config.decode.num_ranks + random.choice((0, 1, 1)))]
        prefills = [f"prefill-{n}" for n in range(self.config.prefill.num_workers)]
        # Where the agent may change their number, all that run are wanted: no standbys.
        self._children_file: dict[str, int] = {}
        if self._plot.has_standby:
            decodes = [f"decode-{n}" for n in range(self.config.decode.num_ranks + 1)]
        elif random.random() < 0.5:
            decodes = decodes[: self.config.decode.num_ranks]
            self._children_file = {"decode": len(decodes), "prefill": len(prefills)}
            self.checker.sizes = {kind: {count} for kind, count in self._children_file.items()}
        routers = [f"router-{n}" for n in range(self._plot.num_routers or random.choice((1, 1, 2)))]
        self._names = ["monitor", *routers, *prefills, *decodes]

    def run(self) -> None:
        with _in_place_of_torch_and_time(self):
            self._run()

    def _run(self) -> None:
        world = self.world
        self._start_agent()
        if self._moves_experts:
            PlannerNode(world, self._placement_random, FAULTS_TO_S)
        world.death_watchers.append(self._on_death)
        self._invite_clients()
        faults = Faults(world, self.random, self._plot.faults)
        faults.plan(FAULTS_FROM_S, FAULTS_TO_S)
        now = 0.0
        while now < FAULTS_TO_S + SETTLE_S:
            now += _CHECK_S
            world.run_until(now)
            self.checker.check_slots()
            if now > FAULTS_TO_S:
                faults.end()
                if not self.checker.unsettled():
                    return
        raise Bad(f"not settled {SETTLE_S:.0f} s after the last fault: {self.checker.unsettled()}")

    def _start_agent(self) -> None:
        AgentNode(self.world, self._names, self.config, self._start_process, self._children_file).start()

    def _on_death(self, node: Node, reason: str) -> None:
        """Somebody outside restarts an agent; everybody else is an agent's child. Clients go with their router."""
        if node.kind == "agent":
            self.world.at(self.random.uniform(0.2, 2.0), self._start_agent)
        elif node.kind == "router":
            self.checker.on_router_gone(node.process)

    def _invite_clients(self) -> None:
        random = self.random
        common = tuple(random.randrange(4, symbolic_model.VOCAB) for _ in range(12))  # many prompts begin alike
        for _ in range(random.randint(4, 9)):
            at_s = random.uniform(0.5, FAULTS_TO_S - 0.5)
            prompt = tuple(random.randrange(4, symbolic_model.VOCAB) for _ in range(random.randint(1, 12)))
            if random.random() < 0.4:
                prompt = (*common[: random.randint(3, 12)], *prompt)
            self.world.at(at_s, partial(self._submit, prompt, random.randint(1, 45)))
        if random.random() < 0.2:
            self.world.at(random.uniform(3.0, FAULTS_TO_S), self._leave)

    def _submit(self, prompt: tuple[int, ...], max_tokens: int) -> None:
        routers = [
            node for node in self.world.of_kind("router") if isinstance(node, RouterNode) and not node.is_leaving
        ]
        if not routers:
            self.world.at(0.5, partial(self._submit, prompt, max_tokens))
            return
        router = self.random.choice(routers)
        router.run(lambda: router.submit(prompt, max_tokens))

    def _leave(self) -> None:
        for router in self.world.of_kind("router"):
            assert isinstance(router, RouterNode)
            for request, client in self.checker.clients.items():
                if not client.finish and router.table and router.table.request(request):
                    router.leave(request)
                    return

    def _start_process(self, name: str, kind: str, process: ProcessId) -> Node:
        if kind == "monitor":
            return MonitorNode(self.world, name, process, self.config, self.num_layers)
        if kind == "decode":
            return self._boot(DecodeNode(self.world, name, process, self._pace))
        if kind == "prefill":
            return self._boot(PrefillNode(self.world, name, process))
        assert kind == "router", kind
        return self._boot(RouterNode(self.world, name, process))

    def _boot(self, node: ClientNode) -> ClientNode:
        node.later(self.world.random.uniform(0.05, 0.6), node.start)
        return node


def _config(random: Random, placement_random: Random, delivery_interval_s: float) -> ClusterConfig:
    num_ranks = random.choice((2, 3, 3, 4))
    decode = DecodeConfig(
        num_ranks=num_ranks,
        max_ranks=num_ranks + random.choice((1, 2)),
        max_batch=random.choice((2, 4, 8)),
        block_size=4,
        num_kv_blocks=random.choice((18, 20, 40)),
        num_redundant_experts=random.choice((-1, -1, 0, 4)),
        handoff_bytes=random.choice((1 << 30, 1 << 30, 400)),
        kv_reserve_tokens=4,
        prompt_tokens=4,
        operation_deadline_s=2.0,
        idle_poll_s=0.2,
        delivery_interval_s=delivery_interval_s,
        num_staging_experts=placement_random.choice((-1, 1, 3)),
    )
    # An expert has 64 bytes here: copying one takes no time, or as long as some rounds.
    planner = PlannerConfig(
        bandwidth_bytes_per_s=placement_random.choice((1e6, 1e3, 200.0)), use_async=placement_random.random() < 0.8
    )
    monitor = MonitorConfig(formation_s=4.0, prepare_timeout_s=20.0)
    agent = AgentConfig(give_up_after=1000)
    prefill = PrefillConfig(
        num_workers=random.choice((1, 2, 2)),
        chunk_tokens=random.choice((4, 16)),
        num_kv_blocks=random.choice((20, 40)),
        prefix_cache_bytes=random.choice((0, 160, 1600)),  # 16 to a block
    )
    config = ClusterConfig(decode=decode, monitor=monitor, agent=agent, prefill=prefill, planner=planner)
    return replace(config, router=RouterConfig(rebalance_difference=random.choice((1, 2))))


def _weather(random: Random) -> tuple[Weather, Weather]:
    """Control messages travel over TCP, in order, and are lost where a connection ends. The data plane is given all
    that a network can do, since nothing in it is meant to rely on order."""
    control = Weather(loss=random.choice((0.0, 0.002, 0.01)), doubling=random.choice((0.0, 0.02)), tail_s=0.3)
    data = Weather(
        loss=random.choice((0.0, 0.01, 0.05, 0.2)),
        doubling=random.choice((0.0, 0.05, 0.2)),
        slow=random.choice((0.02, 0.1)),
        tail_s=random.choice((0.1, 0.5, 1.5)),
        in_order=random.random() < 0.4,
    )
    return control, data


@contextmanager
def _in_place_of_torch_and_time(story: Story) -> Iterator[None]:
    """What the stream would take from its process: a checkpoint, a clock, shared memory."""
    world = story.world

    class Checkpoint:
        @staticmethod
        def open(path: str, on_progress: object = None) -> SymbolicCheckpoint:
            return SymbolicCheckpoint.of(story.num_layers)

    def pause(num_polls: int) -> None:
        assert world.running is not None
        world.memory.tasks[world.running.process].wait(POLL_S, for_memory=True)

    substitutes: list[tuple[Any, str, Any]] = [
        (rank_engine, "Checkpoint", Checkpoint),
        (rank_engine, "Model", SymbolicModel),
        (rank_engine, "ShmProvider", lambda _: MemoryProvider(world.memory)),
        (rank_engine, "CompiledGroup", partial(ElasticGroup, clock=lambda: world.now, pause=pause)),
        (elastic_exchange, "expert_rows", symbolic_model.expert_rows),
        (epoch_state, "HeapWindow", world.memory.window),
        (prefill_engine, "Checkpoint", Checkpoint),
        (prefill_engine, "Model", SymbolicModel),
        (prefill_engine, "LocalExperts", symbolic_model.LocalExperts),
        (stream, "_JOINING_S", 0.02),
        (rounds, "BARE_ROUND_S", 0.02),
    ]
    originals = [(module, name, getattr(module, name)) for module, name, _ in substitutes]
    for module, name, value in substitutes:
        setattr(module, name, value)
    try:
        yield
    finally:
        for node in world.nodes.values():
            if isinstance(node, DecodeNode):
                node.is_alive = False
                node.task.kill()
        for module, name, value in originals:
            setattr(module, name, value)
