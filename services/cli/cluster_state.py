"""``regrow status`` and ``regrow events``: what the cluster says of itself."""

import json
import time
import urllib.error
import urllib.request
from typing import Any

import msgspec
import zmq
from rich import box
from rich.console import Console
from rich.table import Table

from common.monitor_address import MonitorAddress
from common.service_runner import OperatorError
from common.transport import secure

_HTTP_S = 10.0
_RANK_COLUMNS = ("rank", "state", "incarnation", "pid", "host", "running", "waiting", "kv_used", "rounds")
_STYLES = {"serving": "green", "up": "green", "joining": "yellow", "draining": "yellow", "masked": "magenta"}


def fetch_cluster(url: str) -> dict[str, Any]:
    """``GET /cluster``; raises OperatorError when nobody answers."""
    try:
        with urllib.request.urlopen(f"{url}/cluster", timeout=_HTTP_S) as response:
            body: dict[str, Any] = json.load(response)
            return body
    except (urllib.error.URLError, TimeoutError, ValueError) as error:
        raise OperatorError(f"GET {url}/cluster: {getattr(error, 'reason', error)}") from None


def show_status(url: str, as_json: bool) -> int:
    cluster = fetch_cluster(url)
    if as_json:
        print(json.dumps(cluster, indent=2))
        return 0
    console = Console()
    placement = cluster.get("placement") or {}
    balancedness = placement.get("balancedness")
    console.print(
        f"{url}  epoch {cluster.get('epoch')}  placement {placement.get('version')}"
        + (f"  balancedness {balancedness:.3f}" if isinstance(balancedness, int | float) else "")
    )
    console.print(_table(cluster.get("ranks", ()), _RANK_COLUMNS))
    processes = [*cluster.get("prefill", ()), *cluster.get("services", ())]
    console.print(_table(processes, ("name", "state", "pid")))
    return 0


def _table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> Table:
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)  # nine columns in eighty characters
    for column in columns:
        is_text = column in ("state", "host", "name")
        table.add_column(column.replace("_", " "), justify="left" if is_text else "right", no_wrap=True)
    for row in rows:
        cells = {column: str(row.get(column, "")) for column in columns}
        cells["state"] = f"[{_STYLES.get(cells['state'], 'red')}]{cells['state']}[/]"
        table.add_row(*cells.values())
    return table


def show_events(url: str) -> int:
    """The last events, oldest first."""
    for event in fetch_cluster(url).get("events", ()):
        print(event_line(event))
    return 0


def follow_events(address: MonitorAddress) -> int:
    """Every event from now on, until interrupted."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    secure(context, address.key)
    with context, context.socket(zmq.SUB) as subscriber:
        subscriber.linger = 0
        subscriber.subscribe(b"event")
        subscriber.connect(address.subscribe)
        try:
            while True:
                try:
                    event = msgspec.msgpack.decode(subscriber.recv_multipart()[-1])
                except msgspec.DecodeError:
                    continue
                if isinstance(event, dict):
                    print(event_line(event), flush=True)
        except KeyboardInterrupt:
            return 0


def event_line(event: dict[str, Any]) -> str:
    """``12:00:01.250 removed rank=2 reason='signal KILL'``"""
    seconds = float(event.get("time", 0.0))
    clock = f"{time.strftime('%H:%M:%S', time.localtime(seconds))}.{int(seconds * 1000) % 1000:03d}"
    details = [f"{key}={value!r}" for key, value in event.items() if key not in ("type", "seq", "time", "kind")]
    return " ".join([clock, str(event.get("kind", "")), *details])
