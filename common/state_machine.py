"""State machines whose legal moves are a table.

A module that holds one writes its moves as ``{state: {states it may move to}}`` and calls `StateMachine.move`; there is
no other way to change the state. A move that the table lacks raises `IllegalTransition`, which tells how the machine
got to where it is, and changes nothing.

    >>> class Door(Enum):
    ...     OPEN = "open"
    ...     SHUT = "shut"
    >>> moves = transition_table({Door.OPEN: {Door.SHUT}, Door.SHUT: {Door.OPEN}})
    >>> door = StateMachine("front door", moves, Door.OPEN, now=0.0)
    >>> door.move(Door.SHUT, now=1.5, cause="wind")
    >>> door.story()
    ['front door: open at 0.000', 'front door: open -> shut at 1.500 (wind)']
"""

from collections import deque
from collections.abc import Mapping, Set
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

State = TypeVar("State", bound=Enum)

# Long enough for the life of a request with a few faults; a machine that lives for ever must not grow for ever.
HISTORY_LENGTH = 64


@dataclass(frozen=True, slots=True)
class Transition(Generic[State]):
    """One move that happened: when, and on whose word."""

    source: State
    target: State
    now: float
    cause: str

    def __str__(self) -> str:
        because = f" ({self.cause})" if self.cause else ""
        return f"{self.source.value} -> {self.target.value} at {self.now:.3f}{because}"


class IllegalTransition(Exception):
    """A move that the table does not allow: a fault in our own code. ``story`` is how the machine got there."""

    def __init__(self, name: str, source: Enum, target: Enum, cause: str, story: list[str]) -> None:
        because = f" ({cause})" if cause else ""
        super().__init__(f"{name}: {source.value} -> {target.value}{because} is no legal move; {'; '.join(story)}")
        self.source, self.target, self.story = source, target, story


def transition_table(moves: Mapping[State, Set[State]]) -> Mapping[State, frozenset[State]]:
    """Freezes ``moves`` after checking that every state of the enumeration has a row, terminal ones an empty one."""
    if missing := sorted(state.name for state in type(next(iter(moves))) if state not in moves):
        raise ValueError(f"transition table without a row for {', '.join(missing)}")
    return {source: frozenset(targets) for source, targets in moves.items()}


class StateMachine(Generic[State]):
    """The current state and how it came about. ``name`` stands in every line of the story."""

    __slots__ = ("_history", "_moves", "_name", "_started", "_state")

    def __init__(self, name: str, moves: Mapping[State, frozenset[State]], initial: State, now: float) -> None:
        self._name, self._moves, self._state = name, moves, initial
        self._started = f"{name}: {initial.value} at {now:.3f}"
        self._history: deque[Transition[State]] = deque(maxlen=HISTORY_LENGTH)

    @property
    def state(self) -> State:
        return self._state

    def may(self, target: State) -> bool:
        return target in self._moves[self._state]

    def move(self, target: State, now: float, cause: str = "") -> None:
        """Raises IllegalTransition, and stays where it is, when the table has no such move."""
        if not self.may(target):
            raise IllegalTransition(self._name, self._state, target, cause, self.story())
        self._history.append(Transition(self._state, target, now, cause))
        self._state = target

    def story(self) -> list[str]:
        """The start and the last `HISTORY_LENGTH` moves, a line each."""
        return [self._started, *(f"{self._name}: {transition}" for transition in self._history)]
