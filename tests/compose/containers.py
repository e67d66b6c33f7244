"""A cluster in containers: the project's compose file under a name and ports of its own."""

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

ROOT = Path(__file__).resolve().parent.parent.parent


def compose_command() -> list[str] | None:
    """``docker compose`` or its older form ``docker-compose``; None where there is no Docker engine."""
    if shutil.which("docker") is None or subprocess.run(["docker", "info"], capture_output=True).returncode != 0:
        return None
    if subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0:
        return ["docker", "compose"]
    return ["docker-compose"] if shutil.which("docker-compose") else None


def free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for listener in sockets:
        listener.bind(("127.0.0.1", 0))
    ports = [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports


@dataclass(frozen=True, slots=True)
class Containers:
    """``http_port`` serves the API; events are published to ``publish_port``."""

    command: list[str]
    project: str
    http_port: int
    publish_port: int
    subscribe_port: int

    @classmethod
    def named(cls, command: list[str], project: str) -> "Containers":
        return cls(command, project, *free_ports(3))

    def compose(self, *arguments: str, timeout_s: float) -> str:
        """Runs the compose command; what it printed. Raises with its last lines when it fails."""
        environment = os.environ | {
            "REGROW_PORT": str(self.http_port),
            "REGROW_PUBLISH_PORT": str(self.publish_port),
            "REGROW_SUBSCRIBE_PORT": str(self.subscribe_port),
        }
        line = [*self.command, "-p", self.project, *arguments]
        done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s)
        if done.returncode != 0:
            raise AssertionError(f"{' '.join(line)} exited with {done.returncode}:\n{done.stderr[-4000:]}")
        return done.stdout

    def get(self, path: str) -> Any:
        with urlopen(f"http://127.0.0.1:{self.http_port}{path}", timeout=10) as reply:
            return json.load(reply)

    def post(self, path: str, body: dict[str, Any], timeout_s: float = 120.0) -> Any:
        """With curl, as a user would."""
        url = f"http://127.0.0.1:{self.http_port}{path}"
        header = "content-type: application/json"
        line = ["curl", "-sS", "--fail-with-body", "-m", str(timeout_s), url, "-H", header, "-d", json.dumps(body)]
        done = subprocess.run(line, capture_output=True, text=True, timeout=timeout_s + 10)
        assert done.returncode == 0, f"curl exited with {done.returncode}: {done.stdout} {done.stderr}"
        return json.loads(done.stdout)

    def stream(self, path: str, body: dict[str, Any], on_event: Callable[[int], None]) -> str:
        """The text of a streamed completion; ``on_event`` hears the number of each chunk as it comes."""
        url = f"http://127.0.0.1:{self.http_port}{path}"
        request = Request(url, json.dumps(body | {"stream": True}).encode(), {"content-type": "application/json"})
        pieces: list[str] = []
        with urlopen(request, timeout=120) as reply:
            for line in reply:
                payload = line.decode().strip().removeprefix("data: ")
                if payload and payload != "[DONE]":
                    pieces.append(json.loads(payload)["choices"][0]["text"])
                    on_event(len(pieces))
        return "".join(pieces)

    def rank_states(self) -> dict[int, str]:
        return {rank["rank"]: rank["state"] for rank in self.get("/cluster")["ranks"]}

    def wait_for(self, what: str, is_so: Callable[[], bool], timeout_s: float = 120.0) -> None:
        """Asks again until ``is_so``; a cluster that does not answer yet counts as no."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                if is_so():
                    return
            except (URLError, ConnectionError, TimeoutError):
                pass
            if time.monotonic() > deadline:
                logs = self.compose("logs", "--no-color", "--tail", "20", timeout_s=60)
                raise AssertionError(f"{what}: not within {timeout_s:.0f} s\n{logs[-6000:]}")
            time.sleep(0.2)

    def remains(self) -> str:
        """Containers, volumes and networks that still carry the project's label."""
        label = f"label=com.docker.compose.project={self.project}"
        listings = (["ps", "-aq"], ["volume", "ls", "-q"], ["network", "ls", "-q"])
        return "".join(
            subprocess.run(["docker", *listing, "--filter", label], capture_output=True, text=True, check=True).stdout
            for listing in listings
        )
