"""``regrow fault``, ``drain``, ``scale``: an event, published until the monitor says how it ended, and its proof."""

import secrets
import time
from collections.abc import Mapping
from typing import Any

import msgspec
import zmq

from common.fault import parse_fault
from common.fault_answers import ACCEPT_S, REPEAT_S, FaultAnswers, proof_of
from common.monitor_address import MonitorAddress
from common.transport import secure


def fault_event(action: str, rank: int | None, process: str | None, **options: object) -> dict[str, object]:
    """A fresh event; raises ValueError (`common.fault.FaultRefused`) on one that the monitor would not take.

    ``options`` are those of `common.fault.Fault`; None leaves one out.
    """
    given = {"rank": rank, "process": process, **options}
    return _checked({"action": action, **{key: value for key, value in given.items() if value is not None}})


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

    def inject(self, event: Mapping[str, object], accept_s: float = ACCEPT_S) -> dict[str, Any]:
        """Publishes ``event`` over and over: a fresh publisher loses its first messages, and repeats are harmless.

        Returns the acknowledgement with a final status. Raises TimeoutError when nobody accepts it within ``accept_s``,
        or when the monitor that did says no more in the time that it named.
        """
        start, payload = time.monotonic(), msgspec.msgpack.encode(event)
        answers = FaultAnswers(event["id"], start, accept_s)
        while time.monotonic() < answers.deadline:
            self._publisher.send_multipart([b"fault", payload])
            repeat_at = time.monotonic() + REPEAT_S
            while (left_s := repeat_at - time.monotonic()) > 0 and self._subscriber.poll(int(left_s * 1000) + 1):
                answer = answers.on_event(self._subscriber.recv_multipart()[-1], time.monotonic())
                if answer is not None:
                    return answer
        seconds, bus = time.monotonic() - start, self._address.subscribe
        if answers.last:
            raise TimeoutError(f"no more than {answers.last!r} from the bus at {bus} within {seconds:.0f} s")
        hint = "is this its key?" if self._address.key else "if the cluster has a key, name it with --key-file"
        raise TimeoutError(f"no acknowledgement from the bus at {bus} within {seconds:.0f} s; {hint}")


def fault(address: MonitorAddress, action: str, rank: int | None, process: str | None, **options: object) -> int:
    """Returns the exit code: 0 only with proof that it took effect."""
    return _inject(address, fault_event(action, rank, process, **options))


def scale(address: MonitorAddress, decode: int | None, prefill: int | None) -> int:
    """Returns when the cluster has that size; the same number again is done at once. Exit code as of `fault`."""
    return _inject(address, scale_event(decode, prefill))


def _inject(address: MonitorAddress, event: Mapping[str, object]) -> int:
    what = f"{event['action']} {parse_fault(msgspec.msgpack.encode(event)).target}"
    with FaultClient(address) as client:
        try:
            answer = client.inject(event)
        except TimeoutError as error:
            print(f"{what}: {error}")
            return 1
    at_round = f" (in round {answer['round']})" if event.get("at_round") and "round" in answer else ""
    print(f"{what}: {answer['status']}: {proof_of(answer)}{at_round}")
    return 0 if answer["status"] == "done" else 1
