"""A test that leaves something behind fails: threads, child processes, tasks, sockets, descendants, shared memory.

What one test can start is checked after each test; what a fixture of a module may share (a cluster whose ranks are
killed and replaced) is checked after the module. Descendants are found by a variable in their environment, so a process
whose parent was killed is found too; they are killed, so that one leak fails one test and not all that follow.
"""

import asyncio
import contextlib
import gc
import inspect
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Set
from pathlib import Path

import pytest

from tests.own_directory import own_directory_prefix

_MARK = "REGROW_TEST_SESSION"
_SESSION = f"{os.getpid()}-{time.monotonic_ns()}"
os.environ[_MARK] = _SESSION

_PROC = Path("/proc")
_SHARED_MEMORY = Path("/dev/shm")
_BEFORE = pytest.StashKey[tuple[Set[int], Set[int]]]()
GRACE_S = 20.0


def left_over(look: Callable[[], set[str]]) -> list[str]:
    """What ``look`` still finds after `GRACE_S`; returns at once when it finds nothing."""
    deadline = time.monotonic() + GRACE_S
    while (found := look()) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.02)
    return sorted(found)


def living_threads() -> dict[int, str]:
    """Daemon threads too: one that outlives its owner goes on touching what the next test made."""
    return {
        thread.ident: thread.name
        for thread in threading.enumerate()
        # pyzmq keeps one thread for the life of the process, which frees the buffers of zero-copy sends.
        if thread.ident is not None and type(thread).__module__ != "zmq.utils.garbage"
    }


def child_processes() -> dict[int, str]:
    """pid -> command of the direct children, zombies included: who starts a process reaps it."""
    children: dict[int, str] = {}
    for listing in _PROC.glob("self/task/*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            for pid in map(int, listing.read_text().split()):
                children[pid] = command_of(pid)
    # The standard library keeps this one for the life of the process, and has no public way to stop it.
    return {pid: command for pid, command in children.items() if "multiprocessing.resource_tracker" not in command}


def command_of(pid: int) -> str:
    """The command line, or the mere name of a zombie, which has none."""
    try:
        line = (_PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        return line or (_PROC / str(pid) / "comm").read_text().strip()
    except OSError:
        return "gone"


def descendants() -> dict[int, str]:
    """pid -> command of all living processes that inherited this session's mark, orphans included."""
    marked = f"{_MARK}={_SESSION}".encode()
    found: dict[int, str] = {}
    for entry in _PROC.iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if marked in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = command_of(int(entry.name))
            except OSError:
                continue  # gone, or somebody else's
    return found


def open_sockets() -> set[str]:
    found = set()
    for descriptor in _PROC.glob("self/fd/*"):
        try:
            target = os.readlink(descriptor)
        except OSError:
            continue
        if target.startswith("socket:"):
            found.add(target)
    return found


def heap_files() -> set[str]:
    """Shared memory of clusters that are gone: what a living process of another session maps is not ours to judge."""
    found = {str(file) for top in _SHARED_MEMORY.glob("regrow*") for file in (top, *top.rglob("*"))}
    return {file for file in found if not in_use_elsewhere(file)}


def in_use_elsewhere(file: str) -> bool:
    """Whether a living process of another session maps it, was told its directory (a cluster's heap directory stands on
    the command lines of its processes), or made it (a directory of tests is named after its maker)."""
    ours = descendants().keys() | {os.getpid()}
    directory = str(_SHARED_MEMORY / Path(file).relative_to(_SHARED_MEMORY).parts[0])
    for entry in _PROC.iterdir():
        if entry.name.isdigit() and int(entry.name) not in ours:
            if directory.startswith(f"{_SHARED_MEMORY}/{own_directory_prefix(int(entry.name))}"):
                return True
            try:
                if directory in command_of(int(entry.name)) or file in (entry / "maps").read_text():
                    return True
            except OSError:
                continue
    return False


@pytest.fixture(autouse=True)
def what_ran_before(request: pytest.FixtureRequest) -> None:
    """Looked up once the fixtures of wider scopes are there, and before those of the test itself."""
    request.node.stash[_BEFORE] = (living_threads().keys(), child_processes().keys())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """After all fixtures of the test, its event loop among them, which a fixture could not wait for."""
    try:
        yield
    finally:
        if _BEFORE in item.stash:  # absent when the set-up failed earlier
            fail_on_leaks(*item.stash[_BEFORE])


def fail_on_leaks(threads: Set[int], children: Set[int]) -> None:
    left = left_over(lambda: {name for ident, name in living_threads().items() if ident not in threads})
    assert not left, f"threads left running: {left}"
    left = left_over(lambda: {f"{pid} {text}" for pid, text in child_processes().items() if pid not in children})
    assert not left, f"child processes left: {left}"


@pytest.fixture(autouse=True, scope="module")
def no_leaks_of_a_module() -> Iterator[None]:
    """Descendants, sockets, shared memory."""
    sockets, files, running = open_sockets(), heap_files(), descendants()
    yield
    left = left_over(lambda: {f"{pid} {text}" for pid, text in descendants().items() if pid not in running})
    for line in left:
        os.kill(int(line.split()[0]), signal.SIGKILL)
    assert not left, f"processes left running: {left}"
    left = left_over(lambda: open_sockets() - sockets)
    assert not left, f"{len(left)} sockets left open"
    left = left_over(lambda: heap_files() - files)
    assert not left, f"shared memory left: {left}"


@pytest.fixture
async def no_leaked_tasks() -> AsyncIterator[None]:
    """Given to every coroutine test, before all its other fixtures, so that they are torn down first."""
    before = asyncio.all_tasks()
    yield
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    if left:  # cancelled tasks need a turn of the loop to end
        _, left = await asyncio.wait(left, timeout=1.0)
    assert not left, f"tasks left running: {sorted(map(repr, left))}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.obj):
            item.fixturenames.insert(0, no_leaked_tasks.__name__)
