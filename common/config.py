"""Configuration: one TOML file, frozen structs, unknown keys are errors that name the key.

The monitor's copy is the one in force: it reaches every other process inside its Welcome, so that no two processes of a
cluster can disagree about a size or a deadline. Only paths, addresses and ports are given to a process directly.
"""

import tomllib
from enum import StrEnum
from pathlib import Path
from typing import Literal

import msgspec

EMBEDDED_MODEL = Path(__file__).resolve().parent.parent / "models" / "abacus"

PolicyName = Literal["keep", "balanced", "balance_only", "coverage_first"]


class ReplicaPolicy(StrEnum):
    """Which live copies of an expert the tokens of one rank go to.

    LOCAL_FIRST: its own copy if it has one, else all by hash. HASH: all by hash. REMOTE_FIRST: all but its own by hash;
    moves load away from a rank that is behind. STATIC: one copy, such that the ranks divide evenly over the copies.
    GATHER: one copy, the same for all ranks, such that each rank serves about as many experts: the rows of an expert
    come together, which saves work where a few rows cost as much as many; but copies then even out nothing.
    """

    LOCAL_FIRST = "local_first"
    HASH = "hash"
    REMOTE_FIRST = "remote_first"
    STATIC = "static"
    GATHER = "gather"


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all sections."""


class ModelConfig(_Section, frozen=True):
    """``[model]``"""

    path: str = str(EMBEDDED_MODEL)  # Hugging Face directory
    name: str = ""  # name in the API; empty = name of the directory


class RouterConfig(_Section, frozen=True):
    """``[router]``"""

    num_workers: int = 1  # routers that share the HTTP port of one machine
    max_queued: int = 256  # requests in flight per router; beyond: 429
    max_body_bytes: int = 4 << 20
    request_deadline_s: float = 300.0
    no_news_s: float = 1.0  # then ask for what is missing
    max_asks: int = 3  # unanswered asks, then place again
    prefill_wait_s: float = 1.0  # without a prefill worker for this long: decode ranks compute prompts themselves
    rebalance_difference: int = 2  # move running requests to a new rank while loads differ by more than this
    drain_s: float = 10.0  # finish streams after SIGTERM
    lost_s: float = 10.0  # requests of a router that has been gone for so long are dropped by those who compute them


class PrefillConfig(_Section, frozen=True):
    """``[prefill]``"""

    num_workers: int = 1
    chunk_tokens: int = 256
    num_kv_blocks: int = 1024  # for the prompts that are computed now; the prefix cache has its own
    prefix_cache_bytes: int = 128 << 20  # KV of earlier prompts, for those that begin alike; 0 = off


class DecodeConfig(_Section, frozen=True):
    """``[decode]``"""

    num_ranks: int = 4  # desired size of the group
    num_standbys: int = 0  # processes beyond, started and warm: one takes a lost rank's place without any start
    max_ranks: int = 8  # buffers and tables are sized for this once
    max_batch: int = 32  # requests of one rank that run together
    prompt_tokens: int = 32  # of prompts, that a rank without prefill workers computes in one round, beside the batch
    block_size: int = 16  # tokens per KV block
    num_kv_blocks: int = 1024
    kv_reserve_tokens: int = 64  # room to grow that a request is admitted with; more comes while it runs
    handoff_bytes: int = 1 << 30  # KV that has come from prefill workers for requests without blocks
    num_redundant_experts: int = -1  # -1: three copies of each, so that any two ranks may be lost
    num_staging_experts: int = -1  # memory of a rank for experts on their way in; -1: as many as a layer's slots
    combine: Literal["ordered", "reduced"] = "ordered"  # reduced: fewer bytes, and no promise about exact tokens
    operation_deadline_s: float = 2.0  # of dispatch and combine
    idle_poll_s: float = 0.05
    delivery_interval_s: float = 0.025  # tokens of several rounds leave for a router together; 0 = after every round
    allow_missing_experts: bool = False  # go on without experts that have no live copy, and mark what they lack
    lonely_s: float = 30.0  # neither monitor nor header round for this long: leave the slot


class MonitorConfig(_Section, frozen=True):
    """``[monitor]``"""

    tick_s: float = 0.05
    late_tick_s: float = 0.5  # a tick later than this restarts all timers
    heartbeat_s: float = 0.1
    heartbeat_timeout_s: float = 3.0
    lifeline_suspicion_s: float = 0.05
    roll_call_s: float = 2.0
    adopt_timeout_s: float = 5.0  # a member that does not report a published view by then is removed
    prepare_timeout_s: float = 60.0
    empty_s: float = 20.0  # a rank that is drained or scaled away goes then, even with experts that only it holds
    formation_s: float = 20.0  # first view: wait this long for the desired size
    slow_factor: float = 0.0  # a rank slower than this many times the others is removed; 0 = kept
    slow_for_s: float = 10.0  # after it has been for so long
    planner_wait_s: float = 2.0


class PlannerConfig(_Section, frozen=True):
    """``[planner]``; names as in vLLM where it has the setting."""

    policy: PolicyName = "balanced"  # see services/planner/policies.py
    window_size: int = 1000  # forward passes whose loads count
    step_interval: int = 3000  # forward passes between two decisions
    use_async: bool = True  # copy experts in slices between rounds; False: at once, while the round waits
    log_balancedness: bool = True
    max_moves: int = 64  # experts that one plan may load, over all layers
    max_moves_per_layer: int = 16
    least_gain: float = 0.05  # in balancedness, that a plan must promise
    drift: float = 0.05  # or how far balancedness has fallen since the last plan
    replica_policy: ReplicaPolicy = ReplicaPolicy.HASH  # which copy of an expert a token goes to
    bandwidth_bytes_per_s: float = 64e6  # that copying may take of each rank
    stage_timeout_s: float = 300.0  # a migration that is not copied by then is abandoned
    plan_deadline_s: float = 5.0  # a plan that takes longer is dropped
    init_placement: str = ""  # file of a recorded placement or of recorded loads to start with


class AgentConfig(_Section, frozen=True):
    """``[agent]``"""

    restart_backoff_s: float = 0.1
    restart_backoff_max_s: float = 5.0
    give_up_after: int = 8  # deaths within give_up_window_s
    give_up_window_s: float = 60.0
    stop_s: float = 12.0  # SIGTERM, then SIGKILL; longer than router.drain_s


class ClusterConfig(_Section, frozen=True):
    """The whole file."""

    model: ModelConfig = ModelConfig()
    router: RouterConfig = RouterConfig()
    prefill: PrefillConfig = PrefillConfig()
    decode: DecodeConfig = DecodeConfig()
    monitor: MonitorConfig = MonitorConfig()
    planner: PlannerConfig = PlannerConfig()
    agent: AgentConfig = AgentConfig()


_MAY_BE_ZERO = ("delivery_interval_s", "slow_factor")
_LEAST = {
    "num_standbys": 0,
    "num_redundant_experts": -1,
    "num_staging_experts": -1,
    "rebalance_difference": 0,
    "prefix_cache_bytes": 0,
}  # others: 1


def load_config(path: Path | None) -> ClusterConfig:
    """Reads and validates ``path`` (None = defaults). Raises ValueError with one line that names file and key."""
    if path is None:
        return ClusterConfig()
    try:
        table = tomllib.loads(path.read_text())
        config = msgspec.convert(table, ClusterConfig)
        validate(config)
    except OSError as error:
        raise ValueError(f"cannot read configuration {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, ValueError) as error:
        raise ValueError(f"configuration {path}: {error}") from None
    return config


def validate(config: ClusterConfig) -> None:
    """Raises ValueError on values that cannot work together."""
    decode = config.decode
    if not 1 <= decode.num_ranks <= decode.max_ranks <= 64:
        raise ValueError(
            f"need 1 <= decode.num_ranks <= decode.max_ranks <= 64, got {decode.num_ranks} and {decode.max_ranks}"
        )
    monitor = config.monitor
    # A restarted monitor listens for a second, and must hear everybody in it.
    if monitor.heartbeat_s > min(0.5, monitor.heartbeat_timeout_s / 4):
        raise ValueError(
            f"heartbeat_s must be at most 0.5 and a quarter of heartbeat_timeout_s, got {monitor.heartbeat_s:g}"
        )
    if decode.num_staging_experts == 0:
        raise ValueError("decode.num_staging_experts must be at least 1, or -1 for as many as a layer's slots")
    if config.router.num_workers < 1:
        raise ValueError(f"router.num_workers must be at least 1, got {config.router.num_workers}")
    if config.prefill.num_workers < 1:
        raise ValueError(f"prefill.num_workers must be at least 1, got {config.prefill.num_workers}")
    if not (monitor.slow_factor == 0 or monitor.slow_factor > 1):
        raise ValueError(f"slow_factor must be above 1, or 0 to keep slow ranks, got {monitor.slow_factor}")
    # A router without news asks for them.
    if not 0 <= decode.delivery_interval_s <= config.router.no_news_s / 2:
        raise ValueError(
            f"decode.delivery_interval_s must be 0 or more and at most half of router.no_news_s, "
            f"got {decode.delivery_interval_s:g}"
        )
    for section in msgspec.structs.asdict(config).values():
        for key, value in msgspec.structs.asdict(section).items():
            is_zero_allowed = value == 0 and key in _MAY_BE_ZERO
            if isinstance(value, float) and not value > 0 and not is_zero_allowed:  # nan too
                raise ValueError(f"{key} must be positive, got {value}")
            is_number = isinstance(value, int) and not isinstance(value, bool)
            if is_number and value < (least := _LEAST.get(key, 1)):
                raise ValueError(f"{key} must be at least {least}, got {value}")
