"""Several hosts on one machine: network namespaces behind a bridge, so that a cut link is a cut link.

    this namespace (the client)  .254 --+
    host 1 .1   host 2 .2   ...         +-- bridge in a namespace of its own

Needs root, ``ip`` (iproute2) and ``nft`` (nftables). Deleting the namespaces removes everything: nothing outside them
is changed but one virtual interface, which goes with its other end.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.cluster_key import ClusterKey
from common.ids import make_process_id
from common.monitor_address import MonitorAddress
from common.process_args import ProcessArgs
from services.cli.up import agent_command, agent_environment
from tests.cluster.harness import ROOT

MONITOR_PORT, HTTP_PORT = 7000, 8000
_STOP_S = 30.0
_TABLE = "inet cut"


def why_not() -> str:
    """Why this machine cannot do it; empty when it can."""
    if missing := [tool for tool in ("ip", "nft") if shutil.which(tool) is None]:
        return f"needs {' and '.join(missing)} (apt-get install iproute2 nftables)"
    probe = f"regrow{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, timeout=30)
    subprocess.run(["ip", "netns", "delete", probe], capture_output=True, timeout=30)
    return f"may not make network namespaces: {made.stderr.strip()}" if made.returncode else ""


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"


@dataclass
class Host:
    """One namespace. ``number`` is the last part of its address, ``name`` that of the namespace."""

    number: int
    name: str
    address: str
    agents: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    def run_agent(self, children: Sequence[str], monitor: MonitorAddress, heap_dir: Path, config: Path) -> None:
        """An agent as ``regrow agent`` runs it, with several children; all of them write into one log beside the
        configuration."""
        args = ProcessArgs(
            kind="agent",
            monitor_address=monitor,
            host=self.address,
            name=f"agent-{self.number}",
            process_id=make_process_id(f"agent-{self.number}", os.getpid() << 16 | self.number),
            agent="",
            config=config,
            heap_dir=heap_dir,
            port=HTTP_PORT,
            run_dir=None,
        )
        command = ["ip", "netns", "exec", self.name, *agent_command(args, children)]
        with (config.parent / f"host-{self.number}.log").open("ab") as log:
            agent = subprocess.Popen(command, env=agent_environment(), cwd=ROOT, stdout=log, stderr=log)
        self.agents.append(agent)

    def cut(self, *rules: str) -> None:
        """Drops what matches any rule, as ``input ip saddr 10.0.0.1``, until `heal`."""
        _run("ip", "netns", "exec", self.name, "nft", "add", "table", *_TABLE.split())
        for hook in ("input", "output"):
            chain = f"add chain {_TABLE} {hook} {{ type filter hook {hook} priority 0 ; }}"
            _run("ip", "netns", "exec", self.name, "nft", chain)
        for rule in rules:
            hook, _, match = rule.partition(" ")
            _run("ip", "netns", "exec", self.name, "nft", f"add rule {_TABLE} {hook} {match} counter drop")

    def num_dropped(self) -> int:
        """Packets that the cut has swallowed: the proof that it cuts."""
        command = ["ip", "netns", "exec", self.name, "nft", "list", "table", *_TABLE.split()]
        words = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()
        return sum(int(words[index + 1]) for index, word in enumerate(words) if word == "packets")

    def heal(self) -> None:
        _run("ip", "netns", "exec", self.name, "nft", "delete", "table", *_TABLE.split())

    def set_link(self, state: str) -> None:
        """``up`` or ``down``: the cable itself."""
        _run("ip", "-n", self.name, "link", "set", "eth0", state)


@contextlib.contextmanager
def hosts(number: int) -> Iterator[list[Host]]:
    """So many hosts with addresses 10.231.X.1 and on, X drawn from the pid. Gone afterwards, whatever happens."""
    prefix, subnet = f"regrow{os.getpid()}", f"10.231.{os.getpid() % 250}"
    switch, uplink = f"{prefix}-switch", f"rg{os.getpid()}"
    made: list[Host] = []
    try:
        _run("ip", "netns", "add", switch)
        _run("ip", "-n", switch, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "br0", "up")
        _run("ip", "link", "add", uplink, "type", "veth", "peer", "name", "client", "netns", switch)
        _run("ip", "address", "add", f"{subnet}.254/24", "dev", uplink)
        _run("ip", "link", "set", uplink, "up")
        _run("ip", "-n", switch, "link", "set", "client", "master", "br0", "up")
        for index in range(1, number + 1):
            host = Host(index, f"{prefix}-{index}", f"{subnet}.{index}")
            _run("ip", "netns", "add", host.name)
            made.append(host)
            _run(
                "ip",
                "-n",
                host.name,
                "link",
                "add",
                "eth0",
                "type",
                "veth",
                "peer",
                "name",
                f"p{index}",
                "netns",
                switch,
            )
            _run("ip", "-n", switch, "link", "set", f"p{index}", "master", "br0", "up")
            _run("ip", "-n", host.name, "address", "add", f"{host.address}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                _run("ip", "-n", host.name, "link", "set", link, "up")
        yield made
    finally:
        _stop([agent for host in made for agent in host.agents])
        for name in (*(host.name for host in made), switch):
            _kill_left_over(name)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=30)
        subprocess.run(["ip", "link", "delete", uplink], capture_output=True, timeout=30)


def _stop(agents: Sequence["subprocess.Popen[bytes]"]) -> None:
    """All at once: each ends its children in order."""
    for agent in agents:
        agent.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + _STOP_S
    for agent in agents:
        try:
            agent.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            agent.kill()
            agent.wait()


def _kill_left_over(namespace: str) -> None:
    listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, timeout=30)
    for pid in listed.stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def monitor_of(host: Host, key: ClusterKey) -> MonitorAddress:
    return MonitorAddress(host.address, MONITOR_PORT, key)
