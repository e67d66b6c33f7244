"""Hosts with networks of their own and a key for the cluster: links are cut for real, one way or both.

    host 1: monitor, planner, router      host 2: decode, prefill      hosts 3 and 4: decode

The ranks' heaps lie in one tmpfs, as containers of one machine have them: a cut rank goes on making rounds with the
others, and it is the monitor that must do without it.
"""

import asyncio
import json
import os
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from common.cluster_key import write_key
from services.cli.chat_client import Stream
from tests.cluster.fault_runs import Row, record, until
from tests.cluster.harness import TINY_RANDOM, stream_all, varied_bodies
from tests.cluster.namespaces import HTTP_PORT, MONITOR_PORT, Host, hosts, monitor_of, why_not
from tests.cluster.steady_load import under_load
from tests.own_directory import own_directory_prefix

pytestmark = [pytest.mark.root, pytest.mark.timeout(240)]
NUM_STREAMS, MAX_TOKENS = 9, 900
PORTS = f"{MONITOR_PORT}-{MONITOR_PORT + 3}"


@dataclass(frozen=True)
class Several:
    """A cluster over hosts. ``cut_off`` is the one whose link the tests cut: a decode rank and its agent, no more."""

    hosts: list[Host]
    logs: Path
    expected: list[Stream]

    @property
    def url(self) -> str:
        return f"http://{self.hosts[0].address}:{HTTP_PORT}"

    @property
    def cut_off(self) -> Host:
        return self.hosts[-1]

    async def status(self) -> dict[str, Any]:
        deadline = aiohttp.ClientTimeout(total=10)
        async with aiohttp.ClientSession(timeout=deadline) as session, session.get(f"{self.url}/cluster") as response:
            body: dict[str, Any] = await response.json()
            return body

    async def wait_status(self, what: Callable[[dict[str, Any]], bool], within_s: float = 60.0) -> dict[str, Any]:
        status: dict[str, Any] = {}
        try:
            async with asyncio.timeout(within_s):
                while True:
                    try:
                        status = await self.status()
                    except aiohttp.ClientError:
                        status = {}
                    if status and what(status):
                        return status
                    await asyncio.sleep(0.05)
        except TimeoutError:
            logs = "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in sorted(self.logs.glob("*.log")))
            raise AssertionError(f"not within {within_s} s: {json.dumps(status)[:4000]}\n{logs}") from None


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Several]:
    if reason := why_not():
        pytest.skip(reason)
    directory: Path = tmp_path_factory.mktemp("hosts")
    config, key = directory / "cluster.toml", write_key(directory / "key", os.urandom(32))
    config.write_text(f'[model]\npath = "{TINY_RANDOM}"\n[decode]\nnum_ranks = 3\n')
    heaps = Path(tempfile.mkdtemp(prefix=own_directory_prefix(os.getpid()), dir="/dev/shm"))
    try:
        with hosts(4) as made:
            monitor = monitor_of(made[0], key)
            children = (["monitor", "planner", "router-0"], ["decode-0", "prefill-0"], ["decode-1"], ["decode-2"])
            for host, names in zip(made, children, strict=True):
                host.run_agent(names, monitor, heaps, config)
            cluster = Several(made, directory, [])
            asyncio.run(cluster.wait_status(lambda status: len(serving(status)) == 3 and len(status["prefill"]) == 1))
            expected = asyncio.run(stream_all(cluster.url, varied_bodies(NUM_STREAMS, MAX_TOKENS)))
            assert all(stream.finish == "length" for stream in expected), [stream.error for stream in expected]
            cluster.expected.extend(expected)
            yield cluster
    finally:
        shutil.rmtree(heaps)


def serving(status: dict[str, Any]) -> list[int]:
    return [entry["rank"] for entry in status["ranks"] if entry["state"] == "serving"]


def rank_on(host: Host, status: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(entry for entry in status["ranks"] if entry["host"] == host.address)
    return found


def removed_since(status: dict[str, Any], seq: int) -> list[int]:
    return [event["rank"] for event in status["events"] if event["kind"] == "removed" and event["seq"] > seq]


async def nothing() -> None:
    """Streams begin and go on, that is all."""


async def measured(several: Several, name: str, act: Callable[[], Awaitable[str]]) -> None:
    """``act`` returns the proof that links were cut."""
    proof, load = await under_load(several, several.expected, act)
    record(Row(name, proof, load.largest_gap_s, load.num_in_course, len(load.streams)))


async def cut_and_heal(several: Several, name: str, cut: Callable[[], None], heal: Callable[[], str]) -> None:
    """Under streams: the rank on the cut host is removed, nobody else; when the link is whole again it comes back."""
    before = await several.wait_status(lambda status: len(serving(status)) == 3)
    seq, victim = before["events"][-1]["seq"], rank_on(several.cut_off, before)

    async def act() -> str:
        cut()
        removed = await several.wait_status(lambda status: victim["rank"] not in serving(status))
        assert removed_since(removed, seq) == [victim["rank"]]
        evidence = [e["evidence"] for e in removed["events"] if e["kind"] == "removed" and e["seq"] > seq]
        return f"{heal()}; {evidence[-1]}"

    await measured(several, name, act)
    after = await several.wait_status(lambda status: len(serving(status)) == 3)
    assert removed_since(after, seq) == [victim["rank"]], "somebody else was removed too"
    again = rank_on(several.cut_off, after)
    assert again["incarnation"] > victim["incarnation"]


async def test_a_cable_that_is_pulled_and_plugged_in_again(several: Several) -> None:
    host = several.cut_off

    def plug_in() -> str:
        host.set_link("up")
        return "link down, then up"

    await cut_and_heal(several, "the cable of a rank's host is pulled", lambda: host.set_link("down"), plug_in)


def _healed(host: Host) -> Callable[[], str]:
    def heal() -> str:
        num_dropped = host.num_dropped()
        assert num_dropped > 0, "the cut cut nothing"
        host.heal()
        return f"{num_dropped} packets dropped"

    return heal


@pytest.mark.long
@pytest.mark.parametrize("direction", ["both ways", "towards it", "away from it"])
async def test_a_rank_cut_off_from_the_monitor_alone(several: Several, direction: str) -> None:
    """Router and peers still reach it, so only the monitor's silence tells."""
    host, monitor = several.cut_off, several.hosts[0].address
    rules = {
        "towards it": [f"input ip saddr {monitor} tcp sport {PORTS}"],
        "away from it": [f"output ip daddr {monitor} tcp dport {PORTS}"],
    }
    rules["both ways"] = [rule for one_way in list(rules.values()) for rule in one_way]
    name = f"a rank cut off from the monitor alone, {direction}"
    await cut_and_heal(several, name, lambda: host.cut(*rules[direction]), _healed(host))


@pytest.mark.long
@pytest.mark.parametrize("direction", ["towards it", "away from it"])
async def test_a_link_that_carries_one_way_only(several: Several, direction: str) -> None:
    host = several.cut_off
    subnet = f"{host.address.rpartition('.')[0]}.0/24"
    rule = f"input ip saddr {subnet}" if direction == "towards it" else f"output ip daddr {subnet}"
    name = f"a link that drops what goes {direction}"
    await cut_and_heal(several, name, lambda: host.cut(rule), _healed(host))


@pytest.mark.long
async def test_a_rank_cut_off_from_its_peers_alone_is_removed_by_nobody(several: Several) -> None:
    """Rounds go through memory; what is lost are wake-ups and the KV that prefill sends."""
    host, peers = several.cut_off, [peer.address for peer in several.hosts[1:-1]]
    before = await several.wait_status(lambda status: len(serving(status)) == 3)
    seq = before["events"][-1]["seq"]

    async def act() -> str:
        host.cut(*(f"{hook} {peer}" for peer in peers for hook in ("input ip saddr", "output ip daddr")))
        await until(lambda: host.num_dropped() > 0, "packets are dropped")
        return f"{host.num_dropped()} packets dropped"

    await measured(several, "a rank cut off from its peers, words of the data path excepted", act)
    # With the link still cut: new requests find their way past the rank that gets no KV, or wait for no longer than
    # the router's patience with it.
    await under_load(several, several.expected, nothing, [rank_on(host, before)["rank"]])
    host.heal()
    after = await several.status()
    assert removed_since(after, seq) == [] and after["epoch"] == before["epoch"]
    await under_load(several, several.expected, nothing)


@pytest.mark.long
async def test_a_monitor_cut_off_from_everybody_changes_nothing(several: Several) -> None:
    """No heartbeat arrives for longer than any deadline: who is silent together is not dead together. The streams go on
    without a monitor, and afterwards every rank is where it was."""
    host = several.hosts[0]
    before = await several.wait_status(lambda status: len(serving(status)) == 3)
    seq = before["events"][-1]["seq"]
    rules = [
        f"input tcp dport {PORTS} ip saddr != {host.address}",
        f"output tcp sport {PORTS} ip daddr != {host.address}",
    ]

    async def act() -> str:
        host.cut(*rules)
        await asyncio.sleep(8.0)  # what is waited for is that nothing happens
        return _healed(host)()

    await measured(several, "the monitor cut off from everybody for 8 s", act)
    after = await several.wait_status(lambda status: len(serving(status)) == 3)
    told = [f"{e['kind']}: {e.get('evidence', e.get('reason'))}" for e in after["events"] if e["seq"] > seq]
    assert removed_since(after, seq) == [], "\n".join(told)
    assert [entry["incarnation"] for entry in after["ranks"]] == [entry["incarnation"] for entry in before["ranks"]]
