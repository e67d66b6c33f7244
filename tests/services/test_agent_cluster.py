"""`regrow up` as its user sees it: it starts once, ends without a trace, and survives the death of its own parts."""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.process_table import processes_of, state_of
from services.cli.run_directory import RunDirectory, read_description
from tests.cluster.harness import ROOT, TINY_RANDOM, Cluster, stream_all, varied_bodies

SMALL = ("--decode-ranks", "1", "--prefill-workers", "1")


def up_again(run_dir: Path, port: int, model: Path = TINY_RANDOM) -> "subprocess.CompletedProcess[str]":
    """A start that is expected to end by itself."""
    command = [sys.executable, "-m", "services.cli", "up", *SMALL, "--run-dir", str(run_dir), "--port", str(port)]
    return subprocess.run([*command, "--model", str(model)], cwd=ROOT, capture_output=True, text=True, timeout=90)


def wait_for(what: str, is_so: Callable[[], bool], within_s: float = 60.0) -> None:
    deadline = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < deadline, f"{what}: not within {within_s} s"
        time.sleep(0.02)


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def pid_of(cluster: Cluster, name: str) -> int:
    return next((found.pid for found in processes_of(cluster.run_dir) if found.name == name), 0)


def known_pids(status: dict[str, Any]) -> dict[str, int]:
    """Name -> pid as the monitor knows them."""
    return {entry["name"]: entry["pid"] for entry in (*status["prefill"], *status["services"])}


def is_serving(status: dict[str, Any]) -> bool:
    return [rank["state"] for rank in status["ranks"] if rank["state"] == "serving"] == ["serving"]


def assert_one_line(done: "subprocess.CompletedProcess[str]", code: int, text: str) -> None:
    assert done.returncode == code, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and text in lines[0], done.stderr


@pytest.mark.slow
async def test_the_agent_may_be_killed_and_a_second_start_is_refused(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "run", *SMALL).wait_ready()
    try:
        # Ready does not wait for it: decode ranks compute prompts as long as there is no prefill worker.
        before = known_pids(await cluster.wait_status(lambda status: "prefill-0" in known_pids(status)))
        assert_one_line(up_again(cluster.run_dir, cluster.port + 1), 2, "a cluster is running in")
        assert_one_line(up_again(tmp_path / "other", cluster.port), 2, f"port {cluster.port} is in use")
        assert [stream.finish for stream in await stream_all(cluster.url, varied_bodies(1, 4))] == ["length"]
        children = {found.pid for found in processes_of(cluster.run_dir) if found.kind != "agent"}

        os.kill(before["agent-0"], signal.SIGKILL)
        after = known_pids(
            await cluster.wait_status(lambda s: known_pids(s).get("agent-0") not in (before["agent-0"], None))
        )
        assert {**before, "agent-0": after["agent-0"]} == after, "the children are the same ones"
        assert children == {found.pid for found in processes_of(cluster.run_dir) if found.kind != "agent"}

        os.kill(before["prefill-0"], signal.SIGKILL)
        again = await cluster.wait_status(lambda s: known_pids(s).get("prefill-0") not in (before["prefill-0"], None))
        assert is_serving(again)
        proof = cluster.fault("kill", rank=0)
        assert "done" in proof
        await cluster.wait_status(is_serving)
    finally:
        code = cluster.stop(signal.SIGINT)
    assert code == 0
    assert not RunDirectory(cluster.run_dir, -1).heap_dir.exists()
    assert not (cluster.run_dir / "cluster.json").exists()


def test_the_next_start_removes_what_a_killed_cluster_left_and_leaves_its_neighbour_alone(tmp_path: Path) -> None:
    first, neighbour = (Cluster(tmp_path / name, *SMALL) for name in ("run", "neighbour"))
    try:
        first.wait_ready()
        neighbour.wait_ready()
        heap_dir, other_dir = (Path(read_description(c.run_dir).heap_dir) for c in (first, neighbour))
        os.kill(pid_of(first, "agent-0"), signal.SIGSTOP)  # so that it cannot clean up behind its parent
        first.process.kill()
        first.process.wait(timeout=10)
        left = [found.pid for found in processes_of(first.run_dir)]
        assert len(left) == 6 and list(heap_dir.glob("*.heap")), "the fault did not happen: nothing is left"

        second = Cluster(first.run_dir, *SMALL).wait_ready()
        assert all(state_of(pid) in ("", "Z") for pid in left)
        assert "ended 6 processes of an earlier run" in second.errors.read_text()
        for cluster in (neighbour, second):
            streams = asyncio.run(stream_all(cluster.url, varied_bodies(2, 8)))
            assert [stream.finish for stream in streams] == ["length", "length"]
        assert second.stop() == 0
        assert not heap_dir.exists() and other_dir.exists()
    finally:
        first.stop()
        assert neighbour.stop() == 0
    assert not other_dir.exists()


def test_when_regrow_up_is_killed_its_agent_stops_everything(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "run", *SMALL).wait_ready()
    heap_dir = Path(read_description(cluster.run_dir).heap_dir)
    cluster.process.kill()
    cluster.process.wait(timeout=10)
    assert cluster.process.stdout is not None
    cluster.process.stdout.close()
    wait_for("all gone", lambda: not processes_of(cluster.run_dir))
    assert not heap_dir.exists()


def test_a_broken_checkpoint_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(TINY_RANDOM, model)
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = up_again(tmp_path / "run", port, model=model)
    assert_one_line(done, 1, "model.safetensors")
    assert "ready" not in done.stdout
    assert processes_of(tmp_path / "run") == []
    assert not RunDirectory(tmp_path / "run", -1).heap_dir.exists()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_demo_compares_every_stream_and_cleans_up() -> None:
    command = [sys.executable, "-m", "services.cli", "demo", "--model", str(TINY_RANDOM)]
    command += ["--decode-ranks", "2", "--streams", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "streams equal to the fault-free run  4 of 4" in done.stdout
    assert "serves again after" in done.stdout


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["fault", "kill", "--rank", "0", "--run-dir", "/no/such/dir"], "no cluster runs in /no/such/dir"),
        (["fault", "explode", "--rank", "0", "--publish", "127.0.0.1:7002"], "unknown action 'explode'"),
        (["fault", "kill", "--publish", "127.0.0.1:7002"], "give either rank or process"),
        (["status", "--url", "http://127.0.0.1:9"], "GET http://127.0.0.1:9/cluster"),
        (["agent", "--role", "cook", "--monitor-address", "h:7000"], "unknown role 'cook'"),
        (["agent", "--role", "decode", "--monitor-address", "h"], "monitor address must be HOST:PORT"),
        (["eval", "--url", "http://127.0.0.1:9", "--count", "1"], "no server at http://127.0.0.1:9"),
        (["eval", "--url", "http://127.0.0.1:9", "--kinds", "poetry"], "unknown task kind 'poetry'"),
    ],
)
def test_mistakes_are_one_line_and_code_2(words: list[str], text: str) -> None:
    command = [sys.executable, "-m", "services.cli", *words]
    assert_one_line(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60), 2, text)


def test_the_first_process_of_a_container_is_the_agent_itself() -> None:
    """Its child, a planner that waits for its monitor, is stopped with it."""
    words = ["agent", "--role", "planner", "--monitor-address", "127.0.0.1:9"]
    agent = subprocess.Popen([sys.executable, "-m", "services.cli", *words], cwd=ROOT, stderr=subprocess.PIPE)
    try:
        wait_for("it has a child", lambda: bool(children_of(agent.pid)))
        assert "services.agent" in command_of(agent.pid)
        (child,) = children_of(agent.pid)
        wait_for("the child is a planner", lambda: "services.planner" in command_of(child))
        assert f"--name planner-{socket.gethostname()}-{agent.pid}" in command_of(child)
        assert "--host 127.0.0.1" in command_of(child)
        os.kill(child, signal.SIGKILL)
        wait_for("it is started again", lambda: children_of(agent.pid) not in ([], [child]))
    finally:
        agent.terminate()
        agent.communicate(timeout=30)
    assert agent.returncode == 0


def test_the_command_line_starts_without_torch() -> None:
    script = "import sys, services.cli.demo, services.cli.up, services.agent.service, services.planner.service; "
    script += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=60).returncode == 0
