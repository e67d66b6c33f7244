"""The thread that makes rounds. It alone runs the cores, between rounds; the event loop only brings and takes messages.

    take the inbox -> let views and heaps make progress -> headers -> forward pass -> read status -> commit -> send

What must not wait for the end of a round (a newer view, a roll call, loneliness, the end of the process) ends its
waits: the header wait asks `interrupts`, the others are ended by this rank's own poison word, written by the event
loop's thread. Either way the round is void or was complete already, and what ended it is an event after it, as any
other.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from common.config import ClusterConfig
from common.ids import Epoch, ProcessId
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
from services.decode import actions
from services.decode.actions import Action, OwnAction, Send
from services.decode.configured_rank import ConfiguredRank
from services.decode.cut_links import CutLinks
from services.decode.interrupts import Interrupts
from services.decode.membership import Membership
from services.decode.rank_state import RankState
from services.decode.rank_status import RankStatus
from services.decode.stream_inbox import Inbox, Incoming

LOAD_S = 1.0
_STANDBY_S = 0.05
_JOINING_S = 0.002
_COPY_S = 0.002  # between slices of experts while there are no rounds
_DECLARE_S = 0.3  # the word that says what was done to the memory goes first; heartbeats, in case it is lost

log = logging.getLogger("regrow.decode")


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
        self._rank: ConfiguredRank | None = None
        self._interrupts = Interrupts(self._membership)
        self._misses: tuple[int, ...] = ()
        self._words_seen = 0
        self._load_at = 0.0
        self._distrusted_at = float("inf")
        self.status = RankStatus()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Asks the stream to leave the group and end; returns at once."""
        self._interrupts.is_stopping = True
        self._interrupt(self._membership.epoch)

    def join(self, timeout_s: float) -> bool:
        """Whether the thread has ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def deliver(self, peer: ProcessId, message: Message, frames: Sequence[memoryview] = ()) -> None:
        """From the event loop. Ends the waits of a round that has become pointless, in milliseconds."""
        self._inbox.put(Incoming(peer, message, frames))
        if (epoch := self._interrupts.on_message(message)) is not None:
            self._interrupt(epoch)

    def _interrupt(self, epoch: Epoch) -> None:
        """Ends waits in this epoch and earlier ones."""
        group = self._rank.engine.group if self._rank else None
        if group is not None and epoch > 0:
            group.poison_self(epoch)
        self._inbox.put(None)

    def _must_stop(self) -> bool:
        now = self._clock()
        self._note_monitor(now)
        return self._interrupts.must_stop(now)

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
                if self._rank:
                    self._rank.engine.end_life()
            except Exception as caught:
                error = error or caught
            self._on_end(error)

    def _turn(self) -> None:
        for item in self._inbox.take():
            self._receive(item)
        now = self._clock()
        if self._interrupts.is_stopping:
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
        membership, now, message, rank = self._membership, self._clock(), item.message, self._rank
        match message:
            case Welcome():
                self._configure(message.config, message.directory)
                slot = message.rank, message.incarnation
                self._perform(membership.on_welcome(*slot, message.view, now, message.masked))
            case Prepare() if rank:
                self._perform(membership.on_prepare(message.view, message.base_epoch, now))
            case StagePlacement():
                self._perform(membership.on_stage(message))
            case View():
                self._perform(membership.on_view(message, now))
            case RollCall():
                membership.on_term(message.term)
                accused = rank.rounds.accused() if rank else ()
                self._perform(membership.on_roll_call(message.epoch, accused, now))
            case Inject() if rank:
                self._inject(rank, message, now)
            case Wake() if rank:
                rank.rounds.on_wake(message.epoch)
            case Have() if rank is None:
                self._send([Send(item.peer, Unknown(message.request, message.attempt))])
            case _ if rank:
                self._send(rank.delivery.on_message(item.peer, message, item.frames, now))
            case _:
                pass

    def _configure(self, config: ClusterConfig, directory: Directory) -> None:
        """The first welcome's configuration holds for the life of the process; its directory is as good as any."""
        if self._rank is None:
            membership, pace, clock = self._membership, self._pace, self._clock
            with for_the_operator():
                self._rank = ConfiguredRank.of(
                    config, self._heap_dir, self._process, membership, pace, self._link_fault, self._tell_routers, clock
                )
            membership.loneliness.limit_s = config.decode.lonely_s
        self._rank.delivery.on_message(self._process, directory, (), self._clock())

    def _inject(self, rank: ConfiguredRank, inject: Inject, now: float) -> None:
        """Between two rounds: what this rank has sent is whole, and it owes nothing."""
        if not self._faults.is_new(inject):
            self._say_all(self._faults.said(inject))
        elif inject.action == "slow":
            self._pace.factor = inject.factor
            self._faults.on_slow(inject)
        elif inject.action == "corrupt_heap" and rank.life.has_begun:
            self._perform(self._membership.on_distrust(now))
            self._say_all(self._faults.on_corrupted(inject, rank.engine.corrupt_heap()))
            self._distrusted_at = self._clock()

    def _say_all(self, words: Sequence[Injected]) -> None:
        self._perform([actions.Tell(word) for word in words])

    def _begin_life(self) -> None:
        if self._rank:
            with for_the_operator():
                self._rank.life.begin()

    def _perform(self, wanted: Sequence[Action]) -> None:
        for action in wanted:
            assert self._rank is not None
            if isinstance(action, actions.OpenSlot):
                self._begin_life()
            if isinstance(action, actions.LoadExperts | actions.CloseSlot):
                self._tell_all()  # it may take seconds, or the requests end with the slot
            if isinstance(action, OwnAction):
                self._perform(self._rank.life.perform(action))
            else:
                self._update_status()
                self._emit([action])

    def _copy_experts(self, now: float) -> None:
        """For the placement that may come next: a slice now, in front of a round, or while there is nothing to do."""
        following = self._membership.next_placement
        if not following.is_pending or self._rank is None:
            return
        if self._rank.engine.copies_at_once:
            self._tell_all()
        if self._rank.engine.copy_experts(now):
            following.on_staged()

    def _look_for_first_headers(self) -> None:
        awaited = self._membership.awaited_headers
        self._misses = self._rank.engine.missing_first_headers(*awaited) if awaited and self._rank else ()
        if awaited and self._rank and not self._misses:
            self._perform(self._membership.on_first_headers(awaited[0], self._clock()))

    def _care_for_requests(self, now: float) -> None:
        if self._rank is None:
            return
        engine, delivery, membership, view = (
            self._rank.engine,
            self._rank.delivery,
            self._membership,
            self._membership.view,
        )
        self._send(delivery.on_tick(now))
        preempted = delivery.make_room()
        for admission in delivery.admit():
            engine.write_kv(admission)
        self._tell_routers()
        self._send(preempted)  # after their last tokens
        if now >= self._load_at and (view := membership.view) and (load := engine.take_load()):
            self._load_at = now + LOAD_S
            passes, seconds = self._rank.rounds.take_passes()
            slot, version = (membership.rank, membership.incarnation), view.placement.version
            told = ExpertLoad(*slot, version, load.tokens, passes, seconds, view.epoch, load.served, load.served_passes)
            self._emit([told])

    def _serve(self) -> None:
        """One round, or a part of the rest before it."""
        assert self._rank is not None
        membership, rounds = self._membership, self._rank.rounds
        now = self._clock()
        if rest_s := rounds.rest_s(now):
            rest_s = min(rest_s, max(0.0, self._rank.delivery.due_at - now))
            self._inbox.wait(min(rest_s, _COPY_S) if membership.next_placement.is_pending else rest_s)
            return
        if rounds.others_rest() and membership.view:
            others = tuple(m.endpoint for m in membership.view.members if m.process != self._process)
            self._emit([actions.WakeMembers(membership.epoch, others)])
        self._round(self._rank)

    def _round(self, rank: ConfiguredRank) -> None:
        membership, rounds, group = self._membership, rank.rounds, rank.rounds.group
        plan = rounds.make(self._must_stop)
        if plan is None:
            accused = rounds.accused()
            log.info("epoch %d: round void, %s, accusing %s", membership.epoch, group.void_reason, list(accused))
            self._perform(membership.on_void_round(group.step, accused, rounds.ended_at))
            return
        self._tell_routers()
        self._say_all(self._faults.on_round(*rounds.take_pace(computed=plan.num_tokens > 0)))
        self._perform(membership.on_clean_round(plan.next_epoch, rounds.ended_at))

    def _tell_routers(self) -> None:
        """What is due: after a round, and while this rank waits for others or has none."""
        if self._rank and (now := self._clock()) >= self._rank.delivery.due_at:
            self._send(self._rank.delivery.flush(self._membership.epoch, now))

    def _tell_all(self) -> None:
        """Before what no round and no wait looks up from: tokens are not to wait behind it."""
        if self._rank:
            self._rank.delivery.hurry()
            self._tell_routers()

    def _send(self, sends: Sequence[Send]) -> None:
        if sends:
            self._emit(list(sends))

    def _update_status(self) -> None:
        self.status = RankStatus.of(self._membership, self._rank.life.number if self._rank else 0, self._misses)

    @property
    def progress(self) -> int:
        """Grows with every header round, every exchange of a layer and every expert loaded."""
        return self._rank.progress if self._rank else 0

    @property
    def waits_for(self) -> tuple[int, ...]:
        return self._rank.waits_for if self._rank else ()

    def counters(self) -> dict[str, int]:
        """What GET /cluster shows. From any thread."""
        if self._rank is None:
            return {}
        return self._rank.counters() | {
            "slow_percent": self._faults.num_slow_percent,
            "distrusted": int(self._clock() > self._distrusted_at + _DECLARE_S),
            "stale_messages": self._rank.delivery.num_stale + self._membership.num_stale,
        }
