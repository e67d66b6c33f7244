"""The experts of other ranks decide tokens: proof that the group computes together and not each rank for itself."""

from pathlib import Path

from common.config import DecodeConfig
from tests.cluster.harness import TINY_RANDOM, Cluster, outcome, stream_all, varied_bodies
from tests.cluster.heap_surgeon import zero_experts

ONE_COPY = "[decode]\nnum_redundant_experts = 0\n"


async def test_overwriting_the_only_copy_of_experts_changes_outputs_on_other_ranks(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "run", "--decode-ranks", "2", config=ONE_COPY)
    try:
        cluster.wait_ready()
        bodies = varied_bodies(8, 24)
        before = await stream_all(cluster.url, bodies)
        status = await cluster.fetch_status()
        heap = next(entry["heap"] for entry in status["ranks"] if entry["rank"] == 1)
        assert zero_experts(Path(heap), TINY_RANDOM, DecodeConfig(num_ranks=2, num_redundant_experts=0)) > 0
        after = await stream_all(cluster.url, bodies)
        assert all(stream.error == "" for stream in [*before, *after])
        changed = [outcome(a) != outcome(b) for a, b in zip(before, after, strict=True)]
        # Requests live on both ranks; those of rank 0 can only change because rank 1 computes for them.
        assert all(changed), changed
    finally:
        cluster.stop()
