"""``regrow placement export | import``: the map of experts of a running cluster, to a file and back into a cluster."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from secrets import token_hex

import zmq

from common.config import load_config
from common.ids import ProcessId
from common.messages import AskView, ExpertLoad, MalformedMessage, Message, PlacementPlan, Refusal, View, decode, encode
from common.model.config import load_model_config
from common.monitor_address import MonitorAddress
from common.placement import PhysicalToLogical, num_staging_experts
from common.placement_file import Loads, PlacementFile, parse_placement_file
from common.placement_steps import next_step
from common.service_runner import OperatorError
from common.transport import secure
from common.view import ranks
from services.cli.run_directory import monitor_address

_ANSWER_S = 5.0
_AGAIN_S = 0.5


class MonitorTalk:
    """Questions to the monitor from somebody who is no part of the cluster."""

    def __init__(self, address: MonitorAddress) -> None:
        self._address = address
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        secure(self._context, address.key)
        self._me = ProcessId(f"cli-{token_hex(8)}")
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, self._me.encode())
        self._socket.connect(address.control)

    def close(self) -> None:
        self._context.destroy(linger=0)

    def send(self, message: Message) -> None:
        self._socket.send(encode(message))

    def plan(self, view: View, wanted: PhysicalToLogical) -> PlacementPlan:
        return PlacementPlan(self._me, view.placement.version, wanted)

    def receive(self, timeout_s: float) -> Message | None:
        if not self._socket.poll(int(timeout_s * 1000)):
            return None
        with contextlib.suppress(MalformedMessage):
            return decode(self._socket.recv_multipart()[-1])
        return None

    def refusal(self, within_s: float) -> str:
        """What the monitor says against the last plan; waits all the time, in which the experts may move."""
        reason, until = "", time.monotonic() + within_s
        while (left_s := until - time.monotonic()) > 0:
            if isinstance(message := self.receive(left_s), Refusal):
                reason = message.reason
        return reason

    def view(self) -> View:
        """The one in force. Raises OperatorError when there is none, or nobody answers."""
        deadline = time.monotonic() + _ANSWER_S
        while time.monotonic() < deadline:
            self.send(AskView(self._me))
            repeat_at = time.monotonic() + _AGAIN_S
            while (left_s := repeat_at - time.monotonic()) > 0:
                if isinstance(message := self.receive(left_s), View):
                    return message
        raise OperatorError(f"no view from the monitor at {self._address} within {_ANSWER_S:.0f} s")

    def loads(self, seconds: float) -> Loads | None:
        """Sum of what the ranks report in that time."""
        total: list[list[float]] | None = None
        with self._context.socket(zmq.SUB) as subscriber:
            subscriber.subscribe(b"load")
            subscriber.connect(self._address.subscribe)
            deadline = time.monotonic() + seconds
            while (left_s := deadline - time.monotonic()) > 0:
                if not subscriber.poll(int(left_s * 1000) + 1):
                    continue
                with contextlib.suppress(MalformedMessage):
                    report = decode(subscriber.recv_multipart()[-1])
                    if isinstance(report, ExpertLoad):
                        total = _added(total, report.tokens)
        return None if total is None else tuple(tuple(layer) for layer in total)


def _added(total: list[list[float]] | None, tokens: tuple[tuple[int, ...], ...]) -> list[list[float]]:
    if total is None:
        return [[float(count) for count in layer] for layer in tokens]
    return [[a + b for a, b in zip(had, more, strict=True)] for had, more in zip(total, tokens, strict=True)]


@contextlib.contextmanager
def _talk(run_dir: Path) -> Iterator[MonitorTalk]:
    talk = MonitorTalk(monitor_address(run_dir))
    try:
        yield talk
    finally:
        talk.close()


def export_placement(run_dir: Path, file: Path, loads_s: float) -> int:
    config = load_config(run_dir.resolve() / "config.toml")
    with _talk(run_dir) as talk:
        view = talk.view()
        loads = talk.loads(loads_s) if loads_s > 0 else None
    placement = view.placement
    name = config.model.name or Path(config.model.path).name
    try:
        file.write_text(PlacementFile(placement.physical_to_logical, loads, name, placement.version).to_text())
    except OSError as error:
        raise OperatorError(f"cannot write {file}: {error.strerror}") from None
    print(f"placement {placement.version} of {len(ranks(view))} ranks written to {file}")
    return 0


def import_placement(run_dir: Path, file: Path, deadline_s: float) -> int:
    """Moves the experts of the running cluster until they lie as in ``file``; 1 when that is not reached in time."""
    wanted = read_placement_file(file).physical_to_logical
    if wanted is None:
        raise OperatorError(f"{file} holds loads only; start with it: regrow up --init-placement {file}")
    config = load_config(run_dir.resolve() / "config.toml")
    num_experts = load_model_config(Path(config.model.path)).n_routed_experts
    num_staging = num_staging_experts(config.decode, num_experts)
    deadline, refusal = time.monotonic() + deadline_s, ""
    with _talk(run_dir) as talk:
        while time.monotonic() < deadline:
            view = talk.view()
            present = view.placement.physical_to_logical
            if [[len(row) for row in rows] for rows in wanted] != [[len(row) for row in rows] for rows in present]:
                raise OperatorError(f"{file} is of another model, decode.max_ranks or number of redundant experts")
            step = next_step(present, wanted, ranks(view), num_staging)
            if step is None:
                layers = zip(present, wanted, strict=True)
                reached = all(rows[rank] == want[rank] for rows, want in layers for rank in ranks(view))
                print(f"done: placement {view.placement.version} is in force" if reached else "failed: no way there")
                return 0 if reached else 1
            talk.send(talk.plan(view, step))
            refusal = talk.refusal(_AGAIN_S)
    print(f"failed: not in force within {deadline_s:.0f} s{refusal and f': {refusal}'}")
    return 1


def read_placement_file(file: Path) -> PlacementFile:
    """Raises OperatorError of one line."""
    try:
        return parse_placement_file(file.read_text())
    except OSError as error:
        raise OperatorError(f"cannot read {file}: {error.strerror}") from None
    except ValueError as error:
        raise OperatorError(f"{file}: {error}") from None
