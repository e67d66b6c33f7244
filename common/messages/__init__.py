"""Every message that crosses a socket, and nothing else. Wire format: MessagePack array ``[tag, *fields]``.

Fields are only ever appended, with defaults, so that neighbours of different versions understand each other. Big
buffers (KV) travel as extra frames behind the message, never inside it. What outsiders may publish (topic ``fault``)
is a plain map: see `common.fault`.

Who sends what:

    process -> monitor   Hello Heartbeat VoidReport RollAnswer SlotLeft AskView AskStatus SignalDone Exited
                         PlacementPlan Injected
    monitor -> process   Welcome Refusal HeartbeatReply Prepare View RollCall Directory Status Signal SetChildren
                         StagePlacement Inject
    router  -> prefill   Prefill Abort AskPrefill          prefill -> router   PrefillDone PrefillQueued Refused Unknown
    router  -> decode    Announce Have Abort Release       decode  -> router   TokenBatch Unknown Refused
    prefill -> decode    KvPart KvHandoff (+ KV frames)    decode  -> decode   Wake View
    bus                  topics ``view`` (View, Directory), ``load`` (ExpertLoad), ``plan`` (PlacementPlan),
                         ``event`` and ``fault`` (plain maps)
"""

from typing import Any

import msgspec

from common.messages.group import (
    Member,
    Placement,
    Prepare,
    RollAnswer,
    RollCall,
    SlotLeft,
    StagePlacement,
    View,
    VoidReport,
    Wake,
)
from common.messages.planning import ExpertLoad, PlacementPlan
from common.messages.prefill import AskPrefill, KvHandoff, KvPart, Prefill, PrefillDone, PrefillQueued
from common.messages.processes import (
    AskStatus,
    AskView,
    Directory,
    Heartbeat,
    HeartbeatReply,
    Hello,
    Refusal,
    Status,
    Welcome,
    Worker,
)
from common.messages.requests import (
    Abort,
    Announce,
    Have,
    Refused,
    Release,
    Sampling,
    TokenBatch,
    Tokens,
    TopLogprobs,
    Unknown,
)
from common.messages.supervision import Exited, Inject, Injected, SetChildren, Signal, SignalDone

__all__ = [
    "Abort",
    "Announce",
    "AskPrefill",
    "AskStatus",
    "AskView",
    "Directory",
    "Exited",
    "ExpertLoad",
    "Have",
    "Heartbeat",
    "HeartbeatReply",
    "Hello",
    "Inject",
    "Injected",
    "KvHandoff",
    "KvPart",
    "MalformedMessage",
    "Member",
    "Message",
    "Placement",
    "PlacementPlan",
    "Prefill",
    "PrefillDone",
    "PrefillQueued",
    "Prepare",
    "Refusal",
    "Refused",
    "Release",
    "RollAnswer",
    "RollCall",
    "Sampling",
    "SetChildren",
    "Signal",
    "SignalDone",
    "SlotLeft",
    "StagePlacement",
    "Status",
    "TokenBatch",
    "Tokens",
    "TopLogprobs",
    "Unknown",
    "View",
    "VoidReport",
    "Wake",
    "Welcome",
    "Worker",
    "decode",
    "encode",
]

Message = (
    View | Directory | Hello | Welcome | Refusal | Heartbeat | HeartbeatReply | AskView | Prepare | VoidReport
    | RollCall | RollAnswer | SlotLeft | Signal | SignalDone | Exited | AskStatus | Status | Announce | Prefill
    | PrefillDone | AskPrefill | PrefillQueued | KvPart | KvHandoff | TokenBatch | Have | Unknown | Refused | Abort
    | Release | Wake | ExpertLoad | PlacementPlan | SetChildren | StagePlacement | Inject | Injected
)  # fmt: skip

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Message)


class MalformedMessage(ValueError):
    """The bytes are no message of ours; the text says where they stop making sense."""


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def decode(data: bytes | memoryview) -> Message:
    """Raises `MalformedMessage` on anything that is not exactly one known message."""
    try:
        message: Message = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedMessage(str(error)) from None
    return message
