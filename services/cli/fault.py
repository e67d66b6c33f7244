"""``regrow fault``, ``drain``, ``scale``: an event, published until the monitor says how it ended, and its proof."""

import secrets
import time
from collections.abc import Mapping
from typing import Any

import msgspec
import zmq

from common.fault import parse_fault
from common.fault_answers import DEADLINE_S, REPEAT_S, SCALE_DEADLINE_S, final_answer, proof_of
from common.monitor_address import MonitorAddress
from common.transport import secure


def fault_event(action: str, rank: int | None, process: str | None) -> dict[str, object]:
    """A fresh event; raises ValueError (`common.fault.FaultRefused`) on one that the monitor would not take."""
    target: dict[str, object] = {"rank": rank} if rank is not None else {}
    if process is not None:
        target["process"] = process
    return _checked({"action": action, **target})


def scale_event(decode: int | None, prefill: int | None) -> dict[str, object]:
    """Likewise; None leaves that kind as it is."""
    counts = {"decode": decode, "prefill": prefill}
    return _checked({"action": "scale", **{kind: count for kind, count in counts.items() if count is not None}})


def _checked(fields: Mapping[str, object]) -> dict[str, object]:
    event: dict[str, object] = {"type": "fault", "id": f"cli-{secrets.token_hex(8)}", **fields}
    parse_fault(msgspec.msgpack.encode(event))
    return event


class FaultClient:
    """A connection to the bus. The longer it exists before the first fault, the surer that the first message counts."""

    def __init__(self, address: MonitorAddress) -> None:
        self._address = address
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        secure(self._context, address.key)
        self._publisher, self._subscriber = self._context.socket(zmq.PUB), self._context.socket(zmq.SUB)
        self._subscriber.subscribe(b"event")
        self._subscriber.connect(address.subscribe)
        self._publisher.connect(address.publish)

    def __enter__(self) -> "FaultClient":
        return self

    def __exit__(self, *exception: object) -> None:
        self._context.destroy(linger=0)

    def inject(self, event: Mapping[str, object], deadline_s: float = DEADLINE_S) -> dict[str, Any]:
        """Publishes ``event`` over and over: a fresh publisher loses its first messages, and repeats are harmless.

        Returns the acknowledgement with a final status; raises TimeoutError when there is none in time.
        """
        deadline, payload = time.monotonic() + deadline_s, msgspec.msgpack.encode(event)
        while time.monotonic() < deadline:
            self._publisher.send_multipart([b"fault", payload])
            repeat_at = time.monotonic() + REPEAT_S
            while (left_s := repeat_at - time.monotonic()) > 0 and self._subscriber.poll(int(left_s * 1000) + 1):
                answer = final_answer(self._subscriber.recv_multipart()[-1], event["id"])
                if answer is not None:
                    return answer
        hint = "is this its key?" if self._address.key else "if the cluster has a key, name it with --key-file"
        raise TimeoutError(
            f"no acknowledgement from the bus at {self._address.subscribe} within {deadline_s:.0f} s; {hint}"
        )


def fault(address: MonitorAddress, action: str, rank: int | None, process: str | None) -> int:
    """Returns the exit code: 0 only with proof that it took effect."""
    return _inject(address, fault_event(action, rank, process), DEADLINE_S)


def scale(address: MonitorAddress, decode: int | None, prefill: int | None) -> int:
    """Returns when the cluster has that size; the same number again is done at once. Exit code as of `fault`."""
    return _inject(address, scale_event(decode, prefill), SCALE_DEADLINE_S)


def _inject(address: MonitorAddress, event: Mapping[str, object], deadline_s: float) -> int:
    what = f"{event['action']} {parse_fault(msgspec.msgpack.encode(event)).target}"
    with FaultClient(address) as client:
        try:
            answer = client.inject(event, deadline_s)
        except TimeoutError as error:
            print(f"{what}: {error}")
            return 1
    print(f"{what}: {answer['status']}: {proof_of(answer)}")
    return 0 if answer["status"] == "done" else 1
