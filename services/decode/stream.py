"""The thread that makes rounds. It alone runs the cores, between rounds; the event loop only brings and takes messages.

    take the inbox -> let views and heaps make progress -> headers -> forward pass -> read status -> commit -> send

What must not wait for the end of a round (a newer view, a roll call, loneliness, the end of the process) ends its
waits: the header wait asks `_must_stop`, the others are ended by this rank's own poison word, written by the event
loop's thread. Either way the round is void or was complete already, and what ended it is an event after it, as any
other.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.config import ClusterConfig
from common.ids import NO_RANK, Epoch, Incarnation, ProcessId, RequestId
from common.kv_blocks import BlockAllocator
from common.messages import (
    Directory,
    ExpertLoad,
    Have,
    Inject,
    Injected,
    Message,
    Prepare,
    RollCall,
    StagePlacement,
    Unknown,
    View,
    Wake,
    Welcome,
)
from common.network_cut import NetworkCut
from common.pace import Pace
from common.self_faults import SelfFaults
from common.service_runner import for_the_operator
from common.view import ranks
from services.decode import actions
from services.decode.actions import Action, Send
from services.decode.batch_scheduler import BatchScheduler
from services.decode.cut_links import CutLinks
from services.decode.delivery import Delivery
from services.decode.membership import Membership, RankState
from services.decode.rank_engine import RankEngine
from services.decode.rank_status import RankStatus
from services.decode.request import Computed, Step
from services.decode.round_header import NEWCOMER_HEADER, RoundHeader, RoundPlan

BARE_ROUND_S = 0.002  # between rounds without tokens while a view is prepared
LOAD_S = 1.0
_STANDBY_S = 0.05
_JOINING_S = 0.002
_COPY_S = 0.002  # between slices of experts while there are no rounds
_MAX_WAITING = 64
_DECLARE_S = 0.3  # the word that says what was done to the memory goes first; heartbeats, in case it is lost

log = logging.getLogger("regrow.decode")


@dataclass(frozen=True, slots=True)
class Incoming:
    peer: ProcessId
    message: Message
    frames: Sequence[memoryview] = ()


class Inbox:
    """From the event loop to the stream."""

    def __init__(self) -> None:
        self._items: deque[Incoming] = deque()
        self._filled = threading.Condition()

    def put(self, item: Incoming | None) -> None:
        """None only ends a wait."""
        with self._filled:
            if item is not None:
                self._items.append(item)
            self._filled.notify()

    def take(self) -> list[Incoming]:
        with self._filled:
            items = list(self._items)
            self._items.clear()
        return items

    def wait(self, timeout_s: float) -> None:
        with self._filled:
            if not self._items:
                self._filled.wait(timeout_s)


class Stream:
    """``emit`` gets what leaves the process (`actions` that are messages, and ExpertLoad for the bus), on this thread.

    ``num_monitor_words`` counts words of the monitor, so that silence can be noticed. An exception of the thread ends
    it and is passed to ``on_end``, None when it was asked to stop.
    """

    def __init__(
        self,
        process: ProcessId,
        heap_dir: Path,
        emit: Callable[[list[Action | ExpertLoad]], None],
        on_end: Callable[[BaseException | None], None],
        num_monitor_words: Callable[[], int] = lambda: 0,
        clock: Callable[[], float] = time.monotonic,
        network: NetworkCut | None = None,
    ) -> None:
        self._link_fault = CutLinks(network or NetworkCut(), clock)
        self._pace, self._faults = Pace(clock, time.sleep), SelfFaults(process)
        self._process, self._heap_dir, self._clock = process, heap_dir, clock
        self._emit, self._on_end, self._num_monitor_words = emit, on_end, num_monitor_words
        self._inbox = Inbox()
        self._thread = threading.Thread(target=self._run, name="stream", daemon=True)
        self._membership = Membership(process, float("inf"), clock())
        self._engine: RankEngine | None = None
        self._delivery: Delivery | None = None
        self._scheduler: BatchScheduler[RequestId] | None = None
        self._config = ClusterConfig()
        self._has_life = self._stopping = self._woken = False
        self._life = 0
        self._words_seen = 0
        self._newest_view = self._newest_roll_call = Epoch(0)
        self._announced = Epoch(0)
        self._rest_until = self._load_at = 0.0
        self._all_idle = False  # after the last round; the others rest and want to be woken
        self.num_rounds = self.num_void_rounds = self._num_headers = 0
        self._num_passes, self._compute_s = 0, 0.0  # since the last report of loads
        self._distrusted_at = float("inf")
        self._num_group_rounds = self._num_compute_rounds = self._own_us = 0
        self.status = RankStatus()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Asks the stream to leave the group and end; returns at once."""
        self._stopping = True
        self._interrupt(self._membership.epoch)

    def join(self, timeout_s: float) -> bool:
        """Whether the thread has ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def deliver(self, peer: ProcessId, message: Message, frames: Sequence[memoryview] = ()) -> None:
        """From the event loop. Ends the waits of a round that has become pointless, in milliseconds."""
        self._inbox.put(Incoming(peer, message, frames))
        match message:
            case View(epoch=epoch) | Prepare(view=View(epoch=epoch), base_epoch=0):
                self._newest_view = max(self._newest_view, epoch)
                self._interrupt(Epoch(epoch - 1))
            case RollCall(epoch=epoch):
                self._newest_roll_call = max(self._newest_roll_call, epoch)
                # Read before the question: an epoch that is entered in between must not be poisoned by its answer.
                current = self._membership.epoch
                if self._membership.counts_roll_call(epoch):
                    self._interrupt(current)
            case _:
                pass

    def _interrupt(self, epoch: Epoch) -> None:
        """Ends waits in this epoch and earlier ones."""
        group = self._engine.group if self._engine else None
        if group is not None and epoch > 0:
            group.poison_self(epoch)
        self._inbox.put(None)

    def _must_stop(self) -> bool:
        membership, now = self._membership, self._clock()
        self._note_monitor(now)
        return (
            self._stopping
            or self._newest_view > membership.epoch
            or membership.counts_roll_call(self._newest_roll_call)
            or membership.is_lonely(now)
        )

    def _note_monitor(self, now: float) -> None:
        if self._num_monitor_words() != self._words_seen:
            self._words_seen = self._num_monitor_words()
            self._membership.on_sign_of_monitor(now)

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            while self._membership.state is not RankState.STOPPED:
                self._turn()
        except Exception as caught:
            error = caught
        finally:
            try:
                if self._engine:
                    self._engine.end_life()
            except Exception as caught:
                error = error or caught
            self._on_end(error)

    def _turn(self) -> None:
        for item in self._inbox.take():
            self._receive(item)
        now = self._clock()
        if self._stopping:
            self._perform(self._membership.on_stop(now))
            return
        self._note_monitor(now)
        self._perform(self._membership.on_tick(now))
        self._copy_experts(now)
        self._look_for_first_headers()
        self._care_for_requests(now)
        self._update_status()
        match self._membership.state:
            case RankState.SERVING:
                self._serve()
            case RankState.JOINING:
                self._inbox.wait(_JOINING_S)
            case _:
                self._begin_life()
                self._inbox.wait(_STANDBY_S if self._membership.view is None else _JOINING_S)

    def _receive(self, item: Incoming) -> None:
        membership, now, message = self._membership, self._clock(), item.message
        match message:
            case Welcome():
                self._configure(message.config, message.directory)
                rank, incarnation, masked = message.rank, message.incarnation, message.masked
                self._perform(membership.on_welcome(rank, incarnation, message.view, now, masked))
            case Prepare() if self._engine:
                self._perform(membership.on_prepare(message.view, message.base_epoch, now))
            case StagePlacement():
                self._perform(membership.on_stage(message))
            case View():
                self._perform(membership.on_view(message, now))
            case RollCall():
                membership.on_term(message.term)
                self._perform(membership.on_roll_call(message.epoch, self._accused(), now))
            case Inject() if self._engine:
                self._inject(message, now)
            case Wake(epoch=epoch):
                self._woken = self._woken or epoch == membership.epoch
            case Have() if self._delivery is None:
                self._send([Send(item.peer, Unknown(message.request, message.attempt))])
            case _ if self._delivery:
                self._send(self._delivery.on_message(item.peer, message, item.frames, now))
            case _:
                pass

    def _configure(self, config: ClusterConfig, directory: Directory) -> None:
        """The first welcome's configuration holds for the life of the process."""
        if self._engine is not None:
            return
        self._config = config
        with for_the_operator():
            self._engine = RankEngine(config, self._heap_dir, self._process, self._pace, self._link_fault)
        blocks: BlockAllocator[RequestId] = BlockAllocator(config.decode.num_kv_blocks, config.decode.block_size)
        self._scheduler = BatchScheduler(blocks, config.decode.max_batch, _MAX_WAITING)
        decode = config.decode
        self._delivery = Delivery(
            self._scheduler,
            self._engine.limits,
            decode.handoff_bytes,
            decode.prompt_tokens,
            decode.kv_reserve_tokens,
            config.router.lost_s,
        )
        self._delivery.on_message(self._process, directory, (), self._clock())
        self._membership.lonely_s = config.decode.lonely_s

    def _inject(self, inject: Inject, now: float) -> None:
        """Between two rounds: what this rank has sent is whole, and it owes nothing."""
        assert self._engine is not None
        if not self._faults.is_new(inject):
            self._say_all(self._faults.said(inject))
        elif inject.action == "slow":
            self._pace.factor = inject.factor
            self._faults.on_slow(inject)
        elif inject.action == "corrupt_heap" and self._has_life:
            self._perform(self._membership.on_distrust(now))
            self._say_all(self._faults.on_corrupted(inject, self._engine.corrupt_heap()))
            self._distrusted_at = self._clock()

    def _say_all(self, words: Sequence[Injected]) -> None:
        self._perform([actions.Tell(word) for word in words])

    def _begin_life(self) -> None:
        if self._engine and not self._has_life:
            with for_the_operator():
                self._engine.begin_life(self._life)
            self._has_life = True

    def _perform(self, wanted: Sequence[Action]) -> None:
        for action in wanted:
            self._perform_one(action)

    def _perform_one(self, action: Action) -> None:
        engine, delivery = self._engine, self._delivery
        assert engine is not None and delivery is not None
        match action:
            case actions.OpenSlot(rank=rank, incarnation=incarnation):
                self._begin_life()
                engine.open_slot(rank)
                delivery.open(rank, incarnation)
            case actions.CloseSlot(was_member=was_member):
                delivery.open(NO_RANK, Incarnation(0))
                if was_member:
                    engine.end_life()
                    self._has_life, self._life = False, self._life + 1
                else:
                    engine.close_slot()
            case actions.PoisonMembers():
                assert engine.group is not None
                engine.group.poison_members()
            case actions.MapHeaps(view=view):
                if engine.map_heaps(view):
                    self._perform(self._membership.on_heaps_mapped(view.epoch, self._clock()))
            case actions.LoadExperts(view=view):
                if num_loads := engine.load_experts(view):
                    log.info("epoch %d: %d experts loaded", view.epoch, num_loads)
            case actions.StageExperts(placement=placement):
                engine.stage(placement)
            case actions.Announce(view=view):
                engine.announce(view)
                self._announced = view.epoch
            case actions.Adopt(view=view, in_band=in_band):
                engine.adopt(view, in_band)
                engine.forget_heaps_except(self._membership.known_views)
                self._rest_until = 0.0
                log.info("epoch %d: ranks %s, %s", view.epoch, list(ranks(view)), view.reason)
            case _:
                self._update_status()
                self._emit([action])

    def _copy_experts(self, now: float) -> None:
        """For the placement that may come next: a slice now, in front of a round, or while there is nothing to do."""
        following = self._membership.next_placement
        if following.is_pending and self._engine and self._engine.copy_experts(now):
            following.on_staged()

    def _look_for_first_headers(self) -> None:
        awaited = self._membership.awaited_headers
        if awaited and self._engine and self._engine.sees_first_headers(*awaited):
            self._perform(self._membership.on_first_headers(awaited[0], self._clock()))

    def _care_for_requests(self, now: float) -> None:
        if self._delivery is None or self._engine is None:
            return
        self._send(self._delivery.on_tick(now))
        preempted = self._delivery.make_room()
        for admission in self._delivery.admit():
            self._engine.write_kv(admission)
        self._send(self._delivery.flush(self._membership.epoch))
        self._send(preempted)  # after their last tokens
        if now >= self._load_at and self._membership.view and (load := self._engine.take_load()):
            self._load_at = now + LOAD_S
            membership = self._membership
            version, passes, seconds = self._membership.view.placement.version, self._num_passes, self._compute_s
            self._num_passes, self._compute_s = 0, 0.0
            self._emit([ExpertLoad(membership.rank, membership.incarnation, version, load, passes, seconds)])

    def _serve(self) -> None:
        """One round, or a part of the rest before it."""
        assert self._engine and self._engine.group and self._delivery and self._scheduler
        membership, now = self._membership, self._clock()
        running = self._scheduler.num_running > 0 and not self._engine.lacks_experts
        has_work = running or (self._all_idle and membership.is_staging)
        if now < self._rest_until and not has_work and not self._woken and not self._engine.group.headers_waiting():
            rest_s = self._rest_until - now
            self._inbox.wait(min(rest_s, _COPY_S) if membership.next_placement.is_pending else rest_s)
            return
        if self._all_idle and has_work and membership.view:
            others = tuple(m.endpoint for m in membership.view.members if m.process != self._process)
            self._emit([actions.WakeMembers(membership.epoch, others)])
        self._woken = self._all_idle = False
        self._round()

    def _round(self) -> None:
        assert self._engine and self._engine.group and self._delivery
        membership, engine, delivery, group = self._membership, self._engine, self._delivery, self._engine.group
        self._pace.resume()
        header, steps = self._header_and_steps()
        self._pace.pause()
        headers = engine.exchange_headers(header, self._must_stop)
        plan = RoundPlan.of(headers) if headers else None
        outputs: list[Computed] | None = None
        if plan:
            self._pace.resume()
            self._num_headers += 1
            self._num_group_rounds = plan.num_rounds
            begun = self._clock()
            outputs = engine.compute(steps) if plan.num_tokens else []
            self._num_passes += plan.num_tokens > 0
            self._compute_s += self._clock() - begun
        now = self._clock()
        if plan is None or outputs is None:
            self.num_void_rounds += 1
            self._pace.take()
            accused = self._accused()
            log.info("epoch %d: round void, %s, accusing %s", membership.epoch, group.void_reason, list(accused))
            self._perform(membership.on_void_round(group.step, accused, now))
            return
        self.num_rounds += 1
        for step, computed in zip(steps, outputs, strict=True):
            if computed.choice is None:
                delivery.advance(step, computed.prompt_logprobs, computed.missed_experts)
            else:
                token, logprob, top = computed.choice
                delivery.commit(step, token, logprob, now, top, computed.prompt_logprobs, computed.missed_experts)
        self._send(delivery.flush(membership.epoch))
        self._note_pace(plan.num_tokens > 0)
        if plan.num_tokens == 0:
            self._all_idle = plan.all_idle
            self._rest_until = now + (self._config.decode.idle_poll_s if plan.all_idle else BARE_ROUND_S)
        self._perform(membership.on_clean_round(plan.next_epoch, now))

    def _header_and_steps(self) -> tuple[RoundHeader, list[Step]]:
        assert self._engine and self._delivery
        membership = self._membership
        if self._announced == membership.epoch:
            self._announced = Epoch(0)
            return NEWCOMER_HEADER, []  # says the same as what was announced
        steps = [] if self._engine.lacks_experts else self._delivery.steps()
        idle, num_tokens = not steps and not membership.is_staging, sum(len(step.token_ids) for step in steps)
        return RoundHeader(num_tokens, idle, membership.staged_epoch, num_rounds=self._num_group_rounds), steps

    def _note_pace(self, computed: bool) -> None:
        """Only of clean rounds: in a void one this rank may have stopped anywhere."""
        self._pace.pause()
        own_s, work_s = self._pace.take()
        if computed:
            self._num_compute_rounds += 1
            self._own_us += round(1e6 * own_s)
        self._say_all(self._faults.on_round(own_s, work_s))

    def _accused(self) -> tuple[int, ...]:
        """Who missed an own deadline. The wait for headers has none: there it is who was missing when a roll call, or
        the poison of one who has a deadline, ended it. Otherwise a path that is broken between rounds would never be
        told of, and the rank that is ahead of both its ends would be the only one to miss anybody."""
        group = self._engine.group if self._engine else None
        if group is None:
            return ()
        return group.unheard or tuple(group.observation_mask().nonzero().flatten().tolist())

    def _send(self, sends: Sequence[Send]) -> None:
        if sends:
            self._emit(list(sends))

    def _update_status(self) -> None:
        self.status = RankStatus.of(self._membership, self._life)

    @property
    def progress(self) -> int:
        """Grows with every header round, every exchange of a layer and every expert loaded."""
        return self._num_headers + (self._engine.progress if self._engine else 0)

    @property
    def waits_for(self) -> tuple[int, ...]:
        group = self._engine.group if self._engine else None
        return group.missing if group else ()

    def counters(self) -> dict[str, int]:
        """What GET /cluster shows. From any thread."""
        scheduler, delivery = self._scheduler, self._delivery
        if scheduler is None or delivery is None:
            return {}
        loaded = self._engine.loaded if self._engine else None
        return (loaded.counters() if loaded else {}) | {
            "running": scheduler.num_running,
            "waiting": scheduler.num_waiting,
            "kv_blocks_used": scheduler.blocks.num_used,
            "kv_blocks": scheduler.blocks.num_blocks,
            "rounds": self.num_rounds,
            "group_rounds": self._num_group_rounds,
            "compute_rounds": self._num_compute_rounds,
            "own_us": self._own_us,
            "slow_percent": self._faults.num_slow_percent,
            "distrusted": int(self._clock() > self._distrusted_at + _DECLARE_S),
            "void_rounds": self.num_void_rounds,
            "prompt_tokens_computed": delivery.num_prompt_tokens,
            "preempted": delivery.num_preempted,
            "tokens_committed": delivery.num_committed,
            "stale_messages": delivery.num_stale + self._membership.num_stale,
            **(self._engine.staging_counters() if self._engine else {}),
        }
