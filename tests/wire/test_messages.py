"""Every message survives the wire; what is no message is refused with a reason; old peers are understood."""

import typing

import msgpack
import msgspec
import pytest

from common import messages
from common.config import ClusterConfig
from common.ids import Epoch, Incarnation, ProcessId, Rank, RequestId
from common.messages import MalformedMessage, decode, encode

_MEMBER = messages.Member(Rank(2), Incarnation(1030), ProcessId("decode-2-ab"), "host", "tcp://host:1", "/heap")
_VIEW = messages.View(
    ProcessId("monitor-1"), 1024, Epoch(1031), (_MEMBER,), messages.Placement(1029, (((0, 1), (1, -1)),)), "join"
)
_SAMPLING = messages.Sampling(0.7, 0.9, 40, 2**64 - 1, 16, stop_token_ids=(2,))
_EXAMPLES: dict[object, object] = {
    ProcessId: ProcessId("decode-1-cd"),
    RequestId: RequestId("00ff.7"),
    messages.View: _VIEW,
    messages.View | None: _VIEW,
    messages.Directory: messages.Directory(
        ProcessId("m"), 1024, 3, (messages.Worker(ProcessId("p"), "prefill", "prefill-0", "h", 12, "tcp://h:2"),)
    ),
    ClusterConfig: ClusterConfig(),
    messages.Sampling: _SAMPLING,
    str: "text",
    int: 41,
    float: 0.1,
    bool: True,
}


def _example(kind: object) -> object:
    """A value of the annotated type; the wire must bring back one that is equal."""
    if kind in _EXAMPLES:
        return _EXAMPLES[kind]
    supertype = getattr(kind, "__supertype__", None)
    if supertype is not None:
        return _example(supertype)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        items = arguments[:1] if arguments[-1] is Ellipsis else arguments
        return tuple(_example(item) for item in items)
    if origin is dict:
        return {"running": 3}
    assert isinstance(kind, type) and issubclass(kind, msgspec.Struct), f"no example for {kind}"
    return _build(kind)


def _build(kind: type[msgspec.Struct]) -> msgspec.Struct:
    hints = typing.get_type_hints(kind)
    return kind(**{name: _example(hints[name]) for name in kind.__struct_fields__})


ALL_MESSAGES = typing.get_args(messages.Message)


@pytest.mark.parametrize("kind", ALL_MESSAGES, ids=lambda kind: str(kind.__name__))
def test_every_message_survives_the_wire(kind: type[msgspec.Struct]) -> None:
    message = _build(kind)
    assert decode(encode(message)) == message  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ALL_MESSAGES, ids=lambda kind: str(kind.__name__))
def test_a_message_is_a_plain_msgpack_array_that_begins_with_its_tag(kind: type[msgspec.Struct]) -> None:
    array = msgpack.unpackb(encode(_build(kind)))  # type: ignore[arg-type]
    assert array[0] == kind.__name__.lower()
    assert len(array) == 1 + len(kind.__struct_fields__)


def test_tags_are_unique() -> None:
    assert len({kind.__name__.lower() for kind in ALL_MESSAGES}) == len(ALL_MESSAGES)


def test_an_older_peer_that_leaves_out_the_last_fields_is_understood() -> None:
    old = msgpack.packb(["heartbeat", "decode-1-cd", 1, 1030])
    assert decode(old) == messages.Heartbeat(ProcessId("decode-1-cd"), Rank(1), Incarnation(1030))


def test_a_newer_peer_that_appends_fields_is_understood() -> None:
    new = msgpack.packb([*msgpack.unpackb(encode(messages.Wake(Epoch(7)))), "field of tomorrow"])
    assert decode(new) == messages.Wake(Epoch(7))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        msgpack.packb({"type": "wake"}),
        msgpack.packb(["no such tag", 1]),
        msgpack.packb(["wake", "seven"]),
        msgpack.packb(["have", "id", 1]),
        encode(messages.Wake(Epoch(7)))[:-1],
    ],
)
def test_what_is_no_message_is_refused_with_a_reason(data: bytes) -> None:
    with pytest.raises(MalformedMessage, match=r"."):
        decode(data)
