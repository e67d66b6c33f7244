"""All requests of one router. The core between HTTP and the cluster: events in, actions out.

    client:  on_submit, on_client_gone          cluster: on_view, on_directory, on_message          time: on_tick

Whatever waits is placed in order of arrival as soon as there is a rank and a prefill worker, so a request that has lost
its place, whose client is in the middle of a stream, comes before all that have never had one. What belongs to no
request any more is answered with Abort, so that nobody keeps memory for it; so is every attempt but the current one.

Invariants (`check_invariants`): a request is in the table until it is done, failed or gone; it has a place exactly
when it is neither queued nor replacing; its place is in the view.
"""

from collections.abc import Iterable

from common.config import ClusterConfig
from common.ids import ProcessId, Rank, RequestId
from common.messages import (
    Abort,
    Directory,
    Message,
    PrefillDone,
    PrefillQueued,
    Refused,
    Sampling,
    TokenBatch,
    Unknown,
    View,
)
from common.view import has_orphans
from services.router.dispatch_policy import RankLoad, choose_prefill, choose_rank, plan_moves
from services.router.prefill_wait import PrefillWait
from services.router.prefix_homes import PrefixHomes
from services.router.request_actions import Action, Deliver, Send
from services.router.request_lifecycle import Place, RequestLifecycle, State

_WAITING = (State.QUEUED, State.REPLACING)


class RequestTable:
    def __init__(self, router: ProcessId, config: ClusterConfig) -> None:
        self._router, self._config = router, config
        self._requests: dict[RequestId, RequestLifecycle] = {}
        self._view: View | None = None
        self._directory: Directory | None = None
        self._ranks: dict[Rank, RankLoad] = {}
        self._prefill: tuple[ProcessId, ...] = ()
        self._prefill_wait: PrefillWait = PrefillWait(config.router.prefill_wait_s)
        self._prefix_homes = PrefixHomes(config.decode.block_size)
        self.lacks_experts = False  # in the present view, so that nothing is computed
        self._filling: set[Rank] = set()  # new ranks that running requests still move to
        self._moving: set[RequestId] = set()  # moved there and not yet decoding again
        self._num_stale_tokens = 0  # of requests that have left the table, or known to none

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def num_running(self) -> int:
        """Requests that have a place."""
        return sum(request.place is not None for request in self._requests.values())

    @property
    def num_stale_tokens(self) -> int:
        """Tokens dropped so far: doubled, or of an old attempt."""
        return self._num_stale_tokens + sum(request.num_stale_tokens for request in self._requests.values())

    @property
    def epoch(self) -> int:
        return self._view.epoch if self._view else 0

    @property
    def num_ranks(self) -> int:
        return len(self._ranks)

    def waits_for_prefill(self, now: float) -> bool:
        """There is no prefill worker, and nobody computes prompts in its place yet."""
        return self._prefill_wait.is_on(now)

    def snapshot(self) -> list[dict[str, object]]:
        """Every request in flight, for people: where it is and how far. ``rank`` is -1 while it has no place."""
        return [
            {
                "id": request.id,
                "state": request.state.value,
                "attempt": request.attempt,
                "rank": request.place.rank if request.place else -1,
                "num_prompt_tokens": len(request.prompt),
                "num_output_tokens": len(request.outputs),
            }
            for request in self._requests.values()
        ]

    def request(self, request: RequestId) -> RequestLifecycle | None:
        return self._requests.get(request)

    def on_submit(self, id: RequestId, prompt: tuple[int, ...], sampling: Sampling, now: float) -> list[Action]:
        assert id not in self._requests, "request ids are never reused"
        self._requests[id] = RequestLifecycle(id, prompt, sampling, self._router, self._config.router, now)
        return self._place_waiting(now)

    def on_client_gone(self, id: RequestId, now: float) -> list[Action]:
        """Also when the client has all that it wanted before the model ended (a stop string)."""
        request = self._requests.get(id)
        if request is None:
            return []
        actions = request.on_client_gone(now)
        return self._settle(actions, now)

    def on_message(self, peer: ProcessId, message: Message, now: float) -> list[Action]:
        """A message of a decode rank or prefill worker; others are none of the table's business."""
        match message:
            case TokenBatch():
                actions = self._on_token_batch(peer, message, now)
                return actions if self._is_plain_progress(actions) else self._settle(actions, now)
            case PrefillDone() | PrefillQueued() | Unknown() | Refused():
                request = self._requests.get(message.request)
                if request is None or request.attempt != message.attempt:
                    return []
                return self._settle(self._on_word(request, peer, message, now), now)
            case _:
                return []

    def on_view(self, view: View, now: float) -> list[Action]:
        """Views that are not newer are ignored. Whom the view no longer holds loses its requests at once."""
        if view.epoch <= self.epoch:
            return []
        old = self._ranks
        self._view, self._ranks = view, {}
        self.lacks_experts = not self._config.decode.allow_missing_experts and has_orphans(view)
        for member in view.members:
            known = old.get(member.rank)
            if known is not None and known.member.incarnation == member.incarnation:
                known.member = member
                self._ranks[member.rank] = known
            else:
                self._ranks[member.rank] = RankLoad(member, self._config.decode.num_kv_blocks)
        actions: list[Action] = []
        for request in self._requests.values():
            if request.place is not None and not self._holds(request.place):
                actions += request.replace("rank lost", now)
        added = {rank for rank, load in self._ranks.items() if load is not old.get(rank)}
        self._filling = (self._filling & self._ranks.keys()) | added
        return self._settle(actions, now)

    def on_directory(self, directory: Directory, now: float) -> list[Action]:
        if self._directory and (directory.term, directory.version) <= (self._directory.term, self._directory.version):
            return []
        self._directory = directory
        self._prefill = tuple(worker.process for worker in directory.of_kind("prefill") if worker.state == "up")
        self._prefill_wait.on_workers(len(self._prefill), now)
        listed = {worker.process for worker in directory.of_kind("prefill") if worker.state != "dead"}
        actions: list[Action] = []
        for request in self._requests.values():
            place = request.place
            if place is not None and not place.computes_prompt and place.prefill not in listed:
                actions += request.on_prefill_lost(now)
        return self._settle(actions, now)

    def on_tick(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for request in self._requests.values():
            actions += request.on_tick(now, self.lacks_experts)
        return self._settle(actions, now)

    def check_invariants(self) -> None:
        for request in self._requests.values():
            assert not request.ended, f"{request.id} has ended and is still in the table"
            assert (request.place is None) == (request.state in _WAITING), request.machine.story()
            assert request.place is None or self._holds(request.place), f"{request.id} is placed outside the view"

    def _on_token_batch(self, peer: ProcessId, batch: TokenBatch, now: float) -> list[Action]:
        rank = self._ranks.get(batch.rank)
        if rank is not None and rank.member.incarnation == batch.incarnation:
            rank.reported_at = now
            rank.reported_running, rank.reported_free_blocks = batch.num_running, batch.num_free_blocks
        actions: list[Action] = []
        for tokens in batch.items:
            request = self._requests.get(tokens.request)
            place = request.place if request else None
            if (
                request is None
                or request.ended
                or request.attempt != tokens.attempt
                or place is None
                or (place.rank, place.incarnation) != (batch.rank, batch.incarnation)
            ):
                self._num_stale_tokens += len(tokens.ids)
                actions.append(Send(peer, Abort(tokens.request, tokens.attempt)))
            else:
                actions += request.on_tokens(tokens, now)
        return actions

    def _is_plain_progress(self, actions: list[Action]) -> bool:
        """Some requests have more tokens, and that is all: nothing ends, waits or moves. True of nearly all batches."""
        return (
            all(isinstance(action, Deliver) and not action.finish for action in actions)
            and not self._filling
            and all(request.place is not None for request in self._requests.values())
        )

    def _on_word(
        self,
        request: RequestLifecycle,
        peer: ProcessId,
        message: PrefillDone | PrefillQueued | Unknown | Refused,
        now: float,
    ) -> list[Action]:
        match message:
            case PrefillDone():
                return request.on_prefill_done(now)
            case PrefillQueued():
                return request.on_prefill_queued(now)
            case Unknown():
                return request.on_unknown(peer, now)
            case Refused(preempted=preempted):
                return request.on_refused(peer, now, preempted)

    def _holds(self, place: Place) -> bool:
        rank = self._ranks.get(place.rank)
        return rank is not None and rank.member.incarnation == place.incarnation

    def _settle(self, actions: list[Action], now: float) -> list[Action]:
        """After any event: what has ended leaves the table, what has no place is placed."""
        for request in [request for request in self._requests.values() if request.ended]:
            self._num_stale_tokens += request.num_stale_tokens
            del self._requests[request.id]
        return actions + self._place_waiting(now) + self._even_out(now)

    def _place_waiting(self, now: float) -> list[Action]:
        waiting = [r for r in self._requests.values() if r.state in _WAITING and now >= r.not_before]
        if not waiting or not self._ranks or self._prefill_wait.is_on(now):
            return []
        self._count_load()
        pending = self._count_pending_prefill()
        actions: list[Action] = []
        for request in waiting:
            rank = choose_rank(self._ranks.values(), self._num_blocks(request), request.avoid, now)
            assert rank is not None, "there are members"
            actions += self._place(request, rank, pending, now)
        return actions

    def _even_out(self, now: float) -> list[Action]:
        """Moves requests to new ranks, as many at a time as there are prefill workers: a move pauses its stream for one
        prefill, and for all those queued before it."""
        self._moving = {id for id in self._moving if (r := self._requests.get(id)) and r.state is not State.DECODING}
        most = max(1, len(self._prefill))
        if not self._filling or len(self._moving) >= most or self._prefill_wait.is_on(now):
            return []
        running: dict[Rank, list[tuple[int, RequestId]]] = {rank: [] for rank in self._ranks}
        for request, place in self._placed():
            running[place.rank].append((request.num_context_tokens, request.id))
        moves = plan_moves(running, self._filling, self._config.router.rebalance_difference)
        if not moves:
            self._filling = set()
        self._count_load()
        pending = self._count_pending_prefill()
        actions: list[Action] = []
        for id, target in moves[: most - len(self._moving)]:
            request = self._requests[id]
            actions += request.replace("moved", now)
            actions += self._place(request, self._ranks[target], pending, now)
            self._moving.add(id)
        return actions

    def _place(
        self, request: RequestLifecycle, rank: RankLoad, pending: dict[ProcessId, int], now: float
    ) -> list[Action]:
        prefill = self._choose_prefill(request, pending) if pending else rank.member.process
        rank.num_in_flight += 1
        rank.num_reserved_blocks += self._num_blocks(request)
        if pending:
            pending[prefill] += request.num_context_tokens
        member = rank.member
        place = Place(member.rank, member.incarnation, member.process, member.endpoint, prefill)
        return request.on_place(place, now)

    def _choose_prefill(self, request: RequestLifecycle, pending: dict[ProcessId, int]) -> ProcessId:
        tokens = (*request.prompt, *request.outputs)
        known = self._prefix_homes.num_known_tokens(tokens) if len(pending) > 1 else {}
        prefill = choose_prefill(pending, known, request.avoid)
        assert prefill is not None, "there are prefill workers"
        self._prefix_homes.on_sent(prefill, tokens)
        return prefill

    def _placed(self) -> Iterable[tuple[RequestLifecycle, Place]]:
        return ((r, r.place) for r in self._requests.values() if r.place is not None)

    def _count_load(self) -> None:
        for rank in self._ranks.values():
            rank.num_in_flight = rank.num_reserved_blocks = 0
        for request, place in self._placed():
            self._ranks[place.rank].num_in_flight += 1
            self._ranks[place.rank].num_reserved_blocks += self._num_blocks(request)

    def _count_pending_prefill(self) -> dict[ProcessId, int]:
        pending = dict.fromkeys(self._prefill, 0)
        for request, place in self._placed():
            if request.state is State.PREFILLING and place.prefill in pending:
                pending[place.prefill] += request.num_context_tokens
        return pending

    def _num_blocks(self, request: RequestLifecycle) -> int:
        """KV blocks that a rank admits the request with."""
        decode, whole = self._config.decode, len(request.prompt) + request.sampling.max_tokens
        start = request.num_context_tokens + decode.kv_reserve_tokens
        return -(-(whole if request.was_preempted else min(start, whole)) // decode.block_size)
