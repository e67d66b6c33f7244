"""A cluster with a key and an admin token: who has them may do everything, who has not changes nothing."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from common.cluster_key import write_key
from common.monitor_address import MonitorAddress
from services.cli.fault import FaultClient, fault_event
from services.cli.run_directory import monitor_address, read_description
from tests.cluster.harness import ROOT, Cluster, stream_all, varied_bodies
from tests.cluster.steady_load import under_load

TOKEN = "a-token-for-the-tests"
NUM_STREAMS, MAX_TOKENS = 6, 900


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    directory: Path = tmp_path_factory.mktemp("secured")
    token_file = directory / "token"
    token_file.write_text(TOKEN)
    token_file.chmod(0o600)
    options = ("--decode-ranks", "2", "--prefill-workers", "1", "--secure", "--admin-token-file", str(token_file))
    cluster = Cluster(directory / "run", *options)
    try:
        yield cluster.wait_ready()
    finally:
        cluster.stop()


async def post(
    cluster: Cluster, path: str, body: dict[str, Any], token: str | None = TOKEN
) -> tuple[int, dict[str, Any]]:
    headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=100)) as session,
        session.post(f"{cluster.url}{path}", json=body, headers=headers) as response,
    ):
        answer: dict[str, Any] = await response.json()
        return response.status, answer


def serving(status: dict[str, Any]) -> list[int]:
    return [entry["rank"] for entry in status["ranks"] if entry["state"] == "serving"]


async def test_a_stranger_kills_nobody_and_is_seen(secured: Cluster, tmp_path: Path) -> None:
    before = await secured.wait_status(lambda status: serving(status) == [0, 1])
    address = monitor_address(secured.run_dir)
    for key in (None, write_key(tmp_path / "other", b"\3" * 32)):
        with FaultClient(MonitorAddress(address.host, address.port, key)) as stranger:
            for action in ("kill", "mask"):
                with pytest.raises(TimeoutError, match="key"):
                    await asyncio.to_thread(stranger.inject, fault_event(action, 1, None), 1.0)
    after = await secured.fetch_status()
    assert after["strangers_refused"] >= before["strangers_refused"] + 2
    assert [event["door"] for event in after["events"] if event["kind"] == "unauthorised"]
    assert [e["pid"] for e in after["ranks"]] == [e["pid"] for e in before["ranks"]]
    assert (after["epoch"], serving(after)) == (before["epoch"], [0, 1])


async def test_commands_find_the_key_by_the_run_directory_and_streams_go_on(secured: Cluster) -> None:
    expected = await stream_all(secured.url, varied_bodies(NUM_STREAMS, MAX_TOKENS))

    async def kill() -> None:
        assert "done: pid" in await asyncio.to_thread(secured.fault, "kill", rank=1)

    await under_load(secured, expected, kill)
    await secured.wait_status(lambda status: serving(status) == [0, 1])


def test_the_secret_stands_in_its_file_and_nowhere_else(secured: Cluster) -> None:
    key = Path(read_description(secured.run_dir).key_file)
    assert key.stat().st_mode & 0o777 == 0o600
    secret = key.read_text().split()[1]
    written = [path for path in secured.run_dir.rglob("*") if path.is_file() and path != key]
    assert not [path for path in written if secret in path.read_text(errors="replace")]
    assert not [pid for pid in secured.pids() if secret in Path(f"/proc/{pid}/cmdline").read_text()]


@pytest.mark.parametrize("path", ["/admin/scale", "/admin/drain", "/admin/undrain", "/admin/fault"])
async def test_without_the_token_nothing_is_even_read(secured: Cluster, path: str) -> None:
    body = {"decode": 1, "rank": 0, "action": "kill"}
    for token in (None, "", "a-token-for-the-test", TOKEN + "x"):
        status, answer = await post(secured, path, body, token)
        assert status == 401 and "Authorization: Bearer" in answer["error"]["message"]


async def test_drain_and_scale_over_http_are_proven_idempotent_and_observable(secured: Cluster) -> None:
    expected = await stream_all(secured.url, varied_bodies(NUM_STREAMS, MAX_TOKENS))

    async def change() -> None:
        status, answer = await post(secured, "/admin/scale", {"decode": 3, "id": "grow"})
        assert (status, answer["status"]) == (200, "done"), answer
        assert serving(await secured.fetch_status()) == [0, 1, 2]
        epoch = (await secured.fetch_status())["epoch"]
        again = await post(secured, "/admin/scale", {"decode": 3, "id": "grow"})
        assert again[0] == 200 and again[1]["seq"] == answer["seq"], "the same id is the same event"
        fresh = await post(secured, "/admin/scale", {"decode": 3})
        assert fresh[0] == 200 and (await secured.fetch_status())["epoch"] == epoch, "the same size changes nothing"
        status, answer = await post(secured, "/admin/drain", {"rank": 2})
        assert (status, answer["status"]) == (200, "done") and "drained" in answer["proof"]
        status, answer = await post(secured, "/admin/undrain", {"rank": 2})
        assert (status, answer["status"]) == (200, "done")

    await under_load(secured, expected, change)
    state = await secured.fetch_status()
    assert state["desired_ranks"] == 3
    targets = [event["target"] for event in state["events"] if event["kind"] == "fault" and event["status"] == "done"]
    assert {"decode 3", "rank 2"} <= set(targets)
    assert (await post(secured, "/admin/scale", {"decode": 2}))[0] == 200


@pytest.mark.parametrize(
    ("path", "body", "code", "text"),
    [
        ("/admin/scale", {"decode": 0}, 400, "decode must be a whole number"),
        ("/admin/scale", {}, 400, "needs decode or prefill"),
        ("/admin/scale", {"decode": 3, "at": 1}, 400, "unknown key"),
        ("/admin/drain", {"process": "decode-0"}, 400, "needs a rank"),
        ("/admin/fault", {"action": "explode", "rank": 0}, 400, "unknown action"),
        ("/admin/drain", {"rank": 7}, 409, "no process"),
        ("/admin/scale", {"decode": 60}, 409, "max_ranks"),
    ],
)
async def test_what_cannot_be_done_says_why(
    secured: Cluster, path: str, body: dict[str, Any], code: int, text: str
) -> None:
    status, answer = await post(secured, path, body)
    assert status == code
    assert text in (answer["error"] if code == 409 else answer["error"]["message"])


def test_a_process_of_the_cluster_without_its_key_ends_with_one_line(secured: Cluster) -> None:
    address = monitor_address(secured.run_dir)
    command = [sys.executable, "-m", "services.planner", "--monitor-address", str(address), "--host", "127.0.0.1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    line = f"the monitor at {address} asks for a key: give all processes the same --key-file"
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == f"regrow planner: error: {line}"


def test_a_bad_key_file_stops_the_start_with_one_line(tmp_path: Path) -> None:
    key = write_key(tmp_path / "key", os.urandom(32))
    key.path.chmod(0o644)
    command = [sys.executable, "-m", "services.cli", "up", "--run-dir", str(tmp_path / "run")]
    done = subprocess.run([*command, "--key-file", str(key.path)], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"key file {key.path} is open to other users (mode 644): chmod 600 {key.path}" in done.stderr


def test_keys_new_makes_a_file_that_works_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "services.cli", "keys", "new", str(tmp_path / "key")]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (first.returncode, again.returncode) == (0, 2)
    assert "File exists" in again.stderr
