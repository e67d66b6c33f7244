"""Ten word exchanges of the CPU data path: four ranks in processes of their own, over shared memory.

    python -m benchmarks.exchange [--ranks 4] [--repeats 500]

Prints milliseconds per ten barriers (`ElasticGroup.clean_buffer`), as seen by rank 0: median and p99.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path

from benchmarks.failover_report import percentile
from benchmarks.provenance import provenance
from kernels.heap_layout import EpShape, HeapLayout
from kernels.reference import ElasticGroup
from kernels.symmetric_memory.base import HeapError
from kernels.symmetric_memory.shm import ShmProvider

_WAIT_S = 30.0
_NUM_WARM_UP = 50


def map_peers(group: ElasticGroup, provider: ShmProvider, directory: Path, num_ranks: int) -> None:
    """The heaps ``rank0``, ``rank1``, ... in ``directory``, once they are there and formatted."""
    deadline = time.monotonic() + _WAIT_S
    for peer in (other for other in range(num_ranks) if other != group.rank):
        while True:
            try:
                group.map_peer(peer, provider.map_peer(f"shm:{group.layout.nbytes}:{directory / f'rank{peer}'}"))
                break
            except (HeapError, ValueError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)


def run_rank(rank: int, num_ranks: int, directory: str, repeats: int) -> list[float]:
    """Milliseconds of each ten barriers."""
    layout = HeapLayout.build(EpShape(max_ranks=num_ranks, max_tokens=4, top_k=4, hidden_size=128), {})
    provider = ShmProvider(Path(directory))
    heap = provider.allocate(f"rank{rank}", layout.nbytes)
    layout.format(heap.bytes_U8)
    group = ElasticGroup(layout, heap, rank, deadline_s=_WAIT_S)
    map_peers(group, provider, Path(directory), num_ranks)
    group.adopt(1, range(num_ranks), digest=1)
    if group.allgather([]) is None:
        raise RuntimeError(f"the group did not form: {group.void_reason}")
    taken = []
    for _ in range(_NUM_WARM_UP + repeats):
        start = time.perf_counter()
        for _ in range(10):
            if not group.clean_buffer(_WAIT_S):
                raise RuntimeError(f"a barrier was void: {group.void_reason}")
        taken.append(1000 * (time.perf_counter() - start))
    return taken[_NUM_WARM_UP:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=500)
    arguments = parser.parse_args()
    origin = provenance()
    with (
        tempfile.TemporaryDirectory(prefix="regrow-exchange-", dir="/dev/shm") as directory,
        multiprocessing.get_context("spawn").Pool(arguments.ranks) as pool,
    ):
        work = [(rank, arguments.ranks, directory, arguments.repeats) for rank in range(arguments.ranks)]
        taken = pool.starmap_async(run_rank, work, chunksize=1).get(timeout=4 * _WAIT_S)[0]
    print(json.dumps({**origin, "ms_p50": percentile(taken, 0.5), "ms_p99": percentile(taken, 0.99)}, indent=1))


if __name__ == "__main__":
    main()
