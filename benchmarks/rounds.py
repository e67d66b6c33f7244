"""Decode rounds without services: model, exchange and sampling of each rank in a process of its own, nothing else.

    python -m benchmarks.rounds [--model DIR] [--ranks 4] [--streams 32] [--seconds 5] [--policy hash]

The upper bound of what serving can reach, and where to look when the data path itself is slow: prints tokens per
second, and per round the processor time of a rank and how long it waited for others.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.exchange import map_peers
from benchmarks.load_generator import ROOT
from benchmarks.provenance import provenance
from common.config import DecodeConfig, ReplicaPolicy
from common.messages import Sampling
from common.model.checkpoint import Checkpoint
from common.model.model import Batch, Model
from common.model.token_choice import Choosing, choose_rows
from common.pace import Pace
from common.placement import initial_placement, num_local_experts
from common.replica_choice import ReplicaChoice
from kernels.compiled_group import CompiledGroup
from kernels.symmetric_memory.shm import ShmProvider
from services.decode.elastic_exchange import ElasticExchange
from services.decode.expert_slots import ExpertSlots
from services.decode.rank_heap import rank_heap_layout

_PROMPT, _LIMIT = 32, 272
_DEADLINE_S = 30.0


@torch.inference_mode()
def run_rank(
    rank: int, num_ranks: int, num_streams: int, seconds: float, model_dir: str, directory: str, policy: ReplicaPolicy
) -> tuple[int, float, float, float]:
    """Number of rounds, seconds of wall clock, of processor, of waiting."""
    torch.set_num_threads(1)
    decode = DecodeConfig(num_ranks=num_ranks)
    checkpoint = Checkpoint.open(model_dir)
    config = checkpoint.config
    layout = rank_heap_layout(checkpoint, decode)
    provider = ShmProvider(Path(directory))
    heap = provider.allocate(f"rank{rank}", layout.nbytes)
    weights, tags, cache = (layout.view(heap.bytes_U8, name) for name in ("expert_weights", "expert_tags", "kv_cache"))
    slots = ExpertSlots(
        weights,
        tags,
        checkpoint.expert_layout,
        config.num_moe_layers,
        num_local_experts(decode, config.n_routed_experts),
        lambda layer, expert, row: checkpoint.read_expert(config.moe_layers[layer], expert, row),
    )
    pace = Pace(time.perf_counter, time.sleep)
    exchange = ElasticExchange(slots, config.moe_layers, config.n_routed_experts, pace)
    model = Model(checkpoint, exchange, cache)
    members = tuple(range(num_ranks))
    num_experts, num_layers = config.n_routed_experts, config.num_moe_layers
    num_local = num_local_experts(decode, num_experts)
    placement = initial_placement(num_layers, num_experts, decode.max_ranks, num_ranks, num_local)
    slots.adopt([rows[rank] for rows in placement], 1)
    layout.format(heap.bytes_U8)
    group = CompiledGroup(layout, heap, rank, deadline_s=_DEADLINE_S)
    map_peers(group, provider, Path(directory), num_ranks)
    group.adopt(1, members, digest=1)
    exchange.enter(group, ReplicaChoice(placement, members, num_experts, rank, policy))

    count = num_streams // num_ranks
    width = -(-_LIMIT // decode.block_size)
    tables = np.arange(count * width, dtype=np.int64).reshape(count, width)
    index = np.arange(count)
    tokens = np.full(count, 5, dtype=np.int64)
    sampling = [Sampling(float(number % 2), 1.0, 0, number, _LIMIT) for number in range(count)]
    outputs: list[int] = []

    def step(position: int, go_on: bool) -> bool:
        group.send_header([int(go_on)])
        positions = np.full(count, position, dtype=np.int64)
        logits = model.forward(Batch(tokens, positions, index, tables, index)).numpy()
        if group.headers is None:
            raise RuntimeError(f"a round was void: {group.void_reason}")
        if not all(words[0] for words in group.headers.words_by_rank.values()):
            return False
        tokens[:] = [choice.token for choice in choose_rows(logits, [Choosing(one, (), outputs) for one in sampling])]
        return True

    for position in range(_PROMPT):
        step(position, True)
    rounds, position = 0, _PROMPT
    start, used, waited = time.perf_counter(), time.thread_time(), float(group.wait_ns_by_source().max())
    while step(position, time.perf_counter() - start < seconds):
        rounds += 1
        position = position + 1 if position + 1 < _LIMIT else _PROMPT
    waited = (float(group.wait_ns_by_source().max()) - waited) / 1e9
    return rounds, time.perf_counter() - start, time.thread_time() - used, waited


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "abacus")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--policy", type=ReplicaPolicy, choices=list(ReplicaPolicy), default=ReplicaPolicy.HASH)
    arguments = parser.parse_args()
    origin = provenance()
    ranks, streams = arguments.ranks, arguments.streams
    with (
        tempfile.TemporaryDirectory(prefix="regrow-rounds-", dir="/dev/shm") as directory,
        multiprocessing.get_context("spawn").Pool(ranks) as pool,
    ):
        same = ranks, streams, arguments.seconds, str(arguments.model), directory, arguments.policy
        work = [(rank, *same) for rank in range(ranks)]
        results = pool.starmap_async(run_rank, work, chunksize=1).get(timeout=arguments.seconds + 4 * _DEADLINE_S)
    num_rounds, wall_s, processor_s, wait_s = (sum(values) / ranks for values in zip(*results, strict=True))
    figures = {
        "tokens_per_s": streams // ranks * ranks * num_rounds / wall_s,
        "round_ms": 1000 * wall_s / num_rounds,
        "processor_ms_per_round_and_rank": 1000 * processor_s / num_rounds,
        "longest_wait_ms_per_round": 1000 * wait_s / num_rounds,
    }
    print(json.dumps({**origin, **{name: round(value, 2) for name, value in figures.items()}}, indent=1))


if __name__ == "__main__":
    main()
