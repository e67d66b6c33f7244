"""One request from acceptance to its last token. No clock, no sockets: events in, actions out.

    QUEUED --place--> PREFILLING --PrefillDone--> HANDING_OFF --first tokens--> DECODING --finish--> DONE
                          |     (at once if the rank computes the prompt itself)    |
                          |            (tokens may come first)                      |
                          +-------- place lost, left, refused or silent ------------+--> REPLACING --place--> PREFILLING
    any of them --deadline or client gone--> FAILED

Who may cause an edge: the table places; prefill worker and decode rank report, for the current attempt only; a view or
a directory takes a place away; time does the rest.

Invariants: ``outputs`` only grows, and grows by the one message suffix that starts at its end, so that every output is
delivered once and in order whatever is lost, doubled or reordered. An attempt has one place for its whole life, and
``attempt`` grows whenever the place is given up. A silent peer is asked ``max_asks`` times and then given up; a request
without a new token for ``request_deadline_s`` ends.
"""

from dataclasses import dataclass, field
from enum import Enum

from common.config import RouterConfig
from common.ids import Incarnation, ProcessId, Rank, RequestId
from common.messages import Abort, Announce, AskPrefill, Have, Prefill, Release, Sampling, Tokens
from common.state_machine import StateMachine, transition_table
from services.router.request_actions import Action, Deliver, Fail, Replaced, Send

# A rank that streams past a gap would otherwise be asked once a round.
GAP_ASK_AGAIN_S = 0.05
# After a refusal: the peer is full, and asking it again at once would only make it busier.
REFUSED_WAIT_S = 0.05
REFUSED_WAIT_MAX_S = 1.0


class State(Enum):
    QUEUED = "queued"
    PREFILLING = "prefilling"
    HANDING_OFF = "handing off"
    DECODING = "decoding"
    REPLACING = "replacing"
    DONE = "done"
    FAILED = "failed"


MOVES = transition_table(
    {
        State.QUEUED: {State.PREFILLING, State.FAILED},
        State.PREFILLING: {State.HANDING_OFF, State.DECODING, State.DONE, State.REPLACING, State.FAILED},
        State.HANDING_OFF: {State.DECODING, State.DONE, State.REPLACING, State.FAILED},
        State.DECODING: {State.DONE, State.REPLACING, State.FAILED},
        State.REPLACING: {State.PREFILLING, State.FAILED},
        State.DONE: set(),
        State.FAILED: set(),
    }
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where one attempt lives: a decode rank in one incarnation, and the prefill worker that feeds it."""

    rank: Rank
    incarnation: Incarnation
    decode: ProcessId
    endpoint: str  # of the decode rank
    prefill: ProcessId  # the decode rank itself when there is no prefill worker

    @property
    def computes_prompt(self) -> bool:
        return self.prefill == self.decode


@dataclass(slots=True)
class RequestLifecycle:
    """``prompt`` and ``sampling`` never change; with ``outputs`` they are all that a new place needs."""

    id: RequestId
    prompt: tuple[int, ...]
    sampling: Sampling
    router: ProcessId
    config: RouterConfig
    arrived: float
    outputs: list[int] = field(default_factory=list)
    attempt: int = 0
    place: Place | None = None
    avoid: set[ProcessId] = field(default_factory=set)  # failed this request since its last token
    not_before: float = 0.0  # do not place again earlier
    was_preempted: bool = False  # it had to make room for others once, and must not again
    num_stale_tokens: int = 0
    missed_experts: bool = False  # also for outputs of later attempts, which follow those
    machine: StateMachine[State] = field(init=False)
    _deadline: float = field(init=False)
    _last_news: float = 0.0
    _last_ask: float = 0.0
    _last_gap_ask: float = float("-inf")
    _num_asks: int = 0
    _num_refusals: int = 0
    _prefill_lost: bool = False

    def __post_init__(self) -> None:
        self.machine = StateMachine(f"request {self.id}", MOVES, State.QUEUED, self.arrived)
        self._deadline = self.arrived + self.config.request_deadline_s

    @property
    def state(self) -> State:
        return self.machine.state

    @property
    def ended(self) -> bool:
        return self.state in (State.DONE, State.FAILED)

    @property
    def num_context_tokens(self) -> int:
        """What a new place has to compute before it can go on."""
        return len(self.prompt) + len(self.outputs)

    def on_place(self, place: Place, now: float) -> list[Action]:
        """A place was found. Announce comes before Prefill: a rank takes KV only for what was announced to it."""
        self.machine.move(State.PREFILLING, now, f"rank {place.rank}.{place.incarnation}")
        self.place, self._prefill_lost = place, False
        self._last_news, self._num_asks = now, 0
        outputs = tuple(self.outputs)
        announce = Announce(
            self.id, self.attempt, self.router, place.incarnation, self.prompt, outputs, self.sampling,
            place.computes_prompt, self.was_preempted,
        )  # fmt: skip
        if place.computes_prompt:
            self.machine.move(State.HANDING_OFF, now, "no prefill worker is left")
            return [Send(place.decode, announce)]
        prefill = Prefill(
            self.id, self.attempt, self.router, self.prompt, outputs, self.sampling,
            place.rank, place.incarnation, place.endpoint,
        )  # fmt: skip
        return [Send(place.decode, announce), Send(place.prefill, prefill)]

    def on_prefill_done(self, now: float) -> list[Action]:
        self._heard(now)
        if self.state is State.PREFILLING:
            self.machine.move(State.HANDING_OFF, now, "prefill done")
        return []

    def on_prefill_queued(self, now: float) -> list[Action]:
        if self.state is State.PREFILLING:
            self._heard(now)
        return []

    def on_tokens(self, tokens: Tokens, now: float) -> list[Action]:
        """Tokens of the current attempt from its place. Takes the suffix that is new, asks when there is a gap."""
        assert self.place is not None, "tokens of the current attempt come from its place"
        have, end = len(self.outputs), tokens.start + len(tokens.ids)
        if self._lacks_logprobs(tokens):
            self.num_stale_tokens += len(tokens.ids)
            return []
        if tokens.start > have:
            return self._ask_for_gap(now)
        if end < have or (end == have and not tokens.finish):
            return self._on_nothing_new(tokens, now)
        self._heard(now)
        new = tokens.ids[have - tokens.start :]
        self.num_stale_tokens += have - tokens.start
        self.outputs += new
        self.avoid.clear()
        self._num_refusals = 0
        self._deadline = now + self.config.request_deadline_s
        logprobs, tops = tokens.logprobs[have - tokens.start :], tokens.top_logprobs[have - tokens.start :]
        prompt_logprobs = tokens.prompt_logprobs if have == 0 else ()
        self.missed_experts |= tokens.missed_experts
        actions: list[Action] = [
            Deliver(self.id, have, new, logprobs, tokens.finish, tops, prompt_logprobs, self.missed_experts)
        ]
        if tokens.finish:
            self.machine.move(State.DONE, now, tokens.finish)
            actions.append(Send(self.place.decode, Release(self.id, self.attempt)))
        elif self.state is not State.DECODING:
            self.machine.move(State.DECODING, now, "tokens")
        return actions

    def _lacks_logprobs(self, tokens: Tokens) -> bool:
        """Whether something that the client asked for is missing: then the tokens do not count either."""
        wanted, num_ids = self.sampling, len(tokens.ids)
        return (
            (wanted.logprobs and len(tokens.logprobs) != num_ids)
            or (wanted.num_top_logprobs > 0 and len(tokens.top_logprobs) != num_ids)
            or (
                wanted.prompt_logprobs
                and not self.outputs
                and tokens.start == 0
                and num_ids > 0
                and len(tokens.prompt_logprobs) != len(self.prompt) - 1
            )
        )

    def _on_nothing_new(self, tokens: Tokens, now: float) -> list[Action]:
        """Doubled tokens, or "alive" (no ids): a rank that decodes or computes the prompt is believed, but one that
        still lacks the KV is not a reason to wait on, since the KV may have been lost."""
        self.num_stale_tokens += len(tokens.ids)
        if self.state is State.DECODING or (self.place and self.place.computes_prompt):
            self._heard(now)
        elif self._prefill_lost and not tokens.ids:
            return self.replace("prefill worker lost", now)
        return []

    def on_unknown(self, peer: ProcessId, now: float) -> list[Action]:
        """``peer`` knows nothing of the current attempt."""
        if not self._depends_on(peer):
            return []
        self.avoid.add(peer)
        return self.replace("forgotten", now)

    def on_refused(self, peer: ProcessId, now: float, preempted: bool = False) -> list[Action]:
        if not self._depends_on(peer):
            return []
        if preempted:
            self.was_preempted, self.not_before = True, now + REFUSED_WAIT_S
            return self.replace("preempted", now)
        self.avoid.add(peer)
        self.not_before = now + min(REFUSED_WAIT_S * 2**self._num_refusals, REFUSED_WAIT_MAX_S)
        self._num_refusals += 1
        return self.replace("refused", now)

    def on_prefill_lost(self, now: float) -> list[Action]:
        """The directory no longer lists the prefill worker. What it has pushed already may still be in time."""
        if self.state is State.PREFILLING:
            return self.replace("prefill worker lost", now)
        if self.state is State.HANDING_OFF and not self._prefill_lost:
            self._prefill_lost = True
            return self._ask_decode(now)
        return []

    def replace(self, reason: str, now: float) -> list[Action]:
        """Gives the place up. The abort frees it when it is still there; attempt and index checks do the rest."""
        aborts = self._abort()
        self.machine.move(State.REPLACING, now, reason)
        self.place = None
        self.attempt += 1
        return [*aborts, Replaced(self.id, self.attempt, reason)]

    def on_client_gone(self, now: float) -> list[Action]:
        aborts = self._abort()
        self.machine.move(State.FAILED, now, "client gone")
        return aborts

    def on_tick(self, now: float, lacks_experts: bool = False) -> list[Action]:
        """Ends a wait that has lasted too long: asks, gives the place up, or gives the request up. ``lacks_experts``:
        the group computes nothing, because it has no room for some expert."""
        if now >= self._deadline:
            return self._fail_late(now, lacks_experts)
        if self.place is None or now - max(self._last_news, self._last_ask) < self.config.no_news_s:
            return []
        if self._num_asks >= self.config.max_asks:
            self.avoid.add(self._whom_to_ask(self.place))
            return self.replace("no answer", now)
        if self.state is State.PREFILLING:
            self._num_asks, self._last_ask = self._num_asks + 1, now
            return [Send(self.place.prefill, AskPrefill(self.id, self.attempt))]
        return self._ask_decode(now)

    def _fail_late(self, now: float, lacks_experts: bool) -> list[Action]:
        seconds = self.config.request_deadline_s
        if self.place is None:
            failure = Fail(self.id, 503, f"no decode rank and prefill worker had room within {seconds:g} s")
        elif lacks_experts:
            failure = Fail(self.id, 503, f"too few decode ranks for all experts for {seconds:g} s")
        else:
            failure = Fail(self.id, 504, f"no token within {seconds:g} s")
        aborts = self._abort()
        self.machine.move(State.FAILED, now, "deadline")
        return [*aborts, failure]

    def _heard(self, now: float) -> None:
        self._last_news, self._num_asks = now, 0

    def _depends_on(self, peer: ProcessId) -> bool:
        """A prefill worker may forget an attempt once it has handed it over; a decode rank may not."""
        if self.place is None:
            return False
        return peer == self.place.decode or (peer == self.place.prefill and self.state is State.PREFILLING)

    def _whom_to_ask(self, place: Place) -> ProcessId:
        return place.prefill if self.state is State.PREFILLING else place.decode

    def _ask_decode(self, now: float) -> list[Action]:
        self._num_asks, self._last_ask = self._num_asks + 1, now
        return self._have()

    def _ask_for_gap(self, now: float) -> list[Action]:
        """Not counted as an ask and no news either: a rank that streams on and never answers is given up in time."""
        if now - self._last_gap_ask < GAP_ASK_AGAIN_S:
            return []
        self._last_gap_ask = now
        return self._have()

    def _have(self) -> list[Action]:
        assert self.place is not None, "only a placed request has somebody to ask"
        return [Send(self.place.decode, Have(self.id, self.attempt, len(self.outputs)))]

    def _abort(self) -> list[Action]:
        if self.place is None:
            return []
        peers = [self.place.decode]
        if self.state is State.PREFILLING:
            peers.append(self.place.prefill)
        return [Send(peer, Abort(self.id, self.attempt)) for peer in peers]
