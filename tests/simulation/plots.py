"""What a story may be about. The plain one draws from everything; the others make a coincidence likely that it hardly
ever meets, and are told by ``python -m tests.simulation.run SEED --plot NAME``.

Each is a story of its own, drawn like the plain one otherwise, so that seeds of plain stories keep their meaning.
"""

from dataclasses import dataclass

from msgspec.structs import replace

from common.config import ClusterConfig


@dataclass(frozen=True, slots=True)
class Plot:
    """``faults``: names of `Faults` methods; only these happen, empty: all. ``has_standby``: more ranks run than are
    wanted. ``num_routers``: 0 is drawn."""

    faults: tuple[str, ...] = ()
    has_standby: bool = False
    num_routers: int = 0
    prefill_wait_s: float = 0.0  # other than the default
    is_scarce: bool = False  # two ranks without redundant experts, and leave to go on without some

    def configured(self, config: ClusterConfig) -> ClusterConfig:
        if self.prefill_wait_s:
            config = replace(config, router=replace(config.router, prefill_wait_s=self.prefill_wait_s))
        if self.is_scarce:
            decode = replace(
                config.decode, num_ranks=2, max_ranks=3, num_redundant_experts=0, allow_missing_experts=True
            )
            config = replace(config, decode=decode)
        return config


PLOTS = {
    "": Plot(),
    # A rank stands still, nobody can fence it, somebody waits for its slot, and it wakes up.
    "zombie": Plot(("zombie", "stop rank", "stop rank at a step"), has_standby=True),
    # Rounds end at their deadline, with nobody or the wrong one to blame.
    "stops": Plot(("stop rank", "stop rank at a step", "hang stream", "slow rank", "slow rank")),
    "paths": Plot(("break path", "break path", "cut data link", "stop rank at a step")),
    # What is broken stays so, whoever comes back.
    "cables": Plot(("break cable", "break cable", "kill rank"), has_standby=True),
    # Ranks die while others come.
    "joins": Plot(("kill rank", "kill rank", "kill rank at a step", "mask", "scale")),
    # Whoever judges by time has slept.
    "monitor": Plot(("stop monitor", "stop everything", "kill monitor", "kill rank")),
    # Routers die, stand still, and are replaced under load.
    "routers": Plot(("kill router", "stop router", "replace router", "replace router"), num_routers=2),
    # No prefill worker is left for a while: ranks compute prompts in their rounds, and die in the middle of them.
    "prompts": Plot(("kill all prefill", "kill rank", "kill rank at a step"), prefill_wait_s=0.05),
    # Experts without a copy, and answers that lack them.
    "scarce": Plot(("kill rank", "kill rank at a step", "stop rank", "mask"), is_scarce=True),
    # What ranks do to themselves because an event asks for it.
    "self": Plot(("corrupt heap", "corrupt heap", "drop network", "kill rank")),
}
