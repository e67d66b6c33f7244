"""A supervisor whose children start when they should."""

from random import Random

from common.config import AgentConfig, ClusterConfig, RouterConfig
from services.agent.supervisor import Spawn, Supervisor

CONFIG = ClusterConfig(
    agent=AgentConfig(
        restart_backoff_s=0.1, restart_backoff_max_s=5.0, give_up_after=4, give_up_window_s=60.0, stop_s=8.0
    ),
    router=RouterConfig(drain_s=10.0),
)


def make(*names: str) -> Supervisor:
    return Supervisor(names, CONFIG, Random(1), now=0.0)


def start(supervisor: Supervisor, now: float) -> list[str]:
    """Does what a tick asks for; returns the names of the started."""
    spawns = [action for action in supervisor.on_tick(now) if isinstance(action, Spawn)]
    for number, spawn in enumerate(spawns):
        supervisor.on_spawned(spawn.name, spawn.process, 1000 + number, now)
    return [spawn.name for spawn in spawns]
