"""Every leak check fails on its leak, and on nothing else: shown with a pytest of its own for each."""

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

ROOT = Path(__file__).resolve().parent.parent
HEADER = """
import asyncio, os, signal, socket, subprocess, sys, threading
import tests.leak_checks
tests.leak_checks.GRACE_S = 0.2
kept = []
"""
LOOP_SCOPE = ("-o", "asyncio_default_fixture_loop_scope=function")
LEAKS = {
    "thread": (
        "def test(): threading.Thread(target=threading.Event().wait, daemon=True).start()",
        "threads left running",
    ),
    "child": ("def test(): kept.append(subprocess.Popen(['sleep', '100']))", "child processes left: ['* sleep*']"),
    "zombie": ("def test(): os.posix_spawn('/bin/true', ['true'], {})", "child processes left: ['* true']"),
    "orphan": (
        "def test(): subprocess.run(['sh', '-c', 'sleep 100 > /dev/null 2>&1 &'], check=True)",
        "processes left running: ['* sleep 100']",
    ),
    "task": ("async def test(): kept.append(asyncio.create_task(asyncio.sleep(100)))", "tasks left running"),
    "socket": ("def test(): kept.append(socket.socket())", "1 sockets left open"),
    "shared memory": (
        "def test(): open(f'/dev/shm/regrow-leak-{os.getpid()}', 'x').close()",
        "shared memory left: ['/dev/shm/regrow-leak-*']",
    ),
}
CLEAN = """
import time
async def test_tasks():
    async with asyncio.TaskGroup() as group:
        group.create_task(asyncio.to_thread(time.monotonic))
def test_processes():
    assert subprocess.run(['true']).returncode == 0
def test_sockets():
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
def test_threads():
    thread = threading.Thread(target=time.monotonic)
    thread.start()
    thread.join()
"""


def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, source: str) -> pytest.RunResult:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makepyfile(HEADER + source)
    return pytester.runpytest_subprocess("-p", "tests.leak_checks", "-o", "asyncio_mode=auto", *LOOP_SCOPE, timeout=60)


@pytest.mark.parametrize(("source", "message"), LEAKS.values(), ids=LEAKS.keys())
def test_a_leak_fails(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, source: str, message: str) -> None:
    result = run(pytester, monkeypatch, source)
    for file in Path("/dev/shm").glob("regrow-leak-*"):
        file.unlink()
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines([f"*{message.replace('[', '[[]')}*"])


def test_what_is_cleaned_up_passes(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    run(pytester, monkeypatch, CLEAN).assert_outcomes(passed=4)
