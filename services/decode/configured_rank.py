"""What a decode rank consists of once the first welcome has brought the configuration."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.config import ClusterConfig
from common.ids import ProcessId, RequestId
from common.kv_blocks import BlockAllocator
from common.pace import Pace
from kernels.peer_windows import LinkFault
from services.decode.batch_scheduler import BatchScheduler
from services.decode.delivery import Delivery
from services.decode.membership import Membership
from services.decode.rank_engine import RankEngine
from services.decode.rank_life import RankLife
from services.decode.rounds import Rounds

_MAX_WAITING = 64


@dataclass(frozen=True, slots=True)
class ConfiguredRank:
    """The parts are made once and hold for the life of the process."""

    engine: RankEngine
    scheduler: BatchScheduler[RequestId]
    delivery: Delivery
    rounds: Rounds
    life: RankLife

    @classmethod
    def of(
        cls,
        config: ClusterConfig,
        heap_dir: Path,
        process: ProcessId,
        membership: Membership,
        pace: Pace,
        link_fault: LinkFault,
        while_waiting: Callable[[], None],
        clock: Callable[[], float],
    ) -> "ConfiguredRank":
        """``while_waiting``: see `RankEngine`. Raises ValueError of one line for a checkpoint that cannot be used."""
        decode = config.decode
        engine = RankEngine(config, heap_dir, process, pace, link_fault, while_waiting)
        blocks: BlockAllocator[RequestId] = BlockAllocator(decode.num_kv_blocks, decode.block_size)
        scheduler = BatchScheduler(blocks, decode.max_batch, _MAX_WAITING)
        delivery = Delivery(
            scheduler,
            engine.limits,
            decode.handoff_bytes,
            decode.prompt_tokens,
            decode.kv_reserve_tokens,
            config.router.lost_s,
            decode.delivery_interval_s,
        )
        rounds = Rounds(membership, engine, delivery, scheduler, pace, clock, decode.idle_poll_s)
        return cls(engine, scheduler, delivery, rounds, RankLife(membership, engine, delivery, rounds, clock))

    @property
    def progress(self) -> int:
        """Grows with every header round, every exchange of a layer and every expert loaded. From any thread."""
        return self.rounds.num_headers + self.engine.progress

    @property
    def waits_for(self) -> tuple[int, ...]:
        """From any thread."""
        group = self.engine.group
        return group.missing if group else ()

    def counters(self) -> dict[str, int]:
        """From any thread."""
        loaded, blocks = self.engine.loaded, self.scheduler.blocks
        return {
            **(loaded.counters() if loaded else {}),
            "running": self.scheduler.num_running,
            "waiting": self.scheduler.num_waiting,
            "kv_blocks_used": blocks.num_used,
            "kv_blocks": blocks.num_blocks,
            **self.rounds.counters(),
            "prompt_tokens_computed": self.delivery.num_prompt_tokens,
            "preempted": self.delivery.num_preempted,
            "tokens_committed": self.delivery.num_committed,
            **self.engine.staging_counters(),
        }
