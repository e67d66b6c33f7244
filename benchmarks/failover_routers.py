"""Routers killed and replaced under load, two on one port: what it costs their clients, and what it costs the others.

A killed router's streams end, and each client asks again at once, as clients of an HTTP API do; it must get the same
answer then, and what it had got before must be the beginning of it. Which streams were whose, their ids tell; the
router lists them just before it dies.
"""

import asyncio
import json
import os
import signal
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.failover_report import gap_around, percentile
from services.cli.fault import FaultClient, fault_event
from services.cli.run_directory import monitor_address

# A router that is replaced ends its streams by itself; on a busy machine they may last longer than by default.
CONFIG = "[router]\ndrain_s = 120.0\n"
_BACK_S, _REST_S = 60.0, 10.0


@dataclass(frozen=True, slots=True)
class RouterFault:
    """``nonce``: what the ids of its requests begin with; ``back_at``: when as many routers served again."""

    action: str
    at: float
    back_at: float
    nonce: str


def run_faults(url: str, run_dir: Path, repeats: int) -> list[RouterFault]:
    """A kill and a replacement in turn. A kill counts when the process is gone from the list, a replacement with the
    monitor's proof."""
    faults = []
    for _ in range(repeats):
        for action in ("kill", "replace"):
            before = _routers(url)
            victim = max(before, key=lambda router: len(_requests(router)))
            nonce = next((id.partition(".")[0] for id in _requests(victim)), "")
            at = time.monotonic()
            if action == "kill":
                os.kill(victim["pid"], signal.SIGKILL)
            else:
                asyncio.run(_replace(run_dir, victim["name"]))
            back_at = _wait_for(url, len(before), without=victim["pid"])
            faults.append(RouterFault(action, at, back_at, nonce))
            print(f"{action} {victim['name']}: as many serve again after {back_at - at:.2f} s", flush=True)
            time.sleep(_REST_S)
    return faults


async def _replace(run_dir: Path, name: str) -> None:
    with FaultClient(monitor_address(run_dir)) as bus:
        answer = await asyncio.to_thread(bus.inject, fault_event("restart", None, name))
    if answer["status"] != "done":
        raise RuntimeError(f"{name} was not replaced: {answer}")


def _get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as response:
        return json.load(response)


def _routers(url: str) -> list[dict[str, Any]]:
    services = _get(f"{url}/cluster")["services"]
    return [entry for entry in services if entry["kind"] == "router" and entry["state"] == "up"]


def _requests(router: dict[str, Any]) -> list[str]:
    return [request["id"] for request in _get(f"{router['endpoint']}/requests")["requests"]]


def _wait_for(url: str, number: int, without: int) -> float:
    deadline = time.monotonic() + _BACK_S
    while time.monotonic() < deadline:
        try:
            pids = [router["pid"] for router in _routers(url)]
        except OSError:
            pids = []
        if len(pids) >= number and without not in pids:
            return time.monotonic()
        time.sleep(0.02)
    raise RuntimeError(f"no {number} routers within {_BACK_S:.0f} s")


def figures(
    records: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]], faults: Sequence[RouterFault]
) -> dict[str, Any]:
    """Of all streams; ``ended`` are those whose router was killed under them."""
    reference = {record["body"]: record for record in expected}
    killed = [fault for fault in faults if fault.action == "kill"]
    ended = [record for record in records if record["error"]]
    whole = [record for record in records if not record["error"]]
    again = [_first_token_again_s(record, records) for record in ended]
    found: dict[str, Any] = {
        "requests": len(records),
        "completed": len(whole),
        "equal_to_fault_free": sum(_is_same(record, reference[record["body"]]) for record in whole),
        "ended_with_their_router": sum(_is_of(record, killed) for record in ended),
        "ended_otherwise": sum(not _is_of(record, killed) for record in ended),
        "of_these_beginning_as_fault_free": sum(_is_begun(record, reference[record["body"]]) for record in ended),
        "of_these_asked_again_and_answered": sum(seconds is not None for seconds in again),
    }
    found |= _quantiles("first_token_of_the_second_ask_s", [seconds for seconds in again if seconds is not None])
    for action, title in (("kill", "kill: gap_s of other routers' streams"), ("replace", "replace: gap_s")):
        chosen = [fault for fault in faults if fault.action == action]
        gaps = [gap_around(record["times"], fault.at) for fault in chosen for record in whole]
        found |= _quantiles(title, [gap for gap in gaps if gap is not None])
        found |= _quantiles(f"{action}_to_all_routers_again_s", [fault.back_at - fault.at for fault in chosen])
    return found


def _is_same(record: dict[str, Any], reference: dict[str, Any]) -> bool:
    return all(record[key] == reference[key] for key in ("text", "logprobs", "finish"))


def _is_begun(record: dict[str, Any], reference: dict[str, Any]) -> bool:
    same_text = reference["text"].startswith(record["text"])
    return bool(same_text and reference["logprobs"][: len(record["logprobs"])] == record["logprobs"])


def _is_of(record: dict[str, Any], killed: Sequence[RouterFault]) -> bool:
    """A stream without an id had not been answered yet: it was in the killed router's port."""
    nonce = record["id"].partition(".")[0]
    return any(nonce in (fault.nonce, "") and record["sent"] < fault.back_at for fault in killed)


def _first_token_again_s(ended: dict[str, Any], records: Sequence[dict[str, Any]]) -> float | None:
    """From the end of a stream to the first token of the answer to the same question, asked anew."""
    later = [r for r in records if r["body"] == ended["body"] and r["sent"] >= ended["ended"] and r["times"]]
    return min((record["times"][0] for record in later), default=0.0) - ended["ended"] if later else None


def _quantiles(name: str, values: Sequence[float]) -> dict[str, float]:
    return {
        f"{name} p50": percentile(values, 0.5),
        f"{name} p99": percentile(values, 0.99),
        f"{name} max": max(values, default=0.0),
    }
