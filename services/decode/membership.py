"""A rank's place in the group: which slot, which epoch, and what comes next. Pure; PROTOCOL sections 2 to 5.

    STANDBY --monitor: a slot--> JOINING --all first headers of e' are there--> SERVING
    JOINING --monitor: no slot--> STANDBY
    SERVING --round void, roll call, newer view--> VOID --newer view adopted--> SERVING
    SERVING, VOID --view without me, lonely--> STANDBY
    SERVING, VOID --formation begins anew--> JOINING
    any --stop--> STOPPED

Invariants: the epoch never falls; a view is adopted only if it holds this process under this rank and incarnation;
in VOID nothing is committed; a prepared view is entered only after a clean round in which all said ready for it.

The round is the unit: events are given between rounds, by one thread. What arrives during a round may end its waits,
but is an event only afterwards; so what a header says (ready for e') still holds when its round ends.
"""

from common.ids import NO_RANK, Epoch, Incarnation, ProcessId, Rank
from common.messages import RollAnswer, SlotLeft, StagePlacement, View, VoidReport
from common.state_machine import StateMachine
from common.view import member_of, newcomers, ranks
from services.decode.actions import (
    Action,
    Adopt,
    Announce,
    CloseSlot,
    ForwardView,
    LoadExperts,
    MapHeaps,
    OpenSlot,
    PoisonMembers,
    SayHello,
    StageExperts,
    Tell,
)
from services.decode.loneliness import Loneliness
from services.decode.next_placement import NextPlacement
from services.decode.preparation import Preparation
from services.decode.rank_state import MOVES, RankState

RETRY_S = 0.02  # a heap that could not be mapped is tried again


class Membership:
    """Attributes may be read from other threads; events come from one."""

    def __init__(self, process: ProcessId, lonely_s: float, now: float) -> None:
        self._process, self.loneliness = process, Loneliness(lonely_s, now)
        self._machine = StateMachine(f"rank of {process}", MOVES, RankState.STANDBY, now)
        self.rank: Rank = NO_RANK
        self.incarnation = Incarnation(0)
        self.view: View | None = None
        self.base_epoch = Epoch(0)  # the epoch that the present one was entered from in band, or itself
        self.term = 0
        self.out_of = Epoch(0)
        self.masked = False  # a standby that gets no slot, by an operator's wish
        self.is_distrusted = False  # nothing in this process's memory counts any more: it waits for its end
        self.num_stale = 0
        self._next: View | None = None
        self._preparation: Preparation | None = None
        self.next_placement = NextPlacement()
        # Slots given back are never taken again, whatever older words say: a process that was stopped may find the
        # Prepare of a slot behind the view that took it away, and by then another writes as that slot.
        self._last_incarnation = Incarnation(0)
        self._retry_at = 0.0

    @property
    def state(self) -> RankState:
        return self._machine.state

    @property
    def epoch(self) -> Epoch:
        return self.view.epoch if self.view else Epoch(0)

    @property
    def is_member(self) -> bool:
        return self.state in (RankState.SERVING, RankState.VOID)

    @property
    def is_staging(self) -> bool:
        """A prepared view ends idleness until it is in force or dropped."""
        return self._preparation is not None

    @property
    def staged_epoch(self) -> Epoch:
        """What the next header says: the prepared view that this member is ready for."""
        ready = self._preparation is not None and self._preparation.ready
        return self._preparation.view.epoch if ready and self._preparation else Epoch(0)

    @property
    def awaited_headers(self) -> tuple[Epoch, tuple[Rank, ...]] | None:
        """Whose first header of which epoch must be seen before `on_first_headers`; None also while experts lack."""
        preparation = self._preparation
        if preparation is None or not preparation.mapped or preparation.ready:
            return None
        if self._is_migration(preparation.view) and self.next_placement.is_pending:
            return None
        if self.state is RankState.JOINING:
            return preparation.view.epoch, ranks(preparation.view)
        return preparation.view.epoch, tuple(m.rank for m in newcomers(preparation.view, self.view))

    @property
    def known_views(self) -> tuple[View, ...]:
        """Views whose members' heaps and endpoints are or may be needed."""
        prepared = self._preparation.view if self._preparation else None
        return tuple(view for view in (self.view, self._next, prepared) if view is not None)

    def story(self) -> list[str]:
        return self._machine.story()

    def on_sign_of_monitor(self, now: float) -> None:
        self.loneliness.on_sign(now)

    def is_lonely(self, now: float) -> bool:
        """Neither the monitor nor a header round for too long (PROTOCOL 5.1). To be asked often, in waits too."""
        return self.loneliness.look(now) and self.is_member

    def on_term(self, term: int) -> None:
        """A monitor of a new term knows nothing of what the last one prepared. A newcomer that has written its first
        header stays bound to it: members may be in that epoch already."""
        if term <= self.term:
            return
        self.term = term
        preparation = self._preparation
        if (
            preparation
            and preparation.view.term < term
            and not (self.state is RankState.JOINING and preparation.mapped)
        ):
            self._drop_preparation()

    def on_distrust(self, now: float) -> list[Action]:
        """The memory of this process must not be trusted. It leaves the round, and no word brings it back in: the
        monitor, which reads it in the heartbeats, has the process ended."""
        self.is_distrusted = True
        self._preparation = self._next = None
        if self.state is not RankState.SERVING:
            return []
        self._machine.move(RankState.VOID, now, "its memory is not trusted")
        return [PoisonMembers()]

    def on_welcome(
        self, rank: Rank, incarnation: Incarnation, view: View | None, now: float, masked: bool = False
    ) -> list[Action]:
        actions: list[Action] = []
        if self.is_distrusted:
            return actions
        self.masked = masked
        if self.state is RankState.STANDBY and rank != NO_RANK:
            actions = self._take_slot(rank, incarnation, now) if incarnation > self._last_incarnation else []
        elif self.state is RankState.JOINING and (rank, incarnation) != (self.rank, self.incarnation):
            if rank == NO_RANK:
                self._drop_preparation()
                self._next = None
                self._machine.move(RankState.STANDBY, now, "slot withdrawn")
                self.rank, self.incarnation = NO_RANK, Incarnation(0)
                actions = [CloseSlot(was_member=False)]
            elif incarnation > self._last_incarnation:
                actions = self._take_slot(rank, incarnation, now)
        return actions + (self.on_view(view, now) if view else [])

    def on_prepare(self, view: View, base_epoch: Epoch, now: float) -> list[Action]:
        self.on_term(view.term)
        me = member_of(view, self._process)
        newest = max(self.epoch, self.out_of, self._preparation.view.epoch if self._preparation else 0)
        if (
            me is None
            or self.is_distrusted
            or view.epoch <= newest
            or self._next is not None
            or self.state is RankState.STOPPED
        ):
            self.num_stale += view.epoch < newest
            return []
        actions: list[Action] = []
        if self.is_member:
            if (me.rank, me.incarnation) != (self.rank, self.incarnation):
                return []
            if base_epoch == 0:
                actions = self._form_anew(now)
            elif base_epoch != self.epoch or self.state is not RankState.SERVING:
                return []
        elif (me.rank, me.incarnation) != (self.rank, self.incarnation):
            if me.incarnation <= self._last_incarnation:
                self.num_stale += 1
                return []
            actions = self._take_slot(me.rank, me.incarnation, now)
        self._drop_preparation()
        self._preparation = Preparation(view, base_epoch)
        self._retry_at = now + RETRY_S
        if self._is_migration(view) and self.next_placement.want(view.placement):
            actions.append(StageExperts(view.placement))
        return [*actions, MapHeaps(view)]

    def on_stage(self, message: StagePlacement) -> list[Action]:
        """Binds nobody, but a prepared view does: what that needs must stay."""
        self.on_term(message.term)
        if self.state is not RankState.SERVING or self._preparation is not None or self.view is None:
            return []
        if not self.next_placement.on_stage(message, self.view):
            return []
        return [StageExperts(message.placement)]

    def on_view(self, view: View, now: float) -> list[Action]:
        self.on_term(view.term)
        newest = max(self.epoch, self._next.epoch if self._next else 0)
        if view.epoch <= newest or self.is_distrusted or self.state in (RankState.STANDBY, RankState.STOPPED):
            self.num_stale += view.epoch < newest
            return []
        holds_me = self._holds_me(view)
        if self.state is RankState.JOINING:
            if self._preparation and self._preparation.view.epoch <= view.epoch:
                if not holds_me:
                    self.out_of = max(self.out_of, self._preparation.view.epoch)
                self._preparation = None
            if not holds_me:
                return []
        elif not holds_me:
            return self._leave(now, f"view {view.epoch} without this rank", view.epoch)
        else:
            self._preparation = None
        actions: list[Action] = []
        if self.state is RankState.SERVING:
            self._machine.move(RankState.VOID, now, f"view {view.epoch}")
            actions.append(PoisonMembers())
        endpoints = tuple(member.endpoint for member in view.members if member.process != self._process)
        self._next = view
        self._retry_at = now + RETRY_S
        return [*actions, ForwardView(view, endpoints), MapHeaps(view)]

    def on_heaps_mapped(self, epoch: Epoch, now: float) -> list[Action]:
        """All heaps of that view's members are mapped here."""
        if self._next is not None:
            if self._next.epoch != epoch:
                return []
            view, self._next = self._next, None
            return self._enter(view, view.epoch, now, in_band=False)
        preparation = self._preparation
        if preparation is None or preparation.view.epoch != epoch or preparation.mapped:
            return []
        preparation.mapped = True
        if self.state is RankState.JOINING:
            return [LoadExperts(preparation.view), Announce(preparation.view)]
        return []

    def on_first_headers(self, epoch: Epoch, now: float) -> list[Action]:
        """All `awaited_headers` of that epoch have been seen."""
        if self.awaited_headers is None or self.awaited_headers[0] != epoch:
            return []
        assert self._preparation is not None
        if self.state is not RankState.JOINING:
            self._preparation.ready = True
            return []
        view, base_epoch = self._preparation.view, self._preparation.base_epoch
        self._preparation = None
        return self._enter(view, base_epoch, now, in_band=True)

    def on_clean_round(self, next_epoch: Epoch, now: float) -> list[Action]:
        """``next_epoch``: all headers of the round said ready for it; 0 = they did not."""
        assert self.state is RankState.SERVING, f"a clean round while {self.state.value}"
        self.loneliness.on_sign(now)
        preparation = self._preparation
        if not next_epoch or preparation is None:
            return []
        assert preparation.view.epoch == next_epoch and preparation.ready
        self._preparation = None
        return self._enter(preparation.view, self.epoch, now, in_band=True)

    def on_void_round(self, step: int, accused: tuple[int, ...], now: float) -> list[Action]:
        assert self.state is RankState.SERVING, f"a round while {self.state.value}"
        self._machine.move(RankState.VOID, now, f"round void, accusing {list(accused)}")
        self._preparation = None  # no switch in band any more: the next epoch comes as a view
        return [Tell(VoidReport(self._process, self.rank, self.incarnation, self.epoch, step, accused))]

    def counts_roll_call(self, epoch: Epoch) -> bool:
        """Whether a roll call of ``epoch`` concerns this rank now. One of the epoch that it has left in band does: the
        others, still there, will answer and not follow."""
        return self.is_member and not self.is_distrusted and epoch >= self.base_epoch

    def on_roll_call(self, epoch: Epoch, accused: tuple[int, ...], now: float) -> list[Action]:
        if not self.counts_roll_call(epoch):
            self.num_stale += 1
            return []
        assert self.view is not None
        actions: list[Action] = []
        if self.state is RankState.SERVING:
            self._machine.move(RankState.VOID, now, f"roll call of {epoch}")
            self._preparation = None
            actions.append(PoisonMembers())
        version = self.view.placement.version
        answer = RollAnswer(self._process, self.rank, self.incarnation, self.epoch, version, accused)
        return [*actions, Tell(answer)]

    def on_tick(self, now: float) -> list[Action]:
        if self.is_lonely(now):
            return self._leave(now, "neither monitor nor members heard", self.epoch)
        if now < self._retry_at:
            return []
        self._retry_at = now + RETRY_S
        if self._next is not None:
            return [MapHeaps(self._next)]
        if self._preparation is not None and not self._preparation.mapped:
            return [MapHeaps(self._preparation.view)]
        return []

    def on_stop(self, now: float) -> list[Action]:
        """The process is asked to end."""
        if self.state is RankState.STOPPED:
            return []
        actions: list[Action] = []
        if self.is_member:
            actions = self._leave(now, "stop", self.epoch)[:-1]  # no Hello after it
        elif self.state is RankState.JOINING:
            actions = [CloseSlot(was_member=False)]
        self._machine.move(RankState.STOPPED, now, "stop")
        return actions

    def _is_migration(self, view: View) -> bool:
        """A prepared view in which nothing but the placement is new."""
        return self.is_member and self.view is not None and not newcomers(view, self.view)

    def _holds_me(self, view: View) -> bool:
        me = member_of(view, self._process)
        return me is not None and (me.rank, me.incarnation) == (self.rank, self.incarnation)

    def _take_slot(self, rank: Rank, incarnation: Incarnation, now: float) -> list[Action]:
        self._drop_preparation()
        self._next = None  # it held this process in another slot
        if self.state is RankState.STANDBY:
            self._machine.move(RankState.JOINING, now, f"slot {rank} incarnation {incarnation}")
        self.rank, self.incarnation = rank, incarnation
        self._last_incarnation = incarnation
        return [OpenSlot(rank, incarnation)]

    def _enter(self, view: View, base_epoch: Epoch, now: float, in_band: bool) -> list[Action]:
        assert view.epoch > self.epoch and self._holds_me(view)
        if self.state is not RankState.SERVING:
            self._machine.move(RankState.SERVING, now, f"epoch {view.epoch}")
        # A view that was formed grows from no epoch: roll calls of a group before it are none of its business.
        self.view, self.base_epoch = view, base_epoch or view.epoch
        if self._next and self._next.epoch <= view.epoch:
            self._next = None  # a newcomer's, whose heaps were not all there yet
        self.next_placement.forget()
        self.loneliness.on_sign(now)
        # In band too: a join may repair orphans into slots of old members. Not earlier: until the round has ended, the
        # others may send rows for what a slot held before.
        return [LoadExperts(view), Adopt(view, in_band)]

    def _drop_preparation(self) -> None:
        if self._preparation is not None and self.state is RankState.JOINING:
            self.out_of = max(self.out_of, self._preparation.view.epoch)
        self._preparation = None

    def _form_anew(self, now: float) -> list[Action]:
        """The first view never came into force: somebody died while it was entered, and there is no older view."""
        if self.state is RankState.SERVING:
            self._machine.move(RankState.VOID, now, "formation begins anew")
        self._machine.move(RankState.JOINING, now, "formation begins anew")
        self.out_of = max(self.out_of, self.epoch)
        self.view, self.base_epoch = None, Epoch(0)
        self.next_placement.forget()
        return [PoisonMembers()]

    def _leave(self, now: float, cause: str, epoch: Epoch) -> list[Action]:
        left = SlotLeft(self._process, self.rank, self.incarnation, epoch)
        self._machine.move(RankState.STANDBY, now, cause)
        self.rank, self.incarnation = NO_RANK, Incarnation(0)
        self.view, self.base_epoch, self.out_of = None, Epoch(0), Epoch(0)
        self._next, self._preparation = None, None
        self.next_placement.forget()
        return [CloseSlot(was_member=True), Tell(left), SayHello()]
