"""The lives of a rank's memory: does to heap, slot and experts what the membership core has decided.

begin (a heap, no slot yet) --OpenSlot, Adopt, ...--> member --CloseSlot--> ended; the next life has another heap
"""

import logging
from collections.abc import Callable, Sequence

from common.ids import NO_RANK, Incarnation
from common.view import ranks
from services.decode import actions
from services.decode.actions import Action, OwnAction
from services.decode.delivery import Delivery
from services.decode.membership import Membership
from services.decode.rank_engine import RankEngine
from services.decode.rounds import Rounds

log = logging.getLogger("regrow.decode")


class RankLife:
    """``number`` counts the lives before this one; ``has_begun``: there is a heap."""

    def __init__(
        self,
        membership: Membership,
        engine: RankEngine,
        delivery: Delivery,
        rounds: Rounds,
        clock: Callable[[], float],
    ) -> None:
        self._membership, self._engine, self._delivery, self._rounds = membership, engine, delivery, rounds
        self._clock = clock
        self.number, self.has_begun = 0, False

    def begin(self) -> None:
        """If it has not. Raises ValueError of one line when the heap cannot be made."""
        if not self.has_begun:
            self._engine.begin_life(self.number)
            self.has_begun = True

    def perform(self, action: OwnAction) -> Sequence[Action]:
        """Returns what the core wants next because this is done. A slot is opened only in a life that has begun."""
        engine, delivery = self._engine, self._delivery
        match action:
            case actions.OpenSlot(rank=rank, incarnation=incarnation):
                engine.open_slot(rank)
                delivery.open(rank, incarnation)
            case actions.CloseSlot(was_member=was_member):
                delivery.open(NO_RANK, Incarnation(0))
                if was_member:
                    engine.end_life()
                    self.has_begun, self.number = False, self.number + 1
                else:
                    engine.close_slot()
            case actions.PoisonMembers():
                self._rounds.group.poison_members()
            case actions.MapHeaps(view=view):
                if engine.map_heaps(view):
                    return self._membership.on_heaps_mapped(view.epoch, self._clock())
            case actions.LoadExperts(view=view):
                if num_loads := engine.load_experts(view):
                    log.info("epoch %d: %d experts loaded", view.epoch, num_loads)
            case actions.StageExperts(placement=placement):
                engine.stage(placement)
            case actions.Announce(view=view):
                engine.announce(view)
                self._rounds.on_announced(view.epoch)
            case actions.Adopt(view=view, in_band=in_band):
                engine.adopt(view, in_band)
                engine.forget_heaps_except(self._membership.known_views)
                self._rounds.on_adopted()
                log.info("epoch %d: ranks %s, %s", view.epoch, list(ranks(view)), view.reason)
        return ()
