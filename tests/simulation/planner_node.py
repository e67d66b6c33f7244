"""A planner that wishes for placements at random, good and bad ones: what matters is only that experts move.

It knows the view that the bus brought, as the real one does. Its wishes are lost, doubled and late like all words.
"""

from random import Random

from common.ids import ProcessId
from common.messages import Message, PlacementPlan, View
from common.placement import EMPTY, PhysicalToLogical
from common.view import ranks
from tests.simulation.symbolic_model import NUM_EXPERTS
from tests.simulation.world import MONITOR, Frames, Node, World

_REPEAT_S = 0.3


class PlannerNode(Node):
    kind = "planner"

    def __init__(self, world: World, random: Random, until_s: float) -> None:
        super().__init__(world, "planner", ProcessId("planner"))
        self._random, self._until_s = random, until_s
        self._view: View | None = None
        self._wish: PlacementPlan | None = None
        self.later(random.uniform(0.0, 2.0), self._wish_anew)
        self.later(_REPEAT_S, self._repeat)

    def receive(self, peer: ProcessId, message: Message, frames: Frames) -> None:
        if isinstance(message, View) and (self._view is None or message.epoch > self._view.epoch):
            self._view = message

    def _wish_anew(self) -> None:
        view = self._view
        if view is not None and view.members:
            rows = self._changed(view)
            self._wish = PlacementPlan(self.process, view.placement.version, rows)
            self.send(MONITOR, self._wish)
        if self.world.now < self._until_s:
            self.later(self._random.uniform(0.1, 1.5), self._wish_anew)

    def _repeat(self) -> None:
        if self._wish is not None:
            self.send(MONITOR, self._wish)
        if self.world.now < self._until_s:
            self.later(_REPEAT_S, self._repeat)

    def _changed(self, view: View) -> PhysicalToLogical:
        """Some slots of members hold another expert. Now and then this takes the last copy of one away, or asks for
        more than there is memory for: such a wish has to be refused."""
        random = self._random
        layers = [[list(row) for row in rows] for rows in view.placement.physical_to_logical]
        for _ in range(random.randint(1, 5)):
            rows = random.choice(layers)
            row = rows[random.choice(ranks(view))]
            lacking = [expert for expert in range(NUM_EXPERTS) if expert not in row]
            local = random.randrange(len(row))
            held = sum(row[local] in rows[rank] for rank in ranks(view))
            if lacking and (row[local] == EMPTY or held > 1 or random.random() < 0.1):
                row[local] = random.choice(lacking)
            random.shuffle(row)
        return tuple(tuple(tuple(row) for row in rows) for rows in layers)
