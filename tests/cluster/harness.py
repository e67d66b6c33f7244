"""A real cluster in a temporary run directory, and clients that record what they received and when.

`Cluster` starts ``regrow up``, waits for its ready line with a deadline, and fails when anything is left behind after
the stop.
"""

import asyncio
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp

from common.fault_answers import proof_of
from common.monitor_address import MonitorAddress
from services.cli.chat_client import Stream, run_streams
from services.cli.fault import FaultClient, fault_event
from services.cli.run_directory import read_description

ROOT = Path(__file__).resolve().parents[2]
TINY_RANDOM = ROOT / "tests" / "fixtures" / "tiny-random"
START_S = 150.0
STREAMS_S = 200.0


class Cluster:
    def __init__(self, run_dir: Path, *arguments: str, model: Path = TINY_RANDOM, config: str = "") -> None:
        self.run_dir, self.port = run_dir, _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        run_dir.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "services.cli", "up", "--port", str(self.port), "--run-dir", str(run_dir)]
        command += ["--model", str(model), *arguments]
        if config:
            path = run_dir.parent / f"{run_dir.name}.toml"
            path.write_text(config)
            command += ["--config", str(path)]
        self.errors = run_dir.parent / f"{run_dir.name}.stderr"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors)

    def wait_ready(self) -> "Cluster":
        """Returns once ``ready URL`` was printed; raises with everything printed so far otherwise."""
        assert self.process.stdout is not None
        descriptor, printed, deadline = self.process.stdout.fileno(), b"", time.monotonic() + START_S
        while f"ready {self.url}".encode() not in printed.splitlines():
            readable, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(descriptor, 65536) if readable else b""
            printed += data
            if not data:
                self.process.kill()
                self.process.wait(timeout=10)
                raise AssertionError(f"not ready within {START_S} s: {printed.decode()}\n{self.logs()}")
        return self

    def logs(self, last: int = 2000) -> str:
        paths = [self.errors, *sorted(self.run_dir.glob("logs/*"))]
        texts = [f"--- {path.name}\n{path.read_text()[-last:]}" for path in paths]
        return "\n".join(texts)

    def fault(self, action: str, **target: int | str) -> str:
        """Runs ``regrow fault`` and returns what it printed; it exits 0 only with proof."""
        options = [item for key, value in target.items() for item in (f"--{key.replace('_', '-')}", str(value))]
        command = [sys.executable, "-m", "services.cli", "fault", action, *options, "--run-dir", str(self.run_dir)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"fault {action} {target}: {done.stdout}{done.stderr}\n{self.logs()}"
        return done.stdout

    def inject(self, action: str, rank: int | None = None, process: str | None = None, **options: object) -> str:
        """Blocking, without the start of a process: the fault happens now. Returns the monitor's proof."""
        address = MonitorAddress.parse(read_description(self.run_dir).monitor_address)
        with FaultClient(address) as bus:
            answer = bus.inject(fault_event(action, rank, process, **options))
        assert answer["status"] == "done", f"{action} {rank} {process} {options}: {answer}\n{self.logs()}"
        return proof_of(answer)

    def status(self) -> dict[str, Any]:
        """``GET /cluster``, blocking."""
        return asyncio.run(self.fetch_status())

    async def fetch_status(self) -> dict[str, Any]:
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"{self.url}/cluster", timeout=aiohttp.ClientTimeout(total=10)) as response,
        ):
            body: dict[str, Any] = await response.json()
            return body

    async def fetch_requests(self) -> list[dict[str, Any]]:
        """``GET /requests``."""
        async with aiohttp.ClientSession() as session, session.get(f"{self.url}/requests") as response:
            body = await response.json()
            found: list[dict[str, Any]] = body["requests"]
            return found

    async def wait_status(self, what: Callable[[dict[str, Any]], bool], within_s: float = 120.0) -> dict[str, Any]:
        """The first status for which ``what`` holds; raises with the last one otherwise."""
        deadline, status = time.monotonic() + within_s, {}
        while time.monotonic() < deadline:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                status = await self.fetch_status()
                if what(status):
                    return status
            await asyncio.sleep(0.05)
        raise AssertionError(f"not reached within {within_s} s: {json.dumps(status)[:6000]}\n{self.logs()}")

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Stops the cluster and asserts that nothing is left, no process and no file of symmetric memory; and that none
        failed by an error of ours: a rank is replaced then like any other, and no stream would tell."""
        pids = self.pids()
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(timeout=10)
            raise AssertionError(f"regrow up did not stop within 30 s of {number.name}\n{self.logs()}") from None
        assert self.process.stdout is not None
        self.process.stdout.close()
        left = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
        assert not left, f"processes left behind: {left}\n{self.logs()}"
        failed = [path.name for path in self.run_dir.glob("logs/*") if "Traceback" in path.read_text()]
        assert not failed, f"errors in {failed}\n{self.logs(last=6000)}"
        return self.process.returncode

    def pids(self) -> list[int]:
        """Every process started by this cluster, by the run directory on its command line or in its parents'."""
        return [pid for pid, _ in processes_of(self.run_dir)]


def processes_of(run_dir: Path) -> Iterator[tuple[int, str]]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if str(run_dir) in command and int(path.parent.name) != os.getpid():
                yield int(path.parent.name), command


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def outcome(stream: Stream) -> tuple[str, list[str], str]:
    """What must be the same in every run: text, bits of each token's log-probability, reason of the end."""
    return stream.text, [value.hex() for value in stream.logprobs], stream.finish


async def stream_all(
    url: str, bodies: list[dict[str, Any]], during: Callable[[list[Stream]], Awaitable[None]] | None = None
) -> list[Stream]:
    """All requests side by side; ``during`` is awaited meanwhile (inject a fault there)."""
    records = [Stream(body) for body in bodies]
    async with asyncio.TaskGroup() as group:
        group.create_task(run_streams(url, records, len(records), STREAMS_S))
        if during is not None:
            await during(records)
    return records


async def until_tokens(records: list[Stream], num_tokens: int, within_s: float = 120.0) -> None:
    """Waits until every stream has that many tokens (or has ended): a fault now is a fault in mid-stream."""
    deadline = time.monotonic() + within_s
    while not all(record.num_tokens >= num_tokens or record.is_over for record in records):
        assert time.monotonic() < deadline, f"streams stuck at {[record.num_tokens for record in records]}"
        await asyncio.sleep(0.005)


def varied_bodies(count: int, max_tokens: int, model: str = "tiny-random") -> list[dict[str, Any]]:
    """Greedy and seeded requests in turn, prompts of different lengths given as token ids."""
    bodies: list[dict[str, Any]] = []
    for index in range(count):
        prompt = [(7 * index + 13 * position) % 200 + 5 for position in range(3 + 5 * index % 40)]
        sampling = {"temperature": 0.0} if index % 2 == 0 else {"temperature": 1.0, "seed": 1000 + index}
        bodies.append(
            {"model": model, "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "logprobs": 0, **sampling}
        )
    return bodies
