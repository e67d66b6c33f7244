"""Which children run, and what follows when one ends. Pure.

    WAITING --spawned--> RUNNING --exit--> WAITING --too many deaths--> GIVEN_UP
       |                    |
       | stop               | stop: SIGTERM, SIGKILL after the grace time
       v                    v
    STOPPED <----exit---- STOPPING        (and from RUNNING, on an exit while others are being stopped)

Decode ranks and prefill workers may be made more or fewer (`on_set_children`): a new one takes the lowest free number;
one that is not wanted any more is forgotten, once it has ended if it runs.

A death soon after the start doubles the time until the next start; a life of `STABLE_S` begins anew with that. A child
is given up after too many deaths in the window, however long its lives are (a large model, or a busy machine, takes
longer than `STABLE_S` to start it), or when it says twice in a row, by exit code 2, that an operator must change
something. A death that was asked for through the agent (a fault, a fence) is nobody's failure and counts for nothing.
When a kind without which nothing is served has been given up altogether, the agent fails as a whole, also when a
router that was to be replaced has left before its successor, which was given up.

The stop goes by phases: routers first, which finish their streams, while everything they need is still there; the
monitor last.
"""

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from random import Random

from common.config import ClusterConfig
from common.fault import MAX_CHILDREN
from common.ids import ProcessId, make_process_id
from common.state_machine import StateMachine, transition_table

STABLE_S = 10.0
OPERATOR_MUST_ACT = "exit 2"
_NO_PROCESS = ProcessId("")
ESSENTIAL_KINDS = ("monitor", "router", "prefill", "decode")
SCALABLE_KINDS = ("prefill", "decode")
SUCCESSOR_S = 15.0  # a router that is replaced waits so long for the next one
_STOP_PHASES: tuple[tuple[str, ...], ...] = (("router",), ("planner", "prefill", "decode"), ("monitor",))


class ChildState(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    GIVEN_UP = "given up"
    STOPPING = "stopping"
    STOPPED = "stopped"


MOVES = transition_table(
    {
        ChildState.WAITING: {ChildState.RUNNING, ChildState.GIVEN_UP, ChildState.STOPPED},
        ChildState.RUNNING: {ChildState.WAITING, ChildState.GIVEN_UP, ChildState.STOPPING, ChildState.STOPPED},
        ChildState.GIVEN_UP: {ChildState.STOPPED},
        ChildState.STOPPING: {ChildState.STOPPED},
        ChildState.STOPPED: set(),
    }
)


@dataclass(frozen=True, slots=True)
class Spawn:
    """Start it, then call `on_spawned`, or `on_exit` with the reason why it could not be started."""

    name: str
    kind: str
    process: ProcessId


@dataclass(frozen=True, slots=True)
class Kill:
    """Send ``signal`` (a name) to the child."""

    name: str
    signal: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    """It will not be started again; ``fatal``: nothing can be served without its kind, stop everything."""

    name: str
    reason: str
    fatal: bool


Action = Spawn | Kill | GiveUp


@dataclass(slots=True)
class Child:
    name: str
    kind: str
    machine: StateMachine[ChildState]
    process: ProcessId = _NO_PROCESS
    pid: int = 0
    started: float = 0.0
    start_at: float = 0.0
    kill_at: float | None = None
    death_was_asked_for: bool = False
    deaths: deque[float] = field(default_factory=deque)
    num_quick_deaths: int = 0  # in a row
    num_operator_errors: int = 0
    num_restarts: int = 0

    @property
    def state(self) -> ChildState:
        return self.machine.state


def kind_of(name: str) -> str:
    """``decode-2`` -> ``decode``"""
    return name.partition("-")[0]


def _number(child: Child) -> int:
    number = child.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else 0


class Supervisor:
    """``rng`` draws the nonces of process ids."""

    def __init__(self, names: Sequence[str], config: ClusterConfig, rng: Random, now: float) -> None:
        self._config, self._rng = config, rng
        self._children = {
            name: Child(name, kind_of(name), StateMachine(name, MOVES, ChildState.WAITING, now), start_at=now)
            for name in names
        }
        self._stop_phase: int | None = None

    @property
    def children(self) -> Mapping[str, Child]:
        return self._children

    @property
    def alive(self) -> list[Child]:
        return [c for c in self._children.values() if c.state in (ChildState.RUNNING, ChildState.STOPPING)]

    def num_wanted_children(self, kind: str) -> int:
        """Without those that are being ended."""
        return len(self._lasting(kind))

    def _lasting(self, kind: str) -> list[Child]:
        ending = (ChildState.STOPPING, ChildState.STOPPED)
        return [c for c in list(self._children.values()) if c.kind == kind and c.state not in ending]

    @property
    def is_stopped(self) -> bool:
        return all(child.state is ChildState.STOPPED for child in self._children.values())

    def by_process(self, process: ProcessId) -> Child | None:
        return next((child for child in self.alive if child.process == process), None)

    def configure(self, config: ClusterConfig) -> None:
        """The configuration in force, once the monitor has told it."""
        self._config = config

    def on_spawned(self, name: str, process: ProcessId, pid: int, now: float) -> None:
        """Also for a child that another life of the agent left running."""
        child = self._children[name]
        child.machine.move(ChildState.RUNNING, now, f"pid {pid}")
        child.process, child.pid, child.started, child.death_was_asked_for = process, pid, now, False

    def add(self, name: str, now: float) -> None:
        """A child beyond those given at the start."""
        self._children[name] = Child(
            name, kind_of(name), StateMachine(name, MOVES, ChildState.WAITING, now), start_at=now
        )

    def on_set_children(self, kind: str, count: int, retire: Collection[ProcessId], now: float) -> list[Action]:
        """Makes the number of lasting children of ``kind`` ``count``. Those that do not run are the first to go, the
        highest number first; of those that run, only the ones in ``retire`` may go. The same words again do nothing.
        """
        if self._stop_phase is not None or kind not in SCALABLE_KINDS or not 1 <= count <= MAX_CHILDREN:
            return []
        for number in range(2 * MAX_CHILDREN):
            if len(self._lasting(kind)) < count and f"{kind}-{number}" not in self._children:
                self.add(f"{kind}-{number}", now)
        surplus = max(0, len(self._lasting(kind)) - count)
        idle = [child for child in self._lasting(kind) if child.state is not ChildState.RUNNING]
        for child in sorted(idle, key=_number, reverse=True)[:surplus]:
            del self._children[child.name]
        surplus = max(0, len(self._lasting(kind)) - count)
        ending = [child for child in self._lasting(kind) if child.process in retire][:surplus]
        return [action for child in ending for action in self._stop(child, now)]

    def keep_routers(self, count: int) -> None:
        """Forgets routers that do not run, where ``count`` others do: a former life of the agent was replacing one."""
        idle = [child for child in self._lasting("router") if child.state is not ChildState.RUNNING]
        surplus = max(0, len(self._lasting("router")) - count)
        for child in sorted(idle, key=_number, reverse=True)[:surplus]:
            del self._children[child.name]

    def on_restart(self, process: ProcessId, now: float) -> list[Action]:
        """A new router is started, under the lowest free number, and the old one leaves once that one listens. Asked
        again, or for a process that is no running router, it does nothing."""
        child = self.by_process(process)
        if child is None or child.kind != "router" or child.state is not ChildState.RUNNING:
            return []
        if self._stop_phase is not None:
            return []
        names = (f"router-{number}" for number in range(len(self._children) + 1))
        self.add(next(name for name in names if name not in self._children), now)
        self._stop(child, now)
        child.kill_at = now + SUCCESSOR_S + self._config.router.drain_s + self._config.agent.stop_s
        return [Kill(child.name, "USR1"), Kill(child.name, "CONT")]

    def on_asked_to_kill(self, process: ProcessId) -> None:
        if child := self.by_process(process):
            child.death_was_asked_for = True

    def on_exit(self, name: str, reason: str, now: float) -> list[Action]:
        """The child was reaped, or could not be started. ``reason``: "exit 1", "signal KILL", ..."""
        child = self._children[name]
        if self._stop_phase is not None:  # also one that died by itself before its phase came
            child.machine.move(ChildState.STOPPED, now, reason)
            return self._advance_stop(now)
        if child.state is ChildState.STOPPING:
            del self._children[name]
            heirs = [other for other in self._children.values() if other.kind == child.kind]
            return [GiveUp(heirs[0].name, "given up", True)] if heirs and self._all_given_up(child.kind) else []
        if self._gives_up(child, reason, now):
            return [self._give_up(child, reason, now)]
        if child.state is ChildState.RUNNING:
            child.machine.move(ChildState.WAITING, now, reason)
        agent = self._config.agent
        doublings = max(0, child.num_quick_deaths - 1)
        child.start_at = now + min(agent.restart_backoff_s * 2.0**doublings, agent.restart_backoff_max_s)
        child.num_restarts += 1
        return []

    def _gives_up(self, child: Child, reason: str, now: float) -> bool:
        agent = self._config.agent
        if child.state is ChildState.RUNNING and now - child.started >= STABLE_S:
            child.num_quick_deaths = child.num_operator_errors = 0
        if child.death_was_asked_for:
            child.death_was_asked_for = False  # of this life: the next one may not even start
            return False
        child.num_operator_errors = child.num_operator_errors + 1 if reason == OPERATOR_MUST_ACT else 0
        child.num_quick_deaths += 1
        child.deaths.append(now)
        while now - child.deaths[0] > agent.give_up_window_s:
            child.deaths.popleft()
        return child.num_operator_errors >= 2 or len(child.deaths) >= agent.give_up_after

    def _give_up(self, child: Child, reason: str, now: float) -> GiveUp:
        child.machine.move(ChildState.GIVEN_UP, now, reason)
        times = f"{len(child.deaths)} deaths" if len(child.deaths) > 1 else "1 death"
        return GiveUp(child.name, f"{reason} ({times})", self._all_given_up(child.kind))

    def _all_given_up(self, kind: str) -> bool:
        """Nobody is left of a kind without which nothing is served."""
        of_kind = [child for child in self._children.values() if child.kind == kind]
        return kind in ESSENTIAL_KINDS and all(child.state is ChildState.GIVEN_UP for child in of_kind)

    def on_tick(self, now: float) -> list[Action]:
        actions: list[Action] = [Kill(child.name, "KILL") for child in self.alive if self._is_overdue(child, now)]
        if self._stop_phase is not None:
            return actions
        for child in self._children.values():
            if child.state is ChildState.WAITING and now >= child.start_at:
                process = make_process_id(child.name, self._rng.getrandbits(64))
                actions.append(Spawn(child.name, child.kind, process))
        return actions

    def _is_overdue(self, child: Child, now: float) -> bool:
        if child.kill_at is None or now < child.kill_at:
            return False
        child.kill_at = now + 1.0  # again, in case the first was lost on a process that was just starting
        return True

    def on_stop(self, now: float) -> list[Action]:
        """Stops everything in order; calling it again changes nothing."""
        if self._stop_phase is not None:
            return []
        self._stop_phase = -1
        for child in self._children.values():
            if child.state in (ChildState.WAITING, ChildState.GIVEN_UP):
                child.machine.move(ChildState.STOPPED, now, "stop")
        return self._advance_stop(now)

    def _advance_stop(self, now: float) -> list[Action]:
        """Starts the next phase when nobody of the present one is left."""
        if self._stop_phase is None or any(child.state is ChildState.STOPPING for child in self.alive):
            return []
        while self._stop_phase + 1 < len(_STOP_PHASES):
            self._stop_phase += 1
            due = [child for child in self.alive if child.kind in _STOP_PHASES[self._stop_phase]]
            if due:
                return [action for child in due for action in self._stop(child, now)]
        return [action for child in self.alive for action in self._stop(child, now)]

    def _stop(self, child: Child, now: float) -> list[Action]:
        grace_s = self._config.agent.stop_s
        if child.kind == "router":
            grace_s += self._config.router.drain_s
        child.kill_at = now + grace_s
        child.machine.move(ChildState.STOPPING, now, "stop")
        # A stopped process reads its SIGTERM only once it is continued.
        return [Kill(child.name, "TERM"), Kill(child.name, "CONT")]
