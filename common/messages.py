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

from common.config import ClusterConfig
from common.ids import NO_RANK, Epoch, Incarnation, ProcessId, Rank, RequestId


class _Message(msgspec.Struct, frozen=True, array_like=True, tag=str.lower, omit_defaults=False):
    """Base of all messages: immutable, tagged with the lower-case class name."""


# Membership: whole states, never differences.


class Member(msgspec.Struct, frozen=True, array_like=True):
    """One slot of a view and the process that holds it."""

    rank: Rank
    incarnation: Incarnation
    process: ProcessId
    host: str
    endpoint: str  # address of its ROUTER socket
    heap: str  # descriptor by which peers map its heap
    agent: str = ""  # name of the agent that can end it


class Placement(msgspec.Struct, frozen=True, array_like=True):
    """``physical_to_logical[layer][rank][local]``: logical expert in that expert slot, -1 = empty.

    ``layer`` counts mixture-of-experts layers only; ``rank`` runs over all max_ranks slots, members or not: the row
    of a vacant slot says what the next process in it will load. Versions come from the monitor's epoch counter.
    """

    version: int
    physical_to_logical: tuple[tuple[tuple[int, ...], ...], ...]


class View(_Message, frozen=True):
    """monitor -> everyone, also rank -> rank. Receivers ignore any view with ``epoch`` <= the one they hold."""

    monitor: ProcessId
    term: int
    epoch: Epoch
    members: tuple[Member, ...]  # sorted by rank
    placement: Placement
    reason: str = ""


class Worker(msgspec.Struct, frozen=True, array_like=True):
    """A process of the cluster as the directory lists it."""

    process: ProcessId
    kind: str  # router | prefill | decode | monitor | planner | agent
    name: str  # what its agent calls it: "decode-2"
    host: str
    pid: int
    endpoint: str
    state: str = "up"


class Directory(_Message, frozen=True):
    """monitor -> everyone: all processes that are no group members by nature, and standbys. Newer version wins."""

    monitor: ProcessId
    term: int
    version: int
    workers: tuple[Worker, ...]

    def of_kind(self, kind: str) -> tuple[Worker, ...]:
        return tuple(worker for worker in self.workers if worker.kind == kind)


# Process <-> monitor.


class Hello(_Message, frozen=True):
    """process -> monitor, first message of a life, repeated until welcomed, and again to a monitor of a new term.

    A decode rank that is in the group says which slot it holds and sends its view, so that a restarted monitor learns
    the state from those who live it.
    """

    process: ProcessId
    kind: str
    name: str
    host: str
    pid: int
    endpoint: str
    agent: str = ""  # name of the agent that can signal and reap this process
    heap: str = ""
    rank: Rank = NO_RANK
    incarnation: Incarnation = Incarnation(0)
    view: View | None = None
    masked: bool = False  # a masked rank is a standby bound to its mask
    children: tuple[tuple[ProcessId, str, int], ...] = ()  # agents: (process id, name, pid) of those alive


class Welcome(_Message, frozen=True):
    """monitor -> process, answer to Hello. ``rank`` is NO_RANK for anything but a decode process that got a slot."""

    monitor: ProcessId
    term: int
    config: ClusterConfig
    directory: Directory
    view: View | None = None
    rank: Rank = NO_RANK
    incarnation: Incarnation = Incarnation(0)
    masked: bool = False  # no slot before a fault event unmasks it; the process says so in its next Hello


class Refusal(_Message, frozen=True):
    """monitor -> process: why the last message changed nothing. ``final`` means: do not try again, exit."""

    reason: str
    final: bool = False


class Heartbeat(_Message, frozen=True):
    """process -> monitor, every heartbeat_s, from a thread of its own.

    ``progress`` grows with every finished operation and header round; ``waits_for`` are the ranks whose words this rank
    lacks right now. ``counters`` are what GET /cluster shows: running, waiting, kv_blocks_used, kv_blocks, rounds, ...
    An agent that can change the number of its children counts ``wanted_KIND`` and ``children_KIND``.
    """

    process: ProcessId
    rank: Rank = NO_RANK
    incarnation: Incarnation = Incarnation(0)
    term: int = 0  # highest term heard of
    epoch: Epoch = Epoch(0)
    state: str = "up"  # decode: standby | joining | serving | void | draining | masked
    progress: int = 0
    waits_for: tuple[int, ...] = ()
    placement_version: int = 0
    out_of: Epoch = Epoch(0)  # highest prepared epoch that this newcomer has given up
    counters: dict[str, int] = {}
    staged_placement: int = 0  # version of the `StagePlacement` of which this rank has all its experts; 0 = none
    misses: tuple[int, ...] = ()  # ranks of the prepared view whose first header has not come here


class HeartbeatReply(_Message, frozen=True):
    """monitor -> process. Who holds an older epoch, directory or term asks."""

    monitor: ProcessId
    term: int
    epoch: Epoch
    directory_version: int
    known: bool = True  # False: this monitor never heard your Hello; say it again


class AskView(_Message, frozen=True):
    """process -> monitor: send me the current View, the prepared one, and the Directory."""

    process: ProcessId


class Prepare(_Message, frozen=True):
    """monitor -> members and newcomers: the view that comes next if all get ready. A higher epoch drops it."""

    view: View
    base_epoch: Epoch  # the epoch that it grows from; 0 at formation


class StagePlacement(_Message, frozen=True):
    """monitor -> members, repeated: copy the experts that this placement gives you, beside those in use.

    It binds nobody, and any other epoch ends it. That it is sent at all says that every member has reported the
    placement of ``base_epoch``: what only older placements need may be overwritten (PROTOCOL 8.3). When all have
    reported it staged, it comes into force as a prepared view of the same members.
    """

    monitor: ProcessId
    term: int
    base_epoch: Epoch
    placement: Placement


class VoidReport(_Message, frozen=True):
    """decode -> monitor: this epoch is void here; repeated by the heartbeat state."""

    process: ProcessId
    rank: Rank
    incarnation: Incarnation
    epoch: Epoch
    step: int
    accused: tuple[int, ...] = ()


class RollCall(_Message, frozen=True):
    """monitor -> members: poison your wait, drain your stream, answer."""

    monitor: ProcessId
    term: int
    epoch: Epoch


class RollAnswer(_Message, frozen=True):
    """decode -> monitor: the stream is drained."""

    process: ProcessId
    rank: Rank
    incarnation: Incarnation
    epoch: Epoch
    placement_version: int
    accused: tuple[int, ...] = ()


class SlotLeft(_Message, frozen=True):
    """decode -> monitor: stream drained, slot given back; the process goes on as a standby."""

    process: ProcessId
    rank: Rank
    incarnation: Incarnation
    epoch: Epoch


class Signal(_Message, frozen=True):
    """monitor -> agent: send ``signal`` (a name: KILL, STOP, CONT, TERM) to a process and prove it.

    ``duration_s``: of a STOP, after which the agent continues the process; 0 = somebody else will.
    """

    id: str
    process: ProcessId
    pid: int
    signal: str
    duration_s: float = 0.0


class SignalDone(_Message, frozen=True):
    """agent -> monitor. ``proof`` says what the agent saw: ``reaped``, ``state T``, ``no such process``."""

    id: str
    process: ProcessId
    ok: bool
    proof: str


class SetChildren(_Message, frozen=True):
    """monitor -> agent, repeated until its heartbeats show it: run ``count`` children of ``kind``.

    More are started under the lowest free numbers. Of those that run, only the ones in ``retire`` may be ended, and
    only as long as there are too many: they hold no slot any more, or (prefill) their requests are placed again.
    """

    monitor: ProcessId
    term: int
    kind: str
    count: int
    retire: tuple[ProcessId, ...] = ()


class Exited(_Message, frozen=True):
    """agent -> monitor, repeated by the agent until the monitor's term answers with its epoch: a child was reaped."""

    agent: str
    process: ProcessId
    name: str
    pid: int
    reason: str  # "signal KILL", "exit 1"


class Inject(_Message, frozen=True):
    """monitor -> process, repeated until Injected: do this fault to yourself. The same id again changes nothing.

    slow: take ``factor`` times the time of your own work. drop_network: lose what passes between you and ``which``
    (monitor | peers | all) in ``direction`` (in | out | both) for ``duration_s``. corrupt_heap: overwrite your memory.
    """

    monitor: ProcessId
    term: int
    id: str
    action: str
    factor: float = 1.0
    which: str = ""
    direction: str = ""
    duration_s: float = 0.0


class Injected(_Message, frozen=True):
    """process -> monitor: the fault is in force, and what shows it. Passes a cut network, and is no sign of life."""

    process: ProcessId
    id: str
    ok: bool
    proof: str


class AskStatus(_Message, frozen=True):
    """router or cli -> monitor: what GET /cluster shows."""

    process: ProcessId
    id: int


class Status(_Message, frozen=True):
    """monitor -> asker. ``body`` is JSON text."""

    id: int
    body: str


# Requests.


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """Everything that decides a token besides the logits. Carried whole: a replaced request goes on exactly."""

    temperature: float
    top_p: float
    top_k: int  # 0 = off
    seed: int  # always set: the router draws one for requests without
    max_tokens: int
    ignore_eos: bool = False
    logprobs: bool = False
    stop_token_ids: tuple[int, ...] = ()  # end-of-sequence ids of the model; ``ignore_eos`` switches them off
    extra_stop_token_ids: tuple[int, ...] = ()  # the request's own: they stop whatever ``ignore_eos`` says
    min_tokens: int = 0  # no stop before this many outputs
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit)
    num_top_logprobs: int = 0  # likeliest tokens to report with each output
    prompt_logprobs: bool = False  # of each prompt token too; they come with output 0

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """All token ids that end this request."""
        return self.extra_stop_token_ids + (() if self.ignore_eos else self.stop_token_ids)


TopLogprobs = tuple[tuple[int, float], ...]  # (token id, log-probability), the likeliest first


class Announce(_Message, frozen=True):
    """router -> decode: expect KV for this attempt, or compute it. Nothing else makes a rank accept KV."""

    request: RequestId
    attempt: int
    router: ProcessId
    incarnation: Incarnation  # of the rank that is meant
    prompt: tuple[int, ...]
    outputs: tuple[int, ...]  # tokens that the client has already
    sampling: Sampling
    computes_prompt: bool = False  # no prefill worker is left: the rank computes prompt + outputs itself, in its rounds
    reserves_all: bool = False  # was preempted before: wait for KV blocks for the whole length, and never again


class Prefill(_Message, frozen=True):
    """router -> prefill: compute KV of ``prompt + outputs``, sample the next token, hand both to the decode rank."""

    request: RequestId
    attempt: int
    router: ProcessId
    prompt: tuple[int, ...]
    outputs: tuple[int, ...]
    sampling: Sampling
    rank: Rank
    incarnation: Incarnation
    endpoint: str  # of the decode rank


class PrefillDone(_Message, frozen=True):
    """prefill -> router: KV pushed (which does not mean that it arrived)."""

    request: RequestId
    attempt: int


class AskPrefill(_Message, frozen=True):
    """router -> prefill after no news: is this attempt queued or running?"""

    request: RequestId
    attempt: int


class PrefillQueued(_Message, frozen=True):
    """prefill -> router: yes, ``num_ahead`` prompt tokens come first."""

    request: RequestId
    attempt: int
    num_ahead: int = 0


class KvPart(_Message, frozen=True):
    """prefill -> decode, while the prompt is still computed. One extra frame: the KV of positions start, start + 1, ...
    in some layers, float32 [num_layers, num_tokens, kv_width], C order, little endian. Any order, any number of times.
    """

    request: RequestId
    attempt: int
    rank: Rank
    incarnation: Incarnation
    first_layer: int
    num_layers: int
    start: int
    num_tokens: int


class KvHandoff(_Message, frozen=True):
    """prefill -> decode, after the last token. The KV comes in one extra frame, float32 [num_layers, num_tokens,
    kv_width], C order, little endian; without a frame it has come, or still comes, in KvParts."""

    request: RequestId
    attempt: int
    rank: Rank
    incarnation: Incarnation
    num_tokens: int
    first_token: int  # output number len(outputs)
    first_logprob: float
    first_top: TopLogprobs = ()
    prompt_logprobs: tuple[tuple[float, TopLogprobs], ...] = ()


class Tokens(msgspec.Struct, frozen=True, array_like=True):
    """Outputs [start, start + len(ids)) of one attempt. ``finish``: "" (goes on), "stop" or "length".

    ``top_logprobs`` has an entry for each id if the request asks for them. ``prompt_logprobs``, if it asks for those,
    are of prompt tokens 1, 2, ... and come with output 0, so that whoever has that output has them too.
    ``missed_experts``: some token of this attempt was computed without an expert that it was routed to.
    """

    request: RequestId
    attempt: int
    start: int
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: str = ""
    top_logprobs: tuple[TopLogprobs, ...] = ()
    prompt_logprobs: tuple[tuple[float, TopLogprobs], ...] = ()
    missed_experts: bool = False


class TokenBatch(_Message, frozen=True):
    """decode -> router: all that one round committed for the requests of that router."""

    rank: Rank
    incarnation: Incarnation
    epoch: Epoch
    items: tuple[Tokens, ...]
    num_running: int = 0
    num_free_blocks: int = 0


class Have(_Message, frozen=True):
    """router -> decode: I have ``num_outputs`` outputs of this attempt; send all from there, or Unknown."""

    request: RequestId
    attempt: int
    num_outputs: int


class Unknown(_Message, frozen=True):
    """decode or prefill -> router: nothing known of this attempt."""

    request: RequestId
    attempt: int


class Refused(_Message, frozen=True):
    """prefill or decode -> router: this attempt ends here; place it again (or elsewhere)."""

    request: RequestId
    attempt: int
    reason: str
    preempted: bool = False  # it ran, and had to make room for older ones


class Abort(_Message, frozen=True):
    """router -> prefill, decode: drop this and all earlier attempts."""

    request: RequestId
    attempt: int


class Release(_Message, frozen=True):
    """router -> decode: the finished request was delivered; forget it."""

    request: RequestId
    attempt: int


class Wake(_Message, frozen=True):
    """decode -> decode: a rank got work in this epoch; start rounds."""

    epoch: Epoch


# Planner.


class ExpertLoad(_Message, frozen=True):
    """decode -> bus, about once a second: tokens routed since the last one, [num_moe_layers][num_logical_experts]."""

    rank: Rank
    incarnation: Incarnation
    placement_version: int
    tokens: tuple[tuple[int, ...], ...]
    num_passes: int = 0  # forward passes in which they were routed
    compute_s: float = 0.0  # time that these passes took


class PlacementPlan(_Message, frozen=True):
    """planner -> monitor: a wish; the monitor numbers it and decides."""

    process: ProcessId
    base_version: int  # placement that it starts from; 0 = at formation
    physical_to_logical: tuple[tuple[tuple[int, ...], ...], ...]
    balancedness: float = 0.0


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
